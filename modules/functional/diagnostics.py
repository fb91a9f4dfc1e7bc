"""Measures of a run's health, and the laws of reward over-optimisation. Arithmetic is in float64."""

from collections.abc import Sequence
from math import comb, log

import torch
from torch import Tensor


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Compute the share of different n-grams among all n-grams of a set, in [0, 1]; 0 if there are no n-grams.

    Long sequences have a lower share, so compare only sets that were cut to equal numbers of tokens. Tokens 1 2 1 2 and
    1 2 3 hold the bigrams 12 21 12 12 23, of which 3 differ: 3/5.

    Raises:
        ValueError: ``n`` below 1.

    >>> distinct_n([[1, 2, 1, 2], [1, 2, 3]], n=2)
    0.6
    """
    if n < 1:
        raise ValueError(f"distinct_n counts n-grams of 1 or more tokens, got n={n}.")
    ngrams = [tuple(sequence[i : i + n]) for sequence in sequences for i in range(len(sequence) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Estimate the probability, in [0, 1], that k samples hold a correct one: 1 - C(n-c, k) / C(n, k).

    k of the n = ``num_samples`` are drawn without replacement. The estimator is unbiased (Chen et al. 2107.03374, eq.
    1).

    Raises:
        ValueError: unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.

    >>> round(pass_at_k(num_samples=10, num_correct=3, k=5), 6)
    0.916667
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f"pass_at_k needs 0 <= correct <= samples and 1 <= k <= samples, got samples={num_samples}, "
            f"correct={num_correct}, k={k}: draw more samples per prompt or ask for a smaller k."
        )
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def ece(confidence: Tensor, correct: Tensor, num_bins: int = 10) -> float:
    """Compute the expected calibration error, sum over bins of (n_b / N) * abs(accuracy_b - mean confidence_b).

    It lies in [0, 1], and is 0 for N = 0. Bins have equal width and are closed on the right, ((b-1)/B, b/B]; a
    confidence of 0 is in the first.

    Args:
        confidence: [N], in [0, 1].
        correct: [N], bool or 0/1.
        num_bins: B, at least 1.

    Raises:
        ValueError: lengths differ, a confidence outside [0, 1] (or NaN), or no bin.

    >>> round(ece(torch.tensor([0.9, 0.9, 0.1, 0.1]), torch.tensor([1, 1, 0, 1])), 4)  # (2 * .1 + 2 * .4) / 4
    0.25
    """
    if confidence.shape != correct.shape or num_bins < 1:
        raise ValueError(
            f"ece needs one outcome per confidence and num_bins >= 1, got {confidence.shape}, {correct.shape}, "
            f"{num_bins}."
        )
    confidence, correct = confidence.double(), correct.double()  # [N]
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise ValueError("ece needs confidences in [0, 1]: give probabilities, not logits or log-probabilities.")
    bins = ((confidence * num_bins).ceil().long() - 1).clamp(min=0)  # [N]
    # [B], n_b * (accuracy_b - confidence_b)
    gaps = confidence.new_zeros(num_bins).index_add(0, bins, correct - confidence)
    return gaps.abs().sum().item() / max(len(confidence), 1)


def pearson(x: Tensor, y: Tensor) -> float:
    """Compute the correlation of ``x`` and ``y``, both [N] and finite, in [-1, 1]; 0 if either is constant or N < 2.

    It is then 0 and not NaN, because a constant shows no trend, and a curve with holes is hard to read.

    Raises:
        ValueError: not two vectors of one length.

    >>> round(pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])), 6)
    1.0
    """
    return within_group_correlation(x, y, torch.zeros(x.shape, dtype=torch.long, device=x.device))


def within_group_correlation(x: Tensor, y: Tensor, group: Tensor) -> float:
    """Compute the correlation of ``x`` and ``y`` after each group's mean is subtracted from both, in [-1, 1].

    It shows the trend inside groups: it does not count that hard prompts have both long answers and low rewards. It is
    0 if ``x`` or ``y`` is constant in every group.

    Args:
        x: [N], finite.
        y: [N], finite.
        group: int [N], any numbers; equal = same group.

    Raises:
        ValueError: not three vectors of one length.

    >>> x, y = torch.tensor([1.0, 2.0, 11.0, 12.0]), torch.tensor([1.0, 2.0, -9.0, -8.0])
    >>> round(within_group_correlation(x, y, torch.tensor([0, 0, 1, 1])), 6), pearson(x, y) < 0
    (1.0, True)
    """
    if x.dim() != 1 or x.shape != y.shape or x.shape != group.shape:
        raise ValueError(
            f"A correlation needs vectors of one length, got shapes {tuple(x.shape)}, {tuple(y.shape)}, "
            f"{tuple(group.shape)}."
        )
    _, index = torch.unique(group, return_inverse=True)  # [N]
    x, y = _subtract_group_means(x.double(), index), _subtract_group_means(y.double(), index)
    scale = x.square().sum().sqrt() * y.square().sum().sqrt()
    return ((x * y).sum() / scale).clamp(-1.0, 1.0).item() if scale > 0 else 0.0


def _subtract_group_means(x: Tensor, index: Tensor) -> Tensor:
    """Subtract from ``x`` [N] the mean of its group; a constant group gives exact zeros."""
    num_groups = int(index.max()) + 1 if len(index) else 0
    lowest = x.new_zeros(num_groups).scatter_reduce(0, index, x, "amin", include_self=False)  # [groups]
    x = x - lowest[index]  # first, so that no rounding error is left in a constant group
    sums = x.new_zeros(num_groups).index_add(0, index, x)
    return x - (sums / torch.bincount(index, minlength=num_groups))[index]


def overoptimization_fit(distance: Tensor, gold: Tensor) -> tuple[float, float]:
    """Fit (alpha, beta) of R_RL(d) = d (alpha - beta log d) (Gao et al. 2210.10760, eq. 2).

    The fit is least squares of R/d on (1, -log d).

    Args:
        distance: [N], d = sqrt(KL(policy || start)) in sqrt(nats), >= 0. Points at d = 0 tell nothing and are left out.
        gold: [N], gold reward, shifted so that the start has 0.

    Raises:
        ValueError: lengths differ, a negative distance, or fewer than two different positive distances.

    >>> d = torch.tensor([1.0, 2.0, 4.0])
    >>> alpha, beta = overoptimization_fit(d, d * (1.0 - 0.5 * d.log()))
    >>> round(alpha, 4), round(beta, 4)
    (1.0, 0.5)
    """
    distance, slope = _fit_points(distance, gold)
    return _fit_line(distance.log(), slope)


def best_of_n_fit(distance: Tensor, gold: Tensor) -> tuple[float, float]:
    """Fit (alpha, beta) of R_bon(d) = d (alpha - beta d) (Gao et al. 2210.10760, eq. 1).

    The fit is least squares of R/d on (1, -d), with d = sqrt(best_of_n_kl(n)). ``distance``, ``gold`` and errors are as
    in ``overoptimization_fit``.

    >>> d = torch.tensor([1.0, 2.0, 4.0])
    >>> alpha, beta = best_of_n_fit(d, d * (1.0 - 0.1 * d))
    >>> round(alpha, 4), round(beta, 4)
    (1.0, 0.1)
    """
    distance, slope = _fit_points(distance, gold)
    return _fit_line(distance, slope)


def _fit_points(distance: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positive distances d and their R/d, both [<= N]."""
    if distance.dim() != 1 or distance.shape != gold.shape or bool((distance < 0).any()):
        raise ValueError(
            f"A fit needs one gold reward per non-negative distance, got {tuple(distance.shape)} and "
            f"{tuple(gold.shape)}."
        )
    keep = distance > 0
    distance, gold = distance[keep].double(), gold[keep].double()
    if len(distance.unique()) < 2:
        raise ValueError(
            "A fit of alpha and beta needs at least two different positive distances: train longer or measure more "
            "often."
        )
    return distance, gold / distance


def _fit_line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Fit (alpha, beta) of y = alpha - beta x by least squares; ``x`` is not constant."""
    centered = x - x.mean()
    beta = -((centered * y).sum() / centered.square().sum())
    return (y.mean() + beta * x.mean()).item(), beta.item()


def best_of_n_curve(proxy: Tensor, gold: Tensor, n: int) -> float:
    """Estimate, without bias, the expected gold reward of the best of n by proxy, from N samples.

    It is the sum over i = 1..N of C(i-1, n-1) / C(N, n) * gold_(i), with samples numbered by rising proxy. Samples with
    equal proxy are drawn at random, so the order of the samples does not matter.

    Args:
        proxy: [N], the reward that picks the best.
        gold: [N], the reward that measures it.
        n: 1 <= n <= N.

    Raises:
        ValueError: lengths differ, or ``n`` out of range.

    >>> proxy, gold = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 0.5])
    >>> round(best_of_n_curve(proxy, gold, n=2), 4)  # of the pairs 01 02 12 the better by proxy: (1 + .5 + .5) / 3
    0.6667
    """
    if proxy.dim() != 1 or proxy.shape != gold.shape or not 1 <= n <= len(proxy):
        raise ValueError(
            f"Best of n needs one gold reward per proxy reward and 1 <= n <= {proxy.numel()}, got {tuple(gold.shape)}, "
            f"n={n}."
        )
    # The rank rises with the proxy; equal proxies share one.
    _, rank, counts = torch.unique(proxy, return_inverse=True, return_counts=True)
    tied_means = gold.new_zeros(len(counts), dtype=torch.float64).index_add(0, rank, gold.double()) / counts
    ordered = tied_means.repeat_interleave(counts).tolist()  # [N], by rising proxy
    total = comb(len(ordered), n)
    return sum(comb(i, n - 1) / total * value for i, value in enumerate(ordered))


def best_of_n_kl(n: int) -> float:
    """Compute KL(best of n || start) [] in nats: log n - (n - 1)/n (Gao et al. 2210.10760).

    It is exact if all outputs are distinct, else an upper bound.

    Raises:
        ValueError: ``n`` below 1.

    >>> round(best_of_n_kl(4), 4)
    0.6363
    """
    if n < 1:
        raise ValueError(f"Best of n needs n >= 1, got {n}.")
    return log(n) - (n - 1) / n
