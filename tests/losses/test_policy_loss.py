"""Clipped, sequence-clipped, CISPO and mirror-descent policy losses."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from modules.functional.advantages import group_center
from modules.losses.policy_loss import (
    Metrics,
    cispo_loss,
    clipped_policy_loss,
    mirror_descent_loss,
    ratio_moments,
    sequence_clipped_policy_loss,
)

DOUBLE = torch.float64
REWARDS, GROUP = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=DOUBLE), torch.tensor([3, 3, 8, 8])


Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # logprobs, old_logprobs, advantages, mask, denominator
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Metrics]]


def cispo(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, denominator: Tensor
) -> tuple[Tensor, Metrics]:
    return cispo_loss(logprobs, old, advantages, mask, denominator, clip_high=0.2)


def dual_clipped(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, denominator: Tensor
) -> tuple[Tensor, Metrics]:
    return clipped_policy_loss(logprobs, old, advantages, mask, denominator, dual_clip=1.5)


def mirror_descent(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, denominator: Tensor
) -> tuple[Tensor, Metrics]:
    return mirror_descent_loss(logprobs, old, mask, REWARDS, GROUP, tau=0.3)


ADVANTAGE_LOSSES: list[Loss] = [clipped_policy_loss, dual_clipped, sequence_clipped_policy_loss, cispo]
LOSSES: list[Loss] = [*ADVANTAGE_LOSSES, mirror_descent]


def random_case(seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    logprobs, noise, advantages = torch.randn(3, 4, 6, dtype=DOUBLE, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.7
    mask[:, 0] = True
    return -logprobs.abs(), -logprobs.abs() + 0.4 * noise, advantages, mask, torch.tensor(13.0, dtype=DOUBLE)


def single(ratio: float, advantage: float) -> Case:
    old = torch.tensor([[-1.0]], dtype=DOUBLE)
    logprobs = (old + math.log(ratio)).requires_grad_()
    return logprobs, old, torch.tensor([[advantage]], dtype=DOUBLE), torch.ones(1, 1, dtype=torch.bool), torch.ones(())


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize(
    ("advantage", "ratio", "dual_clip", "expected", "cut"),
    [
        (1, 1.5, None, -1.2, "high"),
        (1, 0.5, None, -0.5, None),
        (-1, 1.5, None, 1.5, None),
        (-1, 0.5, None, 0.8, "low"),
        (-1, 5.0, 3.0, 3.0, "dual"),
        (-1, 5.0, None, 5.0, None),  # no dual clip unless asked
        (1, 5.0, 3.0, -1.2, "high"),  # and it leaves A > 0 alone
    ],
)
def test_clip_table(advantage: float, ratio: float, dual_clip: float | None, expected: float, cut: str | None) -> None:
    case = single(ratio, advantage)
    loss, metrics = clipped_policy_loss(*case, dual_clip=dual_clip)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    # d(-ratio A)/d logprob = -ratio A where nothing is cut
    assert gradient(loss, case[0]).item() == pytest.approx(0.0 if cut else -ratio * advantage, abs=1e-12)
    assert metrics["clip_ratio/low_mean"] == float(cut == "low") and metrics["clip_ratio/high_mean"] == float(
        cut == "high"
    )
    assert metrics["clip_ratio/region_mean"] == float(cut in ("low", "high"))
    assert metrics["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-12)


@pytest.mark.parametrize(("ratio", "advantage", "clip_low", "clip_high", "expected"), [
    (1.25, 1.0, 0.2, 0.28, -1.25), (1.25, 1.0, 0.28, 0.2, -1.2), (0.75, -1.0, 0.28, 0.2, 0.75), (0.75, -1.0, 0.2, 0.28, 0.8),
])  # fmt: skip
def test_each_clip_acts_on_its_own_side(
    ratio: float, advantage: float, clip_low: float, clip_high: float, expected: float
) -> None:
    loss, _ = clipped_policy_loss(*single(ratio, advantage), clip_low=clip_low, clip_high=clip_high)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_clipped_loss_against_a_loop() -> None:
    logprobs, old, advantages, mask, denominator = random_case()
    total, low, high, divergence = 0.0, 0, 0, 0.0
    for i, t in mask.nonzero().tolist():
        ratio, advantage = math.exp(logprobs[i, t] - old[i, t]), advantages[i, t].item()
        total += max(-ratio * advantage, -min(max(ratio, 0.9), 1.3) * advantage)
        low, high = low + (ratio < 0.9 and advantage < 0), high + (ratio > 1.3 and advantage > 0)
        divergence += ratio - 1 - math.log(ratio)
    loss, metrics = clipped_policy_loss(logprobs, old, advantages, mask, denominator, clip_low=0.1, clip_high=0.3)
    kept = mask.sum().item()
    assert low > 0 and high > 0 and low != high
    expected = {"low_mean": low / kept, "high_mean": high / kept, "region_mean": (low + high) / kept}
    assert loss.item() == pytest.approx(total / 13, abs=1e-9)
    assert {name: metrics[f"clip_ratio/{name}"].item() for name in expected} == pytest.approx(expected, abs=1e-6)
    assert metrics["approx_kl"].item() == pytest.approx(divergence / kept, abs=1e-9)
    swapped = clipped_policy_loss(logprobs, old, advantages, mask, denominator, clip_low=0.3, clip_high=0.1)[0]
    assert not torch.allclose(swapped, loss) and not torch.allclose(-loss, loss)
    per_row = clipped_policy_loss(logprobs, old, advantages[:, :1], mask, denominator)[0]
    torch.testing.assert_close(
        per_row, clipped_policy_loss(logprobs, old, advantages[:, :1].repeat(1, 6), mask, denominator)[0]
    )


def test_aggregation_of_two_rows_at_ratio_one() -> None:
    """Row A: advantage +1, 2 tokens; row B: advantage -1, 8 tokens."""
    mask = torch.arange(10) < torch.tensor([[2], [8]])
    logprobs = torch.full((2, 10), -1.0, dtype=DOUBLE)
    advantages = torch.tensor([[1.0], [-1.0]], dtype=DOUBLE).expand(2, 10)
    per_row = mask / mask.sum(1, keepdim=True).to(DOUBLE)
    for weights, denominator, expected in ((mask, 10, 0.6), (per_row, 2, 0.0), (mask, 20, 0.3)):
        assert clipped_policy_loss(logprobs, logprobs, advantages, weights, denominator)[0].item() == pytest.approx(
            expected, abs=1e-12
        )
    assert sequence_clipped_policy_loss(logprobs, logprobs, advantages, mask, 2)[0].item() == pytest.approx(
        0.0, abs=1e-12
    )


@pytest.mark.parametrize("function", [clipped_policy_loss, dual_clipped, cispo])
def test_gradient_at_ratio_one_is_the_policy_gradient(function: Loss) -> None:
    logprobs, _, advantages, mask, denominator = random_case()
    leaf = logprobs.clone().requires_grad_()
    loss, metrics = function(leaf, logprobs, advantages, mask, denominator)
    torch.testing.assert_close(gradient(loss, leaf), -(advantages * mask) / 13, atol=1e-12, rtol=0)
    assert metrics["approx_kl"] == 0


def test_sequence_ratio_hand_numbers() -> None:
    ratios = torch.tensor([[1.1, 0.95, 1.3, 0.9, math.nan]], dtype=DOUBLE)
    mask, old = ~ratios.isnan(), torch.full((1, 5), -2.0, dtype=DOUBLE)
    logprobs = (old + ratios.log()).requires_grad_()
    advantages = torch.ones(1, 5, dtype=DOUBLE)
    mean_ratio = (1.1 * 0.95 * 1.3 * 0.9) ** (1 / 4)
    assert mean_ratio == pytest.approx(1.051539, abs=1e-6)
    loss, metrics = sequence_clipped_policy_loss(logprobs, old, advantages, mask, 1)
    assert loss.item() == pytest.approx(-mean_ratio, abs=1e-12) and metrics["clip_ratio/region_mean"] == 0
    expected = torch.tensor([[-mean_ratio / 4] * 4 + [0.0]], dtype=DOUBLE)  # s / |y|, the same for every token
    torch.testing.assert_close(gradient(loss, logprobs), expected, atol=1e-12, rtol=0)
    assert not math.isclose(loss.item(), -1.1 * 0.95 * 1.3 * 0.9)  # the product ratio
    assert not math.isclose(loss.item(), -(1.1 + 0.95 + 1.3 + 0.9) / 4)  # the arithmetic mean
    loss, metrics = sequence_clipped_policy_loss(logprobs, old, advantages, mask, 1, clip_low=3e-4, clip_high=4e-4)
    assert loss.item() == pytest.approx(-1.0004, abs=1e-12) and metrics["clip_ratio/high_mean"] == 1
    assert gradient(loss, logprobs).abs().max() == 0


def test_sequence_loss_against_a_loop_with_an_empty_row() -> None:
    logprobs, old, advantages, mask, denominator = random_case(1)
    mask[2] = False
    total, high, low = 0.0, 0, 0
    for i in (0, 1, 3):
        kept = [(math.exp(logprobs[i, t] - old[i, t]), advantages[i, t].item()) for t in range(6) if mask[i, t]]
        ratio = math.prod(r for r, _ in kept) ** (1 / len(kept))
        advantage = sum(a for _, a in kept) / len(kept)
        total += max(-ratio * advantage, -min(max(ratio, 0.99), 1.01) * advantage)
        low, high = low + (ratio < 0.99 and advantage < 0), high + (ratio > 1.01 and advantage > 0)
    for weights in (mask, mask / mask.sum(1, keepdim=True).clamp(min=1).to(DOUBLE)):
        loss, metrics = sequence_clipped_policy_loss(
            logprobs, old, advantages, weights, denominator, clip_low=0.01, clip_high=0.01
        )
        assert loss.item() == pytest.approx(total / 13, abs=1e-9)
        assert metrics["clip_ratio/low_mean"].item() == pytest.approx(low / 3)
        assert metrics["clip_ratio/high_mean"].item() == pytest.approx(high / 3)
    assert low + high > 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("ratio", "weight"), [(1.5, 1.2), (1.1, 1.1), (0.5, 0.5)])
def test_cispo_caps_the_weight_and_keeps_the_gradient(ratio: float, weight: float, advantage: float) -> None:
    case = single(ratio, advantage)
    loss, metrics = cispo(*case)
    assert loss.item() == pytest.approx(-weight * advantage * (-1 + math.log(ratio)), abs=1e-12)
    assert gradient(loss, case[0]).item() == pytest.approx(
        -weight * advantage, abs=1e-12
    )  # a cap at clip_high itself would give 0.2
    assert metrics["cispo_clip_ratio"] == float(ratio > 1.2)


def test_cispo_against_a_loop() -> None:
    logprobs, old, advantages, mask, denominator = random_case()
    pairs = [
        (math.exp(logprobs[i, t] - old[i, t]), (advantages * logprobs)[i, t].item()) for i, t in mask.nonzero().tolist()
    ]
    loss, metrics = cispo(logprobs, old, advantages, mask, denominator)
    assert loss.item() == pytest.approx(-sum(min(ratio, 1.2) * product for ratio, product in pairs) / 13, abs=1e-9)
    assert metrics["cispo_clip_ratio"].item() == pytest.approx(
        sum(ratio > 1.2 for ratio, _ in pairs) / len(pairs), abs=1e-6
    )


def test_mirror_descent_hand_numbers() -> None:
    old = torch.tensor([[-0.5, -0.5], [-1.0, -1.0]], dtype=DOUBLE)
    logprobs = (old + torch.tensor([[0.15], [-0.1]], dtype=DOUBLE)).requires_grad_()  # row log-ratios .3 and -.2
    mask, rewards, group = (
        torch.ones(2, 2, dtype=torch.bool),
        torch.tensor([1.0, 0.0], dtype=DOUBLE),
        torch.tensor([4, 4]),
    )
    loss, metrics = mirror_descent_loss(logprobs, old, mask, rewards, group, tau=0.7)
    # rows: -.5 * -.7 + .35 * .09 = .3815;  .5 * -2.2 + .35 * .04 = -1.086
    assert loss.item() == pytest.approx((0.3815 - 1.086) / 2, abs=1e-12)
    expected = torch.tensor([[-0.145, -0.145], [0.18, 0.18]], dtype=DOUBLE)  # (-(r - mean) + tau * log-ratio) / 2
    torch.testing.assert_close(gradient(loss, logprobs), expected, atol=1e-12, rtol=0)
    assert metrics["approx_kl"].item() == pytest.approx(
        ((math.exp(0.15) - 1.15) + (math.exp(-0.1) - 0.9)) / 2, abs=1e-12
    )
    first, _ = mirror_descent_loss(logprobs, logprobs.detach(), mask, rewards, group, tau=0.7)
    torch.testing.assert_close(
        gradient(first, logprobs), torch.tensor([[-0.25] * 2, [0.25] * 2], dtype=DOUBLE), atol=1e-12, rtol=0
    )


def test_mirror_descent_against_a_loop_and_an_unscorable_row() -> None:
    logprobs, old, _, mask, _ = random_case()
    rewards = torch.tensor([1.0, 0.0, math.nan, 2.0], dtype=DOUBLE)
    centered = (0.5, -0.5, 0.0, 0.0)  # group 8 has one scorable row left
    total = 0.0
    for i in range(4):
        now, before = (sum(x[i, t].item() for t in range(6) if mask[i, t]) for x in (logprobs, old))
        total += -centered[i] * now + 0.3 / 2 * (now - before) ** 2
    loss = mirror_descent_loss(logprobs, old, mask, rewards, GROUP, tau=0.3)[0]
    assert loss.item() == pytest.approx(total / 4, abs=1e-9)
    token_wise = 0.15 * ((logprobs - old) * mask).square().sum(1) - torch.tensor(centered, dtype=DOUBLE) * (
        logprobs * mask
    ).sum(1)
    assert not torch.allclose(loss, token_wise.mean())
    assert torch.equal(loss, mirror_descent_loss(logprobs, old, mask, rewards, GROUP * -7, tau=0.3)[0])


@pytest.mark.parametrize("function", LOSSES)
def test_masked_columns_reach_neither_loss_nor_metrics_nor_gradient(function: Loss) -> None:
    logprobs, old, advantages, mask, denominator = random_case()
    clean = logprobs.clone().requires_grad_()
    reference, reference_metrics = function(clean, old, advantages, mask, denominator)
    expected = gradient(reference, clean)
    for bad in (math.nan, math.inf, -math.inf):
        leaf, dirty_old, dirty_advantages = (x.masked_fill(~mask, bad) for x in (logprobs, old, advantages))
        before = [x.clone() for x in (leaf, dirty_old, dirty_advantages, mask)]
        with torch.autograd.set_detect_anomaly(True):  # raises for a NaN anywhere on the way back
            loss, metrics = function(leaf.requires_grad_(), dirty_old, dirty_advantages, mask, denominator)
            torch.testing.assert_close(gradient(loss, leaf), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(loss, reference, atol=1e-12, rtol=0)
        assert metrics == reference_metrics and not any(x.requires_grad for x in metrics.values())
        torch.testing.assert_close(
            [leaf.detach(), dirty_old, dirty_advantages, mask], before, atol=0, rtol=0, equal_nan=True
        )
    assert (expected[~mask] == 0).all() and (expected[mask] != 0).any()


@pytest.mark.parametrize("function", LOSSES)
def test_padding_gradcheck_and_row_order(function: Loss) -> None:
    logprobs, old, advantages, mask, denominator = random_case()
    reference = function(logprobs, old, advantages, mask, denominator)[0]
    now, before, wide_advantages = (pad(x, (0, 3), value=math.nan) for x in (logprobs, old, advantages))
    torch.testing.assert_close(
        function(now, before, wide_advantages, pad(mask, (0, 3)), denominator)[0], reference, atol=1e-12, rtol=0
    )
    if function is mirror_descent:
        order = torch.tensor([2, 3, 0, 1])
        swapped = mirror_descent_loss(logprobs[order], old[order], mask[order], REWARDS[order], GROUP[order], tau=0.3)[
            0
        ]
    else:
        order = torch.tensor([2, 0, 3, 1])
        swapped = function(logprobs[order], old[order], advantages[order], mask[order], denominator)[0]
    torch.testing.assert_close(swapped, reference, atol=1e-12, rtol=0)
    if function is not cispo:  # its weight is a constant by definition, which finite differences cannot know
        assert torch.autograd.gradcheck(
            lambda x: function(x, old, advantages, mask, denominator)[0], (logprobs.requires_grad_(),)
        )


@pytest.mark.parametrize("function", ADVANTAGE_LOSSES)
def test_micro_batches_add_up_and_an_empty_one_gives_zero(function: Loss) -> None:
    logprobs, old, advantages, mask, denominator = random_case()
    whole = function(logprobs, old, advantages, mask, denominator)[0]
    first = function(logprobs[:1], old[:1], advantages[:1], mask[:1], denominator)[0]
    others = function(logprobs[1:], old[1:], advantages[1:], mask[1:], denominator)[0]
    torch.testing.assert_close(first + others, whole, atol=1e-12, rtol=0)
    leaf = logprobs.clone().requires_grad_()
    empty = function(leaf, old, advantages, torch.zeros_like(mask), denominator * 0)[0]
    assert empty == 0 and (gradient(empty, leaf) == 0).all()


def test_equal_rewards_give_no_gradient() -> None:
    logprobs, old, _, mask, denominator = random_case()
    advantages = group_center(torch.full((4,), 0.1, dtype=DOUBLE), GROUP)[:, None].expand(4, 6)
    for function in ADVANTAGE_LOSSES:
        leaf = logprobs.clone().requires_grad_()
        assert (gradient(function(leaf, old, advantages, mask, denominator)[0], leaf) == 0).all()


def test_errors_say_what_is_wrong() -> None:
    logprobs, old, advantages, mask, denominator = random_case()
    with pytest.raises(ValueError, match="dual_clip is 1.0"):
        clipped_policy_loss(logprobs, old, advantages, mask, denominator, dual_clip=1.0)
    for function in ADVANTAGE_LOSSES:
        with pytest.raises(ValueError, match=r"\[N, 1\]"):
            function(logprobs, old, advantages[:, 0], mask, denominator)
    with pytest.raises(ValueError, match="shapes"):
        mirror_descent_loss(logprobs, old[:, :-1], mask, REWARDS, GROUP, tau=0.3)


def test_an_overflowing_ratio_without_advantage_adds_nothing():
    now = torch.tensor([[500.0, -1.0]], requires_grad=True)  # exp(500) is inf in float32
    loss, metrics = clipped_policy_loss(
        now, torch.tensor([[-1.0, -1.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool), 2.0
    )
    (gradient,) = torch.autograd.grad(loss, now)
    assert loss.item() == -0.5
    assert gradient.tolist() == [[0.0, -0.5]]


def test_ratio_moments_hand_numbers() -> None:
    ratios = torch.tensor([[1.5, math.nan, 0.8], [1.0, 0.9, math.inf]], dtype=DOUBLE)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    old = torch.full((2, 3), -2.0, dtype=DOUBLE)
    moments = ratio_moments((old + ratios.log()).requires_grad_(), old, mask)
    # mean 4.2 / 4; squares .25 + .04 + 0 + .01; deviations .5 + .2 + 0 + .1
    expected = {"ratio/mean": 1.05, "ratio/square": 0.075, "ratio/deviation": 0.2}
    assert {name: value.item() for name, value in moments.items()} == pytest.approx(expected, abs=1e-12)
    assert not any(value.requires_grad or value.dim() for value in moments.values())
    variance = sum((r - 1.05) ** 2 for r in (1.5, 0.8, 1.0, 0.9)) / 4
    assert (moments["ratio/square"] - (moments["ratio/mean"] - 1) ** 2).item() == pytest.approx(variance, abs=1e-12)


def test_ratio_moments_against_a_loop_over_micro_batches() -> None:
    logprobs, old, _, mask, _ = random_case()
    ratios = [math.exp(logprobs[i, t] - old[i, t]) for i, t in mask.nonzero().tolist()]
    expected = [sum(ratios), sum((r - 1) ** 2 for r in ratios), sum(abs(r - 1) for r in ratios)]
    parts = [(ratio_moments(logprobs[i], old[i], mask[i]), mask[i].sum()) for i in (slice(0, 1), slice(1, 4))]
    for name, total in zip(("ratio/mean", "ratio/square", "ratio/deviation"), expected, strict=True):
        whole = ratio_moments(logprobs, old, mask)[name]
        assert whole.item() == pytest.approx(total / len(ratios), abs=1e-12)
        assert sum((part[name] * kept).item() for part, kept in parts) == pytest.approx(total, abs=1e-12)
        assert ratio_moments(old, logprobs, mask)[name].item() != pytest.approx(
            whole.item(), abs=1e-3
        )  # the direction matters
        float_weights = mask / mask.sum(1, keepdim=True)
        torch.testing.assert_close(ratio_moments(logprobs, old, float_weights)[name], whole, atol=1e-12, rtol=0)
    nothing = ratio_moments(logprobs, old, torch.zeros_like(mask))
    assert [value.item() for value in nothing.values()] == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="shapes"):
        ratio_moments(logprobs, old[:, :-1], mask)
