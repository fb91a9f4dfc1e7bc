"""Generalised advantage estimation and group baselines."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from modules.functional.advantages import gae, group_center, group_zscore, leave_one_out, zero_std_fraction

DOUBLE = torch.float64
NAN = math.nan
GROUP_FUNCTIONS = [group_center, group_zscore, leave_one_out]


def double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=DOUBLE)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        (1.0, (0.5, 0.62, 0.38)),
        (0.95, (0.45095, 0.601, 0.38)),  # deltas (-.12, .24, .38): .24 + .95 * .38 = .601; -.12 + .95 * .601 = .45095
        (0.0, (-0.12, 0.24, 0.38)),
    ],
)
def test_gae_hand_numbers(lam: float, expected: tuple[float, float, float]) -> None:
    rewards, values = double(-0.02, 0.04, 0.98)[None], double(0.5, 0.4, 0.6)[None]
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=lam)
    close(advantages, double(*expected)[None])
    close(returns, double(*expected)[None] + values)
    if lam == 1.0:
        close(returns, double(1.0, 1.02, 0.98)[None])
        close(
            gae(rewards, values * -3 + 1, torch.ones(1, 3, dtype=torch.bool), lam=1.0)[1], returns
        )  # free of the values


def naive_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Compute A_t as the explicit double sum over later deltas."""
    following = (values + [0.0])[1:]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))]


def test_gae_skips_masked_columns_like_the_rows_with_them_cut_out() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 7, dtype=DOUBLE, generator=generator)
    mask = torch.rand(5, 7, generator=generator) < 0.6
    mask[3] = False
    dirty = rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, math.inf)
    copies = [x.clone() for x in dirty]
    advantages, returns = gae(*dirty, mask, gamma=0.9, lam=0.8)
    for i in range(5):
        expected = double(*naive_gae(rewards[i][mask[i]].tolist(), values[i][mask[i]].tolist(), 0.9, 0.8))
        close(advantages[i][mask[i]], expected)
        close(returns[i][mask[i]], expected + values[i][mask[i]])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(dirty, copies, strict=True))
    as_steps, _ = gae(rewards * mask, values * mask, torch.ones_like(mask), gamma=0.9, lam=0.8)
    assert not torch.allclose(as_steps[mask], advantages[mask])  # dropped columns taken as steps of value 0


def test_gae_defaults_padding_row_order_and_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 3, 4, dtype=DOUBLE, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
    reference = gae(rewards, values, mask)
    close(reference[0], gae(rewards, values, mask, gamma=1.0, lam=0.95)[0])
    order = torch.tensor([2, 0, 1])
    wide_rewards, wide_values = (pad(x, (2, 3), value=NAN)[order] for x in (rewards, values))
    for narrow, wide in zip(reference, gae(wide_rewards, wide_values, pad(mask, (2, 3))[order]), strict=True):
        close(wide, pad(narrow, (2, 3))[order])
    assert torch.autograd.gradcheck(lambda r, v: gae(r, v, mask), (rewards.requires_grad_(), values.requires_grad_()))


def test_group_hand_numbers() -> None:
    rewards, group = double(1, 0, 0, 0), torch.zeros(4, dtype=torch.long)
    close(group_center(rewards, group), double(0.75, -0.25, -0.25, -0.25))
    close(leave_one_out(rewards, group), double(1, -1 / 3, -1 / 3, -1 / 3))
    # sum of squares .5625 + 3 * .0625 = .75; over 3 the variance is .25 and the std .5
    close(group_zscore(rewards, group), double(0.75, -0.25, -0.25, -0.25) / 0.5001)
    close(group_zscore(rewards, group), double(1.49970, -0.49990, -0.49990, -0.49990), atol=1e-6)
    close(group_zscore(rewards, group, eps=0.0), double(1.5, -0.5, -0.5, -0.5))
    assert not torch.allclose(
        group_zscore(rewards, group), double(0.75, -0.25, -0.25, -0.25) / (math.sqrt(0.75 / 4) + 1e-4)
    )
    close(leave_one_out(double(3, 5), torch.tensor([7, 7])), double(-2, 2))  # two rows: the difference


def naive(function: Callable[..., Tensor], rewards: list[float], group: list[int]) -> Tensor:
    result = []
    for i, own in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if group[j] == group[i] and j != i and not math.isnan(r)]
        if math.isnan(own) or not others:
            result.append(0.0)
            continue
        everyone = [own, *others]
        mean = sum(everyone) / len(everyone)
        std = math.sqrt(sum((r - mean) ** 2 for r in everyone) / (len(everyone) - 1))
        by_name = {
            group_center: own - mean,
            group_zscore: (own - mean) / (std + 1e-4),
            leave_one_out: own - sum(others) / len(others),
        }
        result.append(by_name[function])
    return double(*result)


@pytest.mark.parametrize("function", GROUP_FUNCTIONS)
def test_groups_against_a_loop_with_unscorable_rows_order_labels_and_shift(function: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randn(24, dtype=DOUBLE, generator=generator)
    group = torch.randint(5, (24,), generator=generator)
    rewards[::5] = NAN
    group[7], group[8:10], rewards[8] = 11, 12, NAN  # a group of one; a group of one scorable and one unscorable row
    copies = rewards.clone(), group.clone()
    advantages = function(rewards, group)
    close(advantages, naive(function, rewards.tolist(), group.tolist()))
    assert (advantages[rewards.isnan()] == 0).all() and advantages[7] == 0 and (advantages[8:10] == 0).all()
    order = torch.randperm(24, generator=generator)
    close(function(rewards[order], group[order]), advantages[order])
    close(function(rewards, group * -1000 + 3), advantages)
    close(function(rewards + 10.0, group), advantages)
    close(torch.stack([advantages[group == label].sum() for label in range(5)]), torch.zeros(5, dtype=DOUBLE))
    assert torch.equal(rewards.nan_to_num(9.0), copies[0].nan_to_num(9.0)) and torch.equal(group, copies[1])
    assert not torch.allclose(advantages, function(rewards, torch.zeros_like(group)))


@pytest.mark.parametrize("function", GROUP_FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_equal_rewards_give_exactly_zero(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    for value, size in product((0.1, 0.7, -1 / 3, 1e8 + 0.3), (1, 2, 3, 7, 10)):
        rewards = torch.tensor([value] * size + [NAN, 0.0, 1.0], dtype=dtype)
        group = torch.tensor([4] * size + [4, 9, 9])
        assert (function(rewards, group)[:size] == 0).all()
        assert (function(rewards, group)[-2:] != 0).all()
    assert (group_zscore(torch.full((3,), 0.1, dtype=dtype), torch.zeros(3, dtype=torch.long), eps=0.0) == 0).all()
    assert 0.1 - (0.1 + 0.1 + 0.1) / 3 != 0  # the plain formula leaves a rounding error for a tiny std to scale up


def test_zscore_ignores_scale_and_accepts_integer_rewards() -> None:
    rewards, group = double(1, 0, 0, 1, 2, 5), torch.tensor([0, 0, 0, 1, 1, 1])
    close(group_zscore(rewards * 7 + 3, group, eps=0.0), group_zscore(rewards, group, eps=0.0))
    assert not torch.allclose(group_center(rewards * 7, group), group_center(rewards, group))
    assert torch.equal(group_center(torch.tensor([1, 0]), torch.tensor([0, 0])), torch.tensor([0.5, -0.5]))
    for function in GROUP_FUNCTIONS:
        assert function(double(), torch.zeros(0, dtype=torch.long)).shape == (0,)


def expected_gradient(function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Compute E[(1/G) sum_i A_i grad log pi(y_i)] of a one-token policy over all G-tuples."""
    theta, payoff, group_size = double(0.4, -0.1).requires_grad_(), double(1.0, 0.2), 3
    logprobs = theta.log_softmax(0)
    surrogate = logprobs.new_zeros(())
    for choices in product(range(2), repeat=group_size):
        picks = torch.tensor(choices)
        probability = logprobs[picks].sum().exp().detach()
        advantages = function(payoff[picks], torch.zeros(group_size, dtype=torch.long))
        surrogate = surrogate + probability * (advantages * logprobs[picks]).mean()
    return torch.autograd.grad(surrogate, theta)[0]


def test_which_baselines_are_unbiased() -> None:
    theta = double(0.4, -0.1).requires_grad_()
    exact = torch.autograd.grad((theta.softmax(0) * double(1.0, 0.2)).sum(), theta)[0]
    close(exact, double(0.188003, -0.188003), atol=1e-6)
    close(expected_gradient(leave_one_out), exact)
    close(expected_gradient(group_center) * 3 / 2, exact)
    assert not torch.allclose(expected_gradient(group_center), exact)
    scaled = expected_gradient(lambda rewards, group: group_zscore(rewards, group, eps=0.0))
    close(scaled, double(0.271359, -0.271359), atol=1e-6)


def test_zero_std_fraction() -> None:
    rewards = double(0.1, 0.1, 0.1, 1, 0, 1, NAN, 1, 2, NAN, NAN)
    group = torch.tensor(
        [5, 5, 5, 2, 2, 8, 8, 8, 3, -1, -1]
    )  # equal; mixed; equal besides a NaN; one row; none scorable
    assert zero_std_fraction(rewards, group).item() == pytest.approx(3 / 4)
    assert zero_std_fraction(double(1, 1 + 1e-15), torch.tensor([0, 0])).item() == 0.0  # no tolerance
    assert zero_std_fraction(double(NAN), torch.tensor([0])).item() == 0.0
    assert zero_std_fraction(torch.tensor([1, 1, 0, 1]), torch.tensor([0, 0, 1, 1])).item() == 0.5


@pytest.mark.parametrize("function", [*GROUP_FUNCTIONS, zero_std_fraction])
def test_shapes_must_agree(function: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="group"):
        function(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
