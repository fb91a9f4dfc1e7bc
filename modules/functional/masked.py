"""Padding, and sums, means and whitening over the kept entries of a padded tensor.

A mask is True, or a weight above 0, where an entry counts. Dropped entries are filled before any arithmetic, so that no
NaN or inf in a padded column reaches a result or a gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_rows(rows: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Pad rows of integers on the right to int [N, T], and make the bool keep-mask [N, T] from their lengths.

    T is the longest row, at least 1. ``fill`` is what padding holds; it may occur in a row.

    >>> pad_rows([[7, 0, 2], [2]], fill=2)[1]
    tensor([[ True,  True,  True],
            [ True, False, False]])
    """
    lengths = torch.tensor([len(row) for row in rows])
    width = max(1, int(lengths.max()))
    padded = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.long)
    return padded, torch.arange(width) < lengths[:, None]


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum ``x * mask`` over ``dim``, or over everything.

    x: any shape, for example [N, T]. mask: the same shape (or broadcasting to it), bool keep-mask or float weights >=
    0. An empty selection gives 0.

    >>> masked_sum(torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([True, True, False]))
    tensor(3.)
    """
    return (x.masked_fill(mask == 0, 0) * mask).sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Average ``x`` with the weights ``mask`` over ``dim``, or over everything.

    x: any shape, for example [N, T]. mask: the same shape (or broadcasting to it), bool keep-mask or float weights >=
    0. An empty selection gives 0, also per slice of ``dim``.

    >>> masked_mean(torch.tensor([[1.0, 2.0], [4.0, 9.0]]), torch.tensor([[True, True], [True, False]]), dim=1)
    tensor([1.5000, 4.0000])
    """
    total_weight = mask.expand_as(x).sum(dim)
    return masked_sum(x, mask, dim) / total_weight.masked_fill(total_weight == 0, 1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale the kept entries to unit variance: (x - mean) / sqrt(variance + 1e-8), with the population variance.

    x: [N, T]. mask: [N, T], bool keep-mask or float weights >= 0. shift_mean: True centres the result at 0; False adds
    the mean back, so that only the scale changes. Returns [N, T] with 0 at dropped entries. The moments are those of
    this tensor, so a caller on several ranks gathers first. Source: Ziegler et al. 2019 (1909.08593), the whitening of
    its released code.

    >>> masked_whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[-1.,  1.,  0.]])
    """
    dropped = mask == 0
    mean = masked_mean(x, mask)
    centered = x.masked_fill(dropped, 0.0) - mean
    whitened = centered * torch.rsqrt(masked_mean(centered.square(), mask) + 1e-8)
    return (whitened if shift_mean else whitened + mean).masked_fill(dropped, 0.0)


def aggregate(loss: Tensor, mask: Tensor, denominator: Tensor | float) -> Tensor:
    """Turn losses into one number: the sum of ``loss * mask``, divided once by ``denominator``.

    loss: [N, T] or [N]. mask: the same shape, bool keep-mask, or float weights >= 0, such as 1/length in every kept
    column of a row for a mean of per-sequence means. denominator: [] or a number > 0, counted over the whole optimiser
    step and all ranks, so that any split of the rows into micro-batches adds up to the same loss. Returns []. An empty
    selection gives 0 and a zero gradient, whatever the denominator.

    >>> aggregate(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]), denominator=6)
    tensor(0.5000)
    """
    nothing_kept = (mask == 0).all().to(loss.dtype)
    return masked_sum(loss, mask) / (denominator + nothing_kept)
