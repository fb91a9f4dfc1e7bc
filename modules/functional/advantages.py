"""Advantages: generalised advantage estimation per token, and baselines from a group of completions of one prompt.

In the group functions ``group`` holds any integers; rows with the same integer form a group, in any order. A reward of
NaN is unscorable: it enters no statistic of its group, and its own advantage is 0. A group gives exactly 0 if it has
fewer than two scorable rows or if its scorable rewards are all equal.
"""

from collections.abc import Callable
from math import comb

import torch
from torch import Tensor
from torch.nn.functional import pad

from modules.functional.ranges import check_numbers


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Compute generalised advantages (1506.02438, eq. 16) over the kept columns of each row.

    delta_t = R_t + gamma V_next - V_t,  A_t = delta_t + gamma lam A_next,  return_t = A_t + V_t. "Next" is the next
    kept column, however many dropped ones (tool output, padding) lie between. After the last one V and A are 0.

    rewards, values: [N, T]. mask: bool [N, T]. gamma, lam: in 0..1; lam=1 is the Monte Carlo return minus the value,
    lam=0 the one-step temporal difference. Returns (advantages [N, T], returns [N, T]), not whitened, 0 at dropped
    columns.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    >>> gae(rewards, values, torch.tensor([[True, True]]), lam=0.0)  # .25 - .5 and 1 - .25
    (tensor([[-0.2500,  0.7500]]), tensor([[0.2500, 1.0000]]))
    """
    keep = mask != 0
    rewards, values = rewards.masked_fill(~keep, 0.0), values.masked_fill(~keep, 0.0)
    order = keep.int().argsort(dim=1, descending=True, stable=True)  # the kept columns of each row come first
    rewards, packed = rewards.gather(1, order), values.gather(1, order)
    advantages = rewards + gamma * pad(packed[:, 1:], (0, 1)) - packed  # delta
    step, decay = 1, gamma * lam
    while step < advantages.shape[1]:  # holds the sum over the next ``step`` deltas, so their number doubles
        advantages = advantages + decay * pad(advantages[:, step:], (0, step))
        step, decay = 2 * step, decay * decay
    advantages = torch.zeros_like(values).scatter(1, order, advantages).masked_fill(~keep, 0.0)
    return advantages, advantages + values


def _extremes(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's group as an index in 0..K-1 [N], and each group's lowest and highest scorable reward [K].

    A group without a scorable row has lowest +inf and highest -inf.
    """
    if rewards.dim() != 1 or rewards.shape != group.shape:
        shapes = f"{tuple(rewards.shape)} and {tuple(group.shape)}"
        raise ValueError(
            f"advantages: rewards and group have shapes {shapes}, expected [N] and [N]; give one of each per completion"
        )
    labels, index = torch.unique(group, return_inverse=True)
    unscorable = rewards.isnan()
    lowest = rewards.new_full(labels.shape, torch.inf).scatter_reduce(
        0, index, rewards.masked_fill(unscorable, torch.inf), "amin"
    )
    highest = rewards.new_full(labels.shape, -torch.inf).scatter_reduce(
        0, index, rewards.masked_fill(unscorable, -torch.inf), "amax"
    )
    return index, lowest, highest


def _sum_of_own_group(x: Tensor, index: Tensor) -> Tensor:
    """Sum ``x`` [N] over the rows with the same ``index`` (ints in 0..N-1). Returns [N], each row's own sum."""
    return torch.zeros_like(x).index_add(0, index, x)[index]


def _center_rewards(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract the group's mean from the rewards.

    Returns the centred rewards [N], 0 where unscorable; the number of scorable rows of each row's group [N]; and the
    group index [N].
    """
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    index, lowest, _ = _extremes(rewards, group)
    unscorable = rewards.isnan()
    # Counted from the group's lowest reward, equal rewards are exact zeros, and so is their mean. No rounding error is
    # left that a small deviation would magnify.
    height = (rewards - lowest[index]).masked_fill(unscorable, 0.0)
    count = _sum_of_own_group((~unscorable).to(rewards.dtype), index)
    centered = height - _sum_of_own_group(height, index) / count.clamp(min=1)
    return centered.masked_fill(unscorable, 0.0), count, index


def group_center(rewards: Tensor, group: Tensor) -> Tensor:
    """Subtract from each reward the mean of its group (Dr. GRPO, 2503.20783).

    rewards: [N], NaN = unscorable. group: int [N]. Returns [N], float32 or wider; every group sums to 0.
    Raises ValueError if the shapes differ.

    >>> group_center(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([7, 7, 7, 7]))
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    """
    return _center_rewards(rewards, group)[0]


def group_zscore(rewards: Tensor, group: Tensor, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """Compute (reward - mean) / (std + eps) within each group (GRPO, 2402.03300, section 4.1.2).

    The paper leaves ddof and eps open. rewards: [N], NaN = unscorable. group: int [N]. eps: >= 0, in units of reward.
    ddof: 1 = the sample's std, 0 = the population's. Returns [N], float32 or wider; every group sums to 0. Raises
    ValueError if the shapes differ.

    >>> group_zscore(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([7, 7, 7, 7]))  # std .5
    tensor([ 1.4997, -0.4999, -0.4999, -0.4999])
    """
    centered, count, index = _center_rewards(rewards, group)
    std = (_sum_of_own_group(centered.square(), index) / (count - ddof).clamp(min=1)).sqrt()
    return centered / (std + eps).masked_fill(std == 0, 1.0)


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """Subtract from each reward the mean of the *other* rewards of its group, an unbiased baseline (RLOO, 2402.14740).

    rewards: [N], NaN = unscorable. group: int [N]. Returns [N], float32 or wider: the centred reward times n / (n - 1)
    for n scorable rows. Raises ValueError if the shapes differ.

    >>> leave_one_out(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([7, 7, 7, 7]))
    tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
    """
    centered, count, _ = _center_rewards(rewards, group)
    return centered * count / (count - 1).clamp(min=1)


def zero_std_fraction(rewards: Tensor, group: Tensor) -> Tensor:
    """Compute the share of groups that teach nothing, because all their scorable rewards are exactly equal.

    rewards: [N], NaN = unscorable. group: int [N]. Returns [] in 0..1, a share of the groups with a scorable row. A
    group with one scorable row counts as all equal. Without any scorable row the share is 0. Raises ValueError if the
    shapes differ.

    >>> zero_std_fraction(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]))
    tensor(0.5000)
    """
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    _, lowest, highest = _extremes(rewards, group)
    has_scorable = lowest <= highest
    return (lowest == highest).sum() / has_scorable.sum().clamp(min=1)


def expected_weight(advantages: Callable[[Tensor, Tensor], Tensor], rate: float, size: int) -> float:
    """Compute the expected sum of |A| over a group whose answers are right with probability ``rate``, exactly.

    It is the sum over k of C(size, k) rate^k (1 - rate)^(size - k) |A of k rewards of 1 and size - k of 0|. Under
    ``group_center`` that is 2 (size - 1) rate (1 - rate). Under ``group_zscore`` it is flatter, so that very easy and
    very hard prompts weigh more beside the others (Dr. GRPO, 2503.20783, section 3.1).

    advantages: a function of rewards [N] and group [N], such as ``group_zscore``. rate: in 0..1. size: completions of
    the group, >= 1. Raises ValueError out of these ranges.

    >>> round(expected_weight(group_center, rate=0.25, size=4), 6)
    1.125
    """
    check_numbers("expected_weight", rate=(rate, "[0, 1]"), size=(size, "[1, inf)"))
    group, total = torch.zeros(size, dtype=torch.long), 0.0
    for right in range(size + 1):
        rewards = (torch.arange(size) < right).double()
        total += binomial(right, size, rate) * float(advantages(rewards, group).abs().sum())
    return total


def mixed_mean_bias(rate: float, size: int) -> float:
    """Compute E[share of right answers | right and wrong ones] - ``rate`` of a group: the bias of its mean as baseline.

    Only groups with right and with wrong answers have a gradient, and dynamic sampling trains on no others. Among them
    the mean is (rate - rate^size) / (1 - rate^size - (1 - rate)^size) on average: too high for hard prompts, so that
    advantages are too low, and too low for easy ones (2601.08521, theorem 1 and lemma 2).

    rate: the prompt's probability of a right answer, in 0..1. At 0 and 1 the result is its limit, 1 / size and -1 /
    size. size: completions of the group, >= 2. Raises ValueError out of these ranges.

    >>> round(mixed_mean_bias(rate=0.25, size=2), 6), round(mixed_mean_bias(rate=0.5, size=8), 6)
    (0.25, 0.0)
    """
    check_numbers("mixed_mean_bias", rate=(rate, "[0, 1]"), size=(size, "[2, inf)"))
    if rate in (0.0, 1.0):
        return (1 - 2 * rate) / size
    chances = [binomial(right, size, rate) for right in range(1, size)]
    return sum(chance * right / size for right, chance in enumerate(chances, 1)) / sum(chances) - rate


def binomial(right: int, size: int, rate: float) -> float:
    """Compute the probability of exactly ``right`` right answers among ``size`` that are right with ``rate`` each.

    >>> binomial(1, 2, 0.5)
    0.5
    """
    return comb(size, right) * rate**right * (1 - rate) ** (size - right)
