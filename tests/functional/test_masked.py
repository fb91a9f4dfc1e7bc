"""Masked sums, means, whitening, and the division by a given denominator."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from modules.functional.masked import aggregate, masked_mean, masked_sum, masked_whiten

DOUBLE = torch.float64
Reduction = Callable[[Tensor, Tensor], Tensor]


def aggregate_by_seven(x: Tensor, mask: Tensor) -> Tensor:
    return aggregate(x, mask, 7.0)


FUNCTIONS: list[Reduction] = [masked_sum, masked_mean, masked_whiten, aggregate_by_seven]


def random_case(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 6, dtype=DOUBLE, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.6
    mask[2] = False
    return x, mask


def test_naive_loop_over_everything_and_over_each_dimension() -> None:
    x, mask = random_case()
    kept = [x[i, t].item() for i, t in product(range(4), range(6)) if mask[i, t]]
    assert masked_sum(x, mask).item() == pytest.approx(sum(kept), abs=1e-12)
    assert masked_mean(x, mask).item() == pytest.approx(sum(kept) / len(kept), abs=1e-12)
    for i in range(4):
        row = [x[i, t].item() for t in range(6) if mask[i, t]]
        assert masked_mean(x, mask, dim=1)[i].item() == pytest.approx(sum(row) / len(row) if row else 0.0, abs=1e-12)
        assert masked_sum(x, mask, dim=1)[i].item() == pytest.approx(sum(row), abs=1e-12)
    for t in range(6):
        column = [x[i, t].item() for i in range(4) if mask[i, t]]
        assert masked_mean(x, mask, dim=0)[t].item() == pytest.approx(
            sum(column) / len(column) if column else 0.0, abs=1e-12
        )
    assert not math.isclose(
        masked_mean(x, mask).item(), masked_mean(x, mask, dim=1).mean().item()
    )  # mean of means is another number
    assert not math.isclose(masked_mean(x, mask).item(), (x * mask).mean().item())


def test_mean_with_float_weights_and_a_broadcast_mask() -> None:
    x = torch.tensor([[1.0, 5.0], [2.0, 8.0]], dtype=DOUBLE)
    weights = torch.tensor([[1.0, 3.0], [0.0, 4.0]], dtype=DOUBLE)
    assert masked_mean(x, weights).item() == pytest.approx((1 + 15 + 32) / 8, abs=1e-12)
    assert masked_mean(x, torch.tensor([[True], [False]])).item() == pytest.approx(
        3.0, abs=1e-12
    )  # two kept entries, not one
    assert masked_mean(x > 4, torch.ones(2, 2, dtype=torch.bool)).item() == 0.5


def test_empty_selection_is_zero_with_zero_gradient() -> None:
    for function in FUNCTIONS:
        x = torch.full((2, 3), math.nan, dtype=DOUBLE, requires_grad=True)
        result = function(x, torch.zeros(2, 3, dtype=torch.bool))
        assert torch.equal(result, torch.zeros_like(result))
        result.sum().backward()
        assert x.grad is not None and torch.equal(x.grad, torch.zeros(2, 3, dtype=DOUBLE))
    assert aggregate(torch.ones(2), torch.zeros(2), torch.tensor(0)).item() == 0.0


def test_whiten_hand_numbers() -> None:
    # [1, 2, 3, 6]: mean 3, deviations (-2, -1, 0, 3), population variance 14 / 4 = 3.5
    x = torch.tensor([[1.0, 2.0, math.nan], [3.0, 6.0, math.inf]], dtype=DOUBLE)
    mask = torch.tensor([[True, True, False], [True, True, False]])
    scale = math.sqrt(3.5 + 1e-8)
    expected = torch.tensor([[-2 / scale, -1 / scale, 0.0], [0.0, 3 / scale, 0.0]], dtype=DOUBLE)
    torch.testing.assert_close(masked_whiten(x, mask), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        masked_whiten(x, mask)[mask], torch.tensor([-1.06904, -0.53452, 0, 1.60357], dtype=DOUBLE), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(masked_whiten(x, mask, shift_mean=False), expected + 3.0 * mask, atol=1e-12, rtol=0)
    sample_scale = math.sqrt(14 / 3 + 1e-8)
    assert not torch.allclose(masked_whiten(x, mask)[0, :1], torch.tensor([-2 / sample_scale], dtype=DOUBLE))


def test_whiten_is_invariant_to_shifts_and_a_constant_gives_zero() -> None:
    x, mask = random_case()
    torch.testing.assert_close(masked_whiten(x + 5.0, mask), masked_whiten(x, mask), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        masked_whiten(torch.full((2, 3), 0.1, dtype=DOUBLE), torch.ones(2, 3)), torch.zeros(2, 3, dtype=DOUBLE)
    )


def test_aggregation_table() -> None:
    """Row A: advantage +1, 2 tokens; row B: advantage -1, 8 tokens; ratio 1, so the token loss is -advantage."""
    mask = torch.arange(10) < torch.tensor([[2], [8]])
    loss = torch.tensor([[-1.0], [1.0]], dtype=DOUBLE).expand(2, 10)
    lengths = mask.sum(1, keepdim=True)
    assert aggregate(loss, mask, mask.sum()).item() == pytest.approx((-2 + 8) / 10, abs=1e-12)  # token mean
    assert aggregate(loss, mask / lengths.to(DOUBLE), 2).item() == pytest.approx(
        (-1 + 1) / 2, abs=1e-12
    )  # mean of sequence means
    assert aggregate(loss, mask, 2).item() == pytest.approx((-2 + 8) / 2, abs=1e-12)  # mean of sequence sums
    assert aggregate(loss, mask, 2 * 10).item() == pytest.approx(0.3, abs=1e-12)  # constant norm, L_max = 10


@pytest.mark.parametrize("splits", [[4], [1, 3], [2, 2], [1, 1, 1, 1]])
def test_any_split_into_micro_batches_adds_up_to_the_same_loss(splits: list[int]) -> None:
    x, mask = random_case()
    denominator = mask.sum()
    parts = zip(x.split(splits), mask.split(splits), strict=True)
    total = sum(aggregate(rows, keep, denominator).item() for rows, keep in parts)
    assert total == pytest.approx((x * mask).sum().item() / denominator.item(), abs=1e-12)
    local_means = [
        masked_mean(rows, keep).item() for rows, keep in zip(x.split([1, 3]), mask.split([1, 3]), strict=True)
    ]
    assert not math.isclose(sum(local_means) / 2, total)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_masked_columns_row_order_padding_and_inputs(function: Reduction) -> None:
    x, mask = random_case()
    reference = function(x, mask)
    dirty = x.masked_fill(~mask, math.nan)
    dirty[0, :] = torch.where(mask[0], x[0], math.inf)
    copy, mask_copy = dirty.clone(), mask.clone()
    leaf = dirty.requires_grad_()
    result = function(leaf, mask)
    torch.testing.assert_close(
        result[mask] if result.dim() else result, reference[mask] if result.dim() else reference, atol=1e-9, rtol=0
    )
    assert torch.isfinite(result).all()
    (result.square()).sum().backward()
    assert (
        leaf.grad is not None
        and torch.isfinite(leaf.grad).all()
        and torch.equal(leaf.grad[~mask], torch.zeros_like(x)[~mask])
    )
    assert torch.equal(leaf.detach().nan_to_num(9.0), copy.nan_to_num(9.0)) and torch.equal(mask, mask_copy)
    order = torch.tensor([3, 1, 0, 2])
    padded = function(pad(x, (0, 5), value=math.nan)[order], pad(mask, (0, 5))[order])
    expected = pad(reference, (0, 5))[order] if reference.dim() else reference
    torch.testing.assert_close(padded, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(function: Reduction) -> None:
    x, mask = random_case()
    assert torch.autograd.gradcheck(lambda y: function(y, mask), (x.requires_grad_(),))
