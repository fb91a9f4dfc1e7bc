"""The policy objectives: numbers by hand, loops over tokens, gradients, limits, splits, masked
columns.
"""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from modules.functional.advantages import group_center
from modules.losses import (
    CISPO,
    DPPO,
    GSPO,
    REINFORCE,
    RLOO,
    SAPO,
    Centered,
    Clip,
    Clipped,
    ConstantNorm,
    GSPOToken,
    LeaveOneOut,
    MirrorDescent,
    PolicyObjective,
    REINFORCEPlusPlus,
    SequenceMean,
    SequenceSum,
    TokenMean,
    ZScore,
)
from modules.losses.policy import Metrics, leave_out_unscored, measure_ratio

DOUBLE = torch.float64
REWARDS, GROUP = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=DOUBLE), torch.tensor([3, 3, 8, 8])


Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # logprobs, old_logprobs, advantages, mask, denominator


def take(
    objective: PolicyObjective,
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: Tensor | float,
    sampled: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Compute the loss of a micro-batch that holds only what an objective may read."""
    batch: Any = {
        "old_logprobs": old,
        "sampler_logprobs": old if sampled is None else sampled,
        "advantages": advantages,
        "completion_mask": mask,
        "denominator": torch.as_tensor(denominator, dtype=DOUBLE),
    }
    return objective(logprobs, batch)


OBJECTIVES: list[PolicyObjective] = [
    Clipped(0.2, 0.2),
    Clipped(0.2, 0.2, dual_clip=1.5),
    GSPO(0.2, 0.2),
    GSPOToken(0.2, 0.2),
    CISPO(0.2),
    REINFORCE(),
    RLOO(),
    REINFORCEPlusPlus(),
    SAPO(),
    DPPO(0.1),
    MirrorDescent(0.3),
]
WITH_CONSTANTS = (CISPO, GSPOToken, DPPO)  # they hold weights without gradient, which finite differences do not know
each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)


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
    loss, metrics = take(Clipped(0.2, 0.2, dual_clip), *case)
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
    loss, _ = take(Clipped(clip_low, clip_high), *single(ratio, advantage))
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_clipped_loss_against_a_loop() -> None:
    logprobs, old, advantages, mask, denominator = random_case()
    total, low, high, divergence = 0.0, 0, 0, 0.0
    for i, t in mask.nonzero().tolist():
        ratio, advantage = math.exp(logprobs[i, t] - old[i, t]), advantages[i, t].item()
        total += max(-ratio * advantage, -min(max(ratio, 0.9), 1.3) * advantage)
        low, high = low + (ratio < 0.9 and advantage < 0), high + (ratio > 1.3 and advantage > 0)
        divergence += ratio - 1 - math.log(ratio)
    loss, metrics = take(Clipped(0.1, 0.3), logprobs, old, advantages, mask, denominator)
    kept = mask.sum().item()
    assert low > 0 and high > 0 and low != high
    expected = {"low_mean": low / kept, "high_mean": high / kept, "region_mean": (low + high) / kept}
    assert loss.item() == pytest.approx(total / 13, abs=1e-9)
    assert {name: metrics[f"clip_ratio/{name}"].item() for name in expected} == pytest.approx(expected, abs=1e-6)
    assert metrics["approx_kl"].item() == pytest.approx(divergence / kept, abs=1e-9)
    swapped = take(Clipped(0.3, 0.1), logprobs, old, advantages, mask, denominator)[0]
    assert not torch.allclose(swapped, loss) and not torch.allclose(-loss, loss)
    per_row = take(Clipped(), logprobs, old, advantages[:, :1], mask, denominator)[0]
    spread = take(Clipped(), logprobs, old, advantages[:, :1].repeat(1, 6), mask, denominator)[0]
    torch.testing.assert_close(per_row, spread)


def test_aggregation_of_two_rows_at_ratio_one() -> None:
    """Row A: advantage +1, 2 tokens; row B: advantage -1, 8 tokens."""
    mask = torch.arange(10) < torch.tensor([[2], [8]])
    logprobs = torch.full((2, 10), -1.0, dtype=DOUBLE)
    advantages = torch.tensor([[1.0], [-1.0]], dtype=DOUBLE).expand(2, 10)
    for aggregation, denominator, expected in (
        (TokenMean(), 10, 0.6),  # (-2 + 8) / 10
        (SequenceMean(), 2, 0.0),  # (-1 + 1) / 2
        (ConstantNorm(10), 20, 0.3),  # (-2 + 8) / 20
    ):
        assert aggregation.row_count(mask).sum() == denominator
        for objective in (Clipped(aggregation=aggregation), CISPO(aggregation=aggregation)):
            loss = take(objective, logprobs, logprobs, advantages, mask, denominator)[0]
            # at ratio 1 CISPO's value is -A logprob, and all log-probs are -1
            assert loss.item() == pytest.approx(expected * (-1 if isinstance(objective, CISPO) else 1), abs=1e-12)
    loss = take(GSPO(), logprobs, logprobs, advantages, mask, 2)[0]
    assert loss.item() == pytest.approx(0.0, abs=1e-12) and GSPO().aggregation.row_count(mask).sum() == 2


def test_defaults_are_the_papers() -> None:
    mask = torch.arange(5) < torch.tensor([[2], [5]])
    assert [type(objective.aggregation) for objective in (Clipped(), GSPO(), CISPO())] == [
        TokenMean,
        SequenceMean,
        TokenMean,
    ]
    assert MirrorDescent().aggregation.row_count(mask).tolist() == [1, 1]  # the mean over completions
    assert (Clipped().clip_low, Clipped().clip_high, Clipped().dual_clip) == (0.2, 0.28, None)
    assert (GSPO().clip_low, GSPO().clip_high, 1 + CISPO().clip_high) == (3e-4, 4e-4, 5)
    assert Clip() == Clip(0.2, None, 0.2)
    defaults = [type(objective.default_advantage()) for objective in (Clipped(), GSPO(), CISPO(), MirrorDescent())]
    assert defaults == [ZScore, ZScore, ZScore, Centered]
    assert [type(objective.default_advantage()) for objective in (REINFORCE(), RLOO(), SAPO(), DPPO())] == [
        Centered,
        LeaveOneOut,
        ZScore,
        ZScore,
    ]
    assert [
        type(objective.aggregation) for objective in (REINFORCE(), RLOO(), SAPO(), DPPO(), REINFORCEPlusPlus())
    ] == [
        SequenceSum,
        SequenceSum,
        SequenceMean,
        TokenMean,
        TokenMean,
    ]
    assert [REINFORCEPlusPlus(baseline).default_advantage().least_generations for baseline in (False, True)] == [1, 2]


@pytest.mark.parametrize(
    "objective",
    [
        Clipped(),
        Clipped(dual_clip=1.5),
        CISPO(),
        REINFORCE(),
        REINFORCE(TokenMean()),
        REINFORCEPlusPlus(),
        SAPO(aggregation=TokenMean()),
        DPPO(),
        MirrorDescent(),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_gradient_at_ratio_one_is_the_policy_gradient(objective: PolicyObjective) -> None:
    logprobs, _, advantages, mask, denominator = random_case()
    leaf = logprobs.clone().requires_grad_()
    loss, metrics = take(objective, leaf, logprobs, advantages, mask, denominator)
    torch.testing.assert_close(gradient(loss, leaf), -(advantages * mask) / 13, atol=1e-12, rtol=0)
    assert metrics["approx_kl"] == 0


def test_gradient_of_the_sequence_ratio_at_one_is_the_policy_gradient() -> None:
    logprobs, _, advantages, mask, denominator = random_case()
    leaf, of_row = logprobs.clone().requires_grad_(), advantages[:, :1]
    loss, _ = take(RLOO(), leaf, logprobs, of_row, mask, denominator)
    torch.testing.assert_close(gradient(loss, leaf), -(of_row * mask) / 13, atol=1e-12, rtol=0)


def loss_and_gradient_of_tokens(
    objective: PolicyObjective, r: float, logp: float, a: float, length: int
) -> tuple[float, float]:
    """What one token adds to the sum before the denominator, and its derivative by the token's log-prob."""
    if isinstance(objective, REINFORCE):
        return -a * logp, -a
    if isinstance(objective, SAPO):
        tau = 1.0 if a > 0 else 1.05
        s = 1 / (1 + math.exp(-tau * (r - 1)))
        return -4 / tau * s * a / length, -4 * s * (1 - s) * r * a / length
    assert isinstance(objective, DPPO)
    p, q = math.exp(logp), math.exp(logp) / r
    dropped = (a > 0 and p - q > 0.1) or (a < 0 and p - q < -0.1)
    weight = 0.0 if dropped else min(r, 20.0)
    return -weight * a * logp, -weight * a


@pytest.mark.parametrize("objective", [REINFORCE(), SAPO(), DPPO(0.1)], ids=lambda objective: type(objective).__name__)
def test_token_losses_and_gradients_against_a_loop(objective: PolicyObjective) -> None:
    logprobs, old, advantages, mask, denominator = random_case(2)
    total, expected = 0.0, torch.zeros_like(logprobs)
    for i, t in mask.nonzero().tolist():
        ratio = math.exp(logprobs[i, t] - old[i, t])
        given = ratio, logprobs[i, t].item(), advantages[i, t].item(), int(mask[i].sum())
        loss, slope = loss_and_gradient_of_tokens(objective, *given)
        total, expected[i, t] = total + loss, slope / 13
    leaf = logprobs.clone().requires_grad_()
    loss_of_all, metrics = take(objective, leaf, old, advantages, mask, denominator)
    assert loss_of_all.item() == pytest.approx(total / 13, abs=1e-8)
    torch.testing.assert_close(gradient(loss_of_all, leaf), expected, atol=1e-8, rtol=0)  # 1 / length is in float32
    if isinstance(objective, DPPO):
        assert metrics["dropped"].item() == pytest.approx((expected[mask] == 0).double().mean().item())
        assert 0 < metrics["dropped"] < 1


@pytest.mark.parametrize("objective", [RLOO(0.2, 0.3), GSPOToken(0.05, 0.1)], ids=lambda each: type(each).__name__)
def test_sequence_losses_and_gradients_against_a_loop(objective: Any) -> None:
    logprobs, old, advantages, mask, denominator = random_case(3)
    total, expected, cuts = 0.0, torch.zeros_like(logprobs), 0
    for i in range(4):
        kept = [t for t in range(6) if mask[i, t]]
        sums = sum((logprobs - old)[i, t].item() for t in kept)
        ratio = math.exp(sums if isinstance(objective, RLOO) else sums / len(kept))
        clipped = min(max(ratio, 1 - objective.clip_low), 1 + objective.clip_high)
        for t in kept:
            own = isinstance(objective, GSPOToken)  # it takes each token's advantage, RLOO the mean of the row
            a = (advantages[i, t] if own else sum(advantages[i, u] for u in kept) / len(kept)).item()
            cut = -clipped * a > -ratio * a
            cuts += cut
            # RLOO's ratio has slope 1 in every log-prob, GSPOToken's in its own alone; a row counts once in both.
            total += max(-ratio * a, -clipped * a) / len(kept)
            expected[i, t] = 0.0 if cut else -ratio * a / (len(kept) if own else 1) / 13
    leaf = logprobs.clone().requires_grad_()
    loss, _ = take(objective, leaf, old, advantages, mask, denominator)
    assert cuts > 0 and loss.item() == pytest.approx(total / 13, abs=1e-8)
    torch.testing.assert_close(gradient(loss, leaf), expected, atol=1e-8, rtol=0)


def test_gspo_token_is_gspo_where_a_completion_has_one_advantage() -> None:
    logprobs, old, advantages, mask, denominator = random_case()
    found = []
    for objective in (GSPO(0.1, 0.1), GSPOToken(0.1, 0.1)):
        leaf = logprobs.clone().requires_grad_()
        loss, _ = take(objective, leaf, old, advantages[:, :1], mask, denominator)
        found.append((loss.detach(), gradient(loss, leaf)))
    torch.testing.assert_close(found[0], found[1], atol=1e-8, rtol=0)
    whole = take(GSPOToken(0.1, 0.1), logprobs, old, advantages, mask, denominator)[0]
    assert not torch.allclose(whole, take(GSPO(0.1, 0.1), logprobs, old, advantages, mask, denominator)[0])


def test_sapo_hand_numbers() -> None:
    for ratio, advantage, loss_of_it, slope in (
        # sigma(.5) = .622459; -4 x .622459;  -4 x .622459 x .377541 x 1.5
        (1.5, 1.0, -2.489837, -1.410022),
        # sigma(1.05 x .5) = .628316;  4 / 1.05 x .628316;  4 x .628316 x .371684 x 1.5
        (1.5, -1.0, 2.393585, 1.401210),
    ):
        case = single(ratio, advantage)
        loss, metrics = take(SAPO(), *case)
        assert loss.item() == pytest.approx(loss_of_it, abs=1e-5)
        assert gradient(loss, case[0]).item() == pytest.approx(slope, abs=1e-5)
        assert metrics["gate"].item() == pytest.approx(abs(slope) / 1.5, abs=1e-5)
    case = single(1.0, 1.0)
    far, _ = take(SAPO(), case[0] + 800, *case[1:])  # exp(800) is inf
    assert far.item() == pytest.approx(-4.0) and gradient(far, case[0]).item() == 0.0


@pytest.mark.parametrize(
    ("now", "sampled", "advantage", "slope"),
    [
        (0.9, 0.5, 1.0, 0.0),  # .4 above: dropped
        (0.9, 0.5, -1.0, 1.8),  # A pulls it back: kept, .9 / .5
        (0.52, 0.5, 1.0, -1.04),
        (0.2, 0.5, -1.0, 0.0),
        (0.1, 1e-4, 1.0, -20.0),  # the ratio is 1000, and p - q only .0999
    ],
)
def test_dppo_hand_numbers(now: float, sampled: float, advantage: float, slope: float) -> None:
    leaf = torch.tensor([[math.log(now)]], dtype=DOUBLE, requires_grad=True)
    old, drawn = torch.tensor([[-9.0]], dtype=DOUBLE), torch.tensor([[math.log(sampled)]], dtype=DOUBLE)
    mask, advantages = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[advantage]], dtype=DOUBLE)
    loss, metrics = take(
        DPPO(), leaf, old, advantages, mask, 1, sampled=drawn
    )  # the trainer's old log-prob has no part
    assert gradient(loss, leaf).item() == pytest.approx(slope, abs=1e-12)
    assert metrics["dropped"] == (slope == 0)


def test_gspo_of_one_token_is_the_clipped_loss() -> None:
    logprobs, old, advantages, mask, denominator = random_case()
    first = torch.zeros_like(mask).index_fill(1, torch.tensor([0]), True)
    found = []
    for objective in (GSPO(0.1, 0.3), Clipped(0.1, 0.3)):
        leaf = logprobs.clone().requires_grad_()
        loss, metrics = take(objective, leaf, old, advantages, first, denominator)
        found.append((loss.detach(), gradient(loss, leaf), metrics))
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)
    assert take(GSPO(0.1, 0.3), logprobs, old, advantages, mask, denominator)[0] != found[0][0]  # of several it is not


def test_sequence_ratio_hand_numbers() -> None:
    ratios = torch.tensor([[1.1, 0.95, 1.3, 0.9, math.nan]], dtype=DOUBLE)
    mask, old = ~ratios.isnan(), torch.full((1, 5), -2.0, dtype=DOUBLE)
    logprobs = (old + ratios.log()).requires_grad_()
    advantages = torch.ones(1, 5, dtype=DOUBLE)
    mean_ratio = (1.1 * 0.95 * 1.3 * 0.9) ** (1 / 4)
    assert mean_ratio == pytest.approx(1.051539, abs=1e-6)
    loss, metrics = take(GSPO(0.2, 0.2), logprobs, old, advantages, mask, 1)
    assert loss.item() == pytest.approx(-mean_ratio, abs=1e-12) and metrics["clip_ratio/region_mean"] == 0
    expected = torch.tensor([[-mean_ratio / 4] * 4 + [0.0]], dtype=DOUBLE)  # s / |y|, the same for every token
    torch.testing.assert_close(gradient(loss, logprobs), expected, atol=1e-12, rtol=0)
    assert not math.isclose(loss.item(), -1.1 * 0.95 * 1.3 * 0.9)  # the product ratio
    assert not math.isclose(loss.item(), -(1.1 + 0.95 + 1.3 + 0.9) / 4)  # the arithmetic mean
    loss, metrics = take(GSPO(), logprobs, old, advantages, mask, 1)
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
    loss, metrics = take(GSPO(0.01, 0.01), logprobs, old, advantages, mask, denominator)
    assert loss.item() == pytest.approx(total / 13, abs=1e-9)
    assert metrics["clip_ratio/low_mean"].item() == pytest.approx(low / 3)
    assert metrics["clip_ratio/high_mean"].item() == pytest.approx(high / 3)
    assert low + high > 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("ratio", "weight"), [(1.5, 1.2), (1.1, 1.1), (0.5, 0.5)])
def test_cispo_caps_the_weight_and_keeps_the_gradient(ratio: float, weight: float, advantage: float) -> None:
    case = single(ratio, advantage)
    loss, metrics = take(CISPO(0.2), *case)
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
    loss, metrics = take(CISPO(0.2), logprobs, old, advantages, mask, denominator)
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
    advantages = group_center(rewards, group)[:, None]
    loss, metrics = take(MirrorDescent(0.7), logprobs, old, advantages, mask, 2)
    # rows: -.5 * -.7 + .35 * .09 = .3815;  .5 * -2.2 + .35 * .04 = -1.086
    assert loss.item() == pytest.approx((0.3815 - 1.086) / 2, abs=1e-12)
    expected = torch.tensor([[-0.145, -0.145], [0.18, 0.18]], dtype=DOUBLE)  # (-(r - mean) + tau * log-ratio) / 2
    torch.testing.assert_close(gradient(loss, logprobs), expected, atol=1e-12, rtol=0)
    assert metrics["approx_kl"].item() == pytest.approx(
        ((math.exp(0.15) - 1.15) + (math.exp(-0.1) - 0.9)) / 2, abs=1e-12
    )
    first, _ = take(MirrorDescent(0.7), logprobs, logprobs.detach(), advantages, mask, 2)
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
    advantages = group_center(rewards, GROUP)[:, None]
    loss = take(MirrorDescent(0.3), logprobs, old, advantages, mask, 4)[0]
    assert loss.item() == pytest.approx(total / 4, abs=1e-9)
    token_wise = 0.15 * ((logprobs - old) * mask).square().sum(1) - torch.tensor(centered, dtype=DOUBLE) * (
        logprobs * mask
    ).sum(1)
    assert not torch.allclose(loss, token_wise.mean())


@each_objective
def test_masked_columns_reach_neither_loss_nor_metrics_nor_gradient(objective: PolicyObjective) -> None:
    logprobs, old, advantages, mask, denominator = random_case()
    clean = logprobs.clone().requires_grad_()
    reference, reference_metrics = take(objective, clean, old, advantages, mask, denominator)
    expected = gradient(reference, clean)
    for bad in (math.nan, math.inf, -math.inf):
        leaf, dirty_old, dirty_advantages = (x.masked_fill(~mask, bad) for x in (logprobs, old, advantages))
        before = [x.clone() for x in (leaf, dirty_old, dirty_advantages, mask)]
        with torch.autograd.set_detect_anomaly(True):  # raises for a NaN anywhere on the way back
            loss, metrics = take(objective, leaf.requires_grad_(), dirty_old, dirty_advantages, mask, denominator)
            torch.testing.assert_close(gradient(loss, leaf), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(loss, reference, atol=1e-12, rtol=0)
        assert metrics == reference_metrics and not any(x.requires_grad for x in metrics.values())
        torch.testing.assert_close(
            [leaf.detach(), dirty_old, dirty_advantages, mask], before, atol=0, rtol=0, equal_nan=True
        )
    assert (expected[~mask] == 0).all() and (expected[mask] != 0).any()


@each_objective
def test_padding_gradcheck_and_row_order(objective: PolicyObjective) -> None:
    logprobs, old, advantages, mask, denominator = random_case()
    reference = take(objective, logprobs, old, advantages, mask, denominator)[0]
    now, before, wide_advantages = (pad(x, (0, 3), value=math.nan) for x in (logprobs, old, advantages))
    torch.testing.assert_close(
        take(objective, now, before, wide_advantages, pad(mask, (0, 3)), denominator)[0], reference, atol=1e-12, rtol=0
    )
    order = torch.tensor([2, 0, 3, 1])
    swapped = take(objective, logprobs[order], old[order], advantages[order], mask[order], denominator)[0]
    torch.testing.assert_close(swapped, reference, atol=1e-12, rtol=0)
    if not isinstance(objective, WITH_CONSTANTS):
        assert torch.autograd.gradcheck(
            lambda x: take(objective, x, old, advantages, mask, denominator)[0], (logprobs.requires_grad_(),)
        )


@each_objective
def test_micro_batches_add_up_and_an_empty_one_gives_zero(objective: PolicyObjective) -> None:
    logprobs, old, advantages, mask, denominator = random_case()
    whole = take(objective, logprobs, old, advantages, mask, denominator)[0]
    first = take(objective, logprobs[:1], old[:1], advantages[:1], mask[:1], denominator)[0]
    others = take(objective, logprobs[1:], old[1:], advantages[1:], mask[1:], denominator)[0]
    torch.testing.assert_close(first + others, whole, atol=1e-12, rtol=0)
    leaf = logprobs.clone().requires_grad_()
    empty = take(objective, leaf, old, advantages, torch.zeros_like(mask), denominator * 0)[0]
    assert empty == 0 and (gradient(empty, leaf) == 0).all()


def test_equal_rewards_give_no_gradient() -> None:
    logprobs, old, _, mask, denominator = random_case()
    advantages = group_center(torch.full((4,), 0.1, dtype=DOUBLE), GROUP)[:, None].expand(4, 6)
    for objective in OBJECTIVES[:-1]:  # the last has its square
        leaf = logprobs.clone().requires_grad_()
        assert (gradient(take(objective, leaf, old, advantages, mask, denominator)[0], leaf) == 0).all()


@each_objective
def test_shapes_that_do_not_fit_are_refused(objective: PolicyObjective) -> None:
    logprobs, old, advantages, mask, denominator = random_case()
    with pytest.raises(ValueError, match=r"\[N, 1\]"):
        take(objective, logprobs, old, advantages[:, 0], mask, denominator)
    with pytest.raises(ValueError, match="shapes"):
        take(objective, logprobs, old[:, :-1], advantages, mask, denominator)


WRONG = [
    (partial(Clipped, clip_low=-0.1), "Clipped: clip_low must be >= 0, got -0.1"),
    (partial(Clipped, clip_high=math.nan), "clip_high must be finite and >= 0, got nan"),
    (partial(Clipped, dual_clip=1.0), "dual_clip must be > 1, got 1.0"),
    (partial(GSPO, clip_high=math.inf), "GSPO: clip_high must be finite"),
    (partial(CISPO, clip_high=-1.0), "CISPO: clip_high must be >= 0"),
    (partial(RLOO, clip_low=-1.0), "RLOO: clip_low must be >= 0"),
    (partial(SAPO, tau_positive=0.0), "SAPO: tau_positive must be > 0"),
    (partial(DPPO, delta=0.0), "DPPO: delta must be > 0 and <= 1"),
    (partial(MirrorDescent, tau=math.nan), "MirrorDescent: tau must be finite and >= 0"),
    (partial(ConstantNorm, 0), "max_length must be >= 1, got 0"),
    (partial(Clip, ratio=math.nan), "clip: ratio must be finite"),
    (partial(Clip, dual=1.0), "clip: dual must be > 1"),
    (partial(Clip, value=0.0), "clip: value must be > 0"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_values_out_of_range_are_refused(make: partial[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_overflowing_ratio_without_advantage_adds_nothing() -> None:
    now = torch.tensor([[500.0, -1.0]], requires_grad=True)  # exp(500) is inf in float32
    old, advantages = torch.tensor([[-1.0, -1.0]]), torch.tensor([[0.0, 1.0]])
    loss, metrics = take(Clipped(), now, old, advantages, torch.ones(1, 2, dtype=torch.bool), 2.0)
    (gradient,) = torch.autograd.grad(loss, now)
    assert loss.item() == -0.5
    assert gradient.tolist() == [[0.0, -0.5]]


def moments_of(logprobs: Tensor, old: Tensor, mask: Tensor) -> Metrics:
    batch: Any = {"old_logprobs": old, "completion_mask": mask}
    return measure_ratio(logprobs, batch)


def test_ratio_moments_hand_numbers() -> None:
    ratios = torch.tensor([[1.5, math.nan, 0.8], [1.0, 0.9, math.inf]], dtype=DOUBLE)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    old = torch.full((2, 3), -2.0, dtype=DOUBLE)
    moments = moments_of((old + ratios.log()).requires_grad_(), old, mask)
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
    parts = [(moments_of(logprobs[i], old[i], mask[i]), mask[i].sum()) for i in (slice(0, 1), slice(1, 4))]
    for name, total in zip(("ratio/mean", "ratio/square", "ratio/deviation"), expected, strict=True):
        whole = moments_of(logprobs, old, mask)[name]
        assert whole.item() == pytest.approx(total / len(ratios), abs=1e-12)
        assert sum((part[name] * kept).item() for part, kept in parts) == pytest.approx(total, abs=1e-12)
        assert moments_of(old, logprobs, mask)[name].item() != pytest.approx(
            whole.item(), abs=1e-3
        )  # the direction matters
    nothing = moments_of(logprobs, old, torch.zeros_like(mask))
    assert [value.item() for value in nothing.values()] == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="shapes"):
        moments_of(logprobs, old[:, :-1], mask)


def test_completions_without_a_score_have_no_tokens_to_learn_from() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    batch: Any = {"completion_mask": mask, "rewards": torch.tensor([math.nan, 0.0])}
    assert leave_out_unscored(batch)["completion_mask"].tolist() == [[False, False], [True, True]]
    assert batch["completion_mask"] is mask and mask[0, 0]
