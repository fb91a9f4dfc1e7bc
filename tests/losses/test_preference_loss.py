"""Losses on preferences: numbers by hand, loops over single pairs, limits, signs, and the pairs themselves."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.losses import (
    IPO,
    KTO,
    ORPO,
    Hinge,
    LengthDesensitized,
    LengthMargin,
    LengthNormalized,
    PairObjective,
    Robust,
    Sigmoid,
    SimPO,
)
from modules.losses.preference import BradleyTerry, Pairs, Sequences, find_pairs

DOUBLE = torch.float64
Loss = Callable[
    [Tensor, Tensor, Tensor, Tensor], Tensor
]  # policy_chosen, policy_rejected, ref_chosen, ref_rejected -> [N]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def softplus(x: float) -> float:
    """Return -log sigma(-x)."""
    return math.log1p(math.exp(x))


# h = (-10 + 11) - (-14 + 12) = 3; |y_w| = 5, |y_l| = 10
PAIR = f64(-10), f64(-14), f64(-11), f64(-12)
LENGTHS = f64(5), f64(10)
PER_TOKEN = f64(-10 / 5), f64(-14 / 10), f64(-11 / 5), f64(-12 / 10)


def sequences(logps: Tensor, ref_logps: Tensor, lengths: Tensor) -> Sequences:
    return Sequences(logps, ref_logps, lengths, logps)


def through(objective: PairObjective, beta: float) -> Loss:
    """Write the objective as a function of four log-probs, of completions with 5 and 10 tokens."""

    def loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        better, worse = sequences(chosen, ref_chosen, LENGTHS[0]), sequences(rejected, ref_rejected, LENGTHS[1])
        return objective.losses(better, worse, beta)

    return loss


def of_h(loss: Loss, h: Tensor) -> Tensor:
    """Write the loss as a function of h [N] alone."""
    zero = torch.zeros_like(h)
    return loss(h, zero, zero, zero)


dpo = through(Sigmoid(), 0.1)
conservative = through(Sigmoid(0.1), 0.1)
robust = through(Robust(0.1), 0.1)
ipo = through(IPO(), 0.1)
ipo_of_means = through(IPO(average=True), 0.1)
hinge = through(Hinge(), 0.1)
length_normalized = through(LengthNormalized(), 5.0)
length_margin = through(LengthMargin(0.01), 0.1)

REFERENCED = {
    "dpo": dpo,
    "conservative": conservative,
    "robust": robust,
    "ipo": ipo,
    "ipo_of_means": ipo_of_means,
    "hinge": hinge,
    "length_normalized": length_normalized,
    "length_margin": length_margin,
}


def of_means(objective: PairObjective, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Write a loss without a reference as a function of mean log-probs."""
    one = torch.ones((), dtype=chosen.dtype)
    return objective.losses(sequences(chosen, 0 * chosen, one), sequences(rejected, 0 * rejected, one), beta)


def orpo_odds(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return ORPO's loss without its likelihood term -chosen."""
    return of_means(ORPO(), chosen, rejected, beta=1.0) + chosen


def kto(
    logps: Tensor, ref_logps: Tensor, desirable: Tensor, kl: Tensor, beta: float, weights: tuple[float, float] = (1, 1)
) -> Tensor:
    return KTO(*weights).losses(sequences(logps, ref_logps, torch.ones(())), desirable, beta, kl)


def pairs_of_ranks(prompt_index: Tensor, rank: Tensor) -> Pairs:
    batch: Any = {"prompt_index": prompt_index, "rank": rank}
    return find_pairs(batch)


def ranking(rewards: Tensor) -> Tensor:
    """Compute InstructGPT's eq. 1 for one prompt, the best completion first: Bradley-Terry over its pairs."""
    pairs = pairs_of_ranks(torch.zeros(len(rewards), dtype=torch.long), torch.arange(len(rewards)))
    return (BradleyTerry().losses(rewards[pairs.better], rewards[pairs.worse]) * pairs.weight).sum()


def test_bradley_terry_golden_numbers() -> None:
    one, two, zero = f64(1), f64(2), f64(0)
    for value, sheet, arithmetic in [
        (BradleyTerry().losses(two, one), 0.313262, softplus(-1)),
        (BradleyTerry().losses(one, one), 0.693147, math.log(2)),
        (BradleyTerry().losses(one, zero, margin=f64(1 / 3)), 0.414370, softplus(-(1 - 1 / 3))),
        (BradleyTerry(0.01).losses(two, one), 0.403262, softplus(-1) + 0.01 * (2 + 1) ** 2),
    ]:
        assert value.shape == (1,)
        assert value.item() == pytest.approx(sheet, abs=1e-6)
        assert value.item() == pytest.approx(arithmetic, abs=1e-9)
    added_margin = softplus(-(1 + 1 / 3))
    assert abs(BradleyTerry().losses(one, zero, margin=f64(1 / 3)).item() - added_margin) > 0.1


def test_bradley_terry_invariance_and_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margin = torch.randn(3, 6, generator=generator, dtype=DOUBLE)
    rows = torch.stack([chosen, rejected, margin], dim=1).tolist()
    expected = [softplus(-(better - worse - m)) + 0.3 * (better + worse) ** 2 for better, worse, m in rows]
    torch.testing.assert_close(BradleyTerry(0.3).losses(chosen, rejected, margin), f64(*expected), atol=1e-9, rtol=0)
    plain = BradleyTerry().losses(chosen, rejected)
    torch.testing.assert_close(BradleyTerry().losses(chosen + 7, rejected + 7), plain, atol=1e-9, rtol=0)
    # (w + l + 2c)^2 - (w + l)^2 = 4 c (w + l) + 4 c^2, c = 7
    shift = BradleyTerry(0.01).losses(chosen + 7, rejected + 7) - BradleyTerry(0.01).losses(chosen, rejected)
    torch.testing.assert_close(shift, 0.01 * (28 * (chosen + rejected) + 196), atol=1e-9, rtol=0)


def test_a_ranking_golden_number_loop_and_order() -> None:
    value = ranking(f64(2, 1, 0)).item()
    assert value == pytest.approx(0.251150, abs=1e-6)
    assert value == pytest.approx((softplus(-1) + softplus(-2) + softplus(-1)) / 3, abs=1e-7)  # pairs 01 02 12
    rewards = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    pairs = list(itertools.combinations(rewards.tolist(), 2))
    assert ranking(rewards).item() == pytest.approx(
        sum(softplus(worse - better) for better, worse in pairs) / 10,
        abs=1e-7,  # the weights are float32
    )
    torch.testing.assert_close(ranking(rewards + 3), ranking(rewards), atol=1e-9, rtol=0)
    assert abs(ranking(f64(0, 1, 2)).item() - value) > 1  # worst first
    assert ranking(f64(1, 0)).item() == pytest.approx(BradleyTerry().losses(f64(1), f64(0)).item(), abs=1e-12)
    assert ranking(f64(1)) == 0  # one completion makes no pair
    assert torch.autograd.gradcheck(ranking, (rewards.clone().requires_grad_(),))


def test_golden_numbers_of_the_dpo_family() -> None:
    simpo = of_means(SimPO(1.375), f64(-10 / 5), f64(-14 / 10), beta=2.5)
    clean, flipped = softplus(-0.3), softplus(0.3)
    for value, sheet, arithmetic in [
        (dpo(*PAIR), 0.554355, clean),
        (conservative(*PAIR), 0.584355, 0.9 * clean + 0.1 * flipped),
        (robust(*PAIR), 0.516855, (0.9 * clean - 0.1 * flipped) / 0.8),
        (hinge(*PAIR), 0.7, 1 - 0.1 * 3),
        (ipo(*PAIR), 4.0, (3 - 5) ** 2),
        (ipo_of_means(*PAIR), 21.16, (1 / 5 + 2 / 10 - 5) ** 2),
        (length_normalized(*PAIR), 0.126928, softplus(-5 * (1 / 5 + 2 / 10))),
        (length_margin(*PAIR), softplus(-0.25), softplus(-(0.1 * 3 + 0.01 * (5 - 10)))),
        (simpo, 2.929882, softplus(2.875)),  # 2.5 (-2 + 1.4) - 1.375
    ]:
        assert value.shape == (1,)
        assert value.item() == pytest.approx(sheet, abs=1e-6)
        assert value.item() == pytest.approx(arithmetic, abs=1e-9)
    ratio_for_gamma = of_means(SimPO(1.375 / 2.5), f64(-2), f64(-1.4), beta=2.5)
    assert abs(ratio_for_gamma.item() - simpo.item()) > 0.5
    torch.testing.assert_close(length_normalized(*PAIR), through(Sigmoid(), 5.0)(*PER_TOKEN), atol=1e-12, rtol=0)


def test_orpo_golden_number() -> None:
    value = orpo_odds(f64(-2), f64(-1.4)).item()
    odds = [math.exp(x) / (1 - math.exp(x)) for x in (-2, -1.4)]
    log_odds = math.log(odds[0] / odds[1])
    assert log_odds == pytest.approx(-0.737741, abs=1e-6)
    assert value == pytest.approx(1.128562, abs=1e-6)
    assert value == pytest.approx(softplus(-log_odds), abs=1e-9)
    whole = of_means(ORPO(), f64(-2), f64(-1.4), beta=0.1).item()
    assert whole == pytest.approx(2 + 0.1 * softplus(-log_odds), abs=1e-9)
    ratio_of_probabilities = softplus(2 - 1.4)
    assert abs(value - ratio_of_probabilities) > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize(
    ("chosen", "rejected"), [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e4, -1e-9), (-1e-9, -1e4), (-1e4, -1e4)]
)
def test_orpo_stays_finite_at_both_ends(chosen: float, rejected: float, dtype: torch.dtype) -> None:
    logprobs = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in (chosen, rejected)]
    loss = orpo_odds(*logprobs)
    assert loss.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss.sum(), logprobs))
    for x in (-1e-3, -0.6931, -5.0, -40.0):
        exact = x - math.log(-math.expm1(x))
        # against a chosen one of p = 1/2, whose log odds are 0
        measured = orpo_odds(torch.tensor([math.log(0.5)], dtype=dtype), torch.tensor([x], dtype=dtype))
        assert measured.item() == pytest.approx(softplus(exact), abs=1e-5 if dtype is torch.float32 else 1e-9)


@pytest.mark.parametrize(("loss", "expected"), [
    (dpo, math.log(2)), (conservative, math.log(2)), (robust, math.log(2)), (length_normalized, math.log(2)),
    (hinge, 1.0), (ipo, 1 / (4 * 0.1**2)), (ipo_of_means, 1 / (4 * 0.1**2)),
])  # fmt: skip
def test_value_where_policy_is_reference(loss: Loss, expected: float) -> None:
    chosen, rejected = f64(-3.3), f64(-7.1)
    assert loss(chosen, rejected, chosen, rejected).item() == pytest.approx(expected, abs=1e-12)


def test_gradient_of_dpo_where_policy_is_reference() -> None:
    policy = [f64(-3).requires_grad_(), f64(-7).requires_grad_()]
    for beta in (0.1, 2.0):
        loss = through(Sigmoid(), beta)(*policy, f64(-3), f64(-7))
        gradients = [gradient.item() for gradient in torch.autograd.grad(loss.sum(), policy)]
        assert gradients == pytest.approx([-beta / 2, beta / 2], abs=1e-12)


@pytest.mark.parametrize("loss", REFERENCED.values(), ids=REFERENCED)
def test_gradcheck_against_single_pairs_and_constant_shift(loss: Loss) -> None:
    logprobs = -5 * torch.rand(4, 6, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    inputs = tuple(row.clone().requires_grad_() for row in logprobs)
    before = logprobs.clone()
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.equal(torch.stack([x.detach() for x in inputs]), before)
    whole = loss(*logprobs)
    assert whole.shape == (6,)
    singly = torch.cat([loss(*logprobs[:, i : i + 1]) for i in range(6)])
    torch.testing.assert_close(whole, singly, atol=1e-12, rtol=0)
    if loss not in (length_normalized, ipo_of_means):  # where a constant counts as much as the completion is short
        shifted = loss(logprobs[0] + 2, logprobs[1] + 2, *logprobs[2:])
        torch.testing.assert_close(shifted, whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("loss", "by_hand"), [
    (dpo, lambda h: softplus(-0.1 * h)),
    (conservative, lambda h: 0.9 * softplus(-0.1 * h) + 0.1 * softplus(0.1 * h)),
    (robust, lambda h: (0.9 * softplus(-0.1 * h) - 0.1 * softplus(0.1 * h)) / 0.8),
    (hinge, lambda h: max(0.0, 1 - 0.1 * h)),
    (ipo, lambda h: (h - 5) ** 2),
])  # fmt: skip
def test_swapping_the_completions_turns_h_around(loss: Loss, by_hand: Callable[[float], float]) -> None:
    chosen, rejected, ref_chosen, ref_rejected = -30 * torch.rand(
        4, 8, generator=torch.Generator().manual_seed(3), dtype=DOUBLE
    )
    h = ((chosen - ref_chosen) - (rejected - ref_rejected)).tolist()
    straight = loss(chosen, rejected, ref_chosen, ref_rejected)
    torch.testing.assert_close(straight, f64(*map(by_hand, h)), atol=1e-9, rtol=0)
    swapped = loss(rejected, chosen, ref_rejected, ref_chosen)
    torch.testing.assert_close(swapped, f64(*[by_hand(-x) for x in h]), atol=1e-9, rtol=0)
    without_reference = loss(chosen, rejected, torch.zeros(8), torch.zeros(8))
    assert not torch.allclose(straight, swapped) and not torch.allclose(straight, without_reference)


def test_label_smoothing_moves_the_minimum() -> None:
    # sigma(beta h) = 1 - e  <=>  h = log((1 - e) / e) / beta = log(9) / 0.1
    best = f64(math.log(9) / 0.1).requires_grad_()
    assert best.item() == pytest.approx(21.972, abs=1e-3)
    loss = of_h(conservative, best)
    assert torch.autograd.grad(loss.sum(), best)[0].item() == pytest.approx(0.0, abs=1e-12)
    for other in (best.detach() - 0.1, best.detach() + 0.1):
        assert of_h(conservative, other) > loss
        assert of_h(dpo, other + 1) < of_h(dpo, other)  # without it the loss only falls
        assert of_h(robust, other + 1) < of_h(robust, other)


def test_robust_loss_is_unbiased_under_flipped_labels() -> None:
    h = torch.linspace(-30, 30, 13, dtype=DOUBLE)
    clean = of_h(dpo, h)
    torch.testing.assert_close(0.9 * of_h(robust, h) + 0.1 * of_h(robust, -h), clean, atol=1e-9, rtol=0)
    assert not torch.allclose(0.9 * of_h(conservative, h) + 0.1 * of_h(conservative, -h), clean, atol=1e-3)
    zero = f64(0)
    torch.testing.assert_close(through(Robust(0.0), 0.1)(h, zero, zero, zero), clean, atol=1e-12, rtol=0)
    for kind in (Robust, Sigmoid):
        for wrong in (-0.1, 0.5, 0.7, math.nan):
            with pytest.raises(ValueError, match=f"{kind.__name__}: label_smoothing must .* < 0.5, got {wrong}"):
                kind(wrong)


def test_a_longer_chosen_answer_is_partly_explained_by_its_length() -> None:
    policy = f64(-20).requires_grad_()

    def pull(chosen_lengths: Tensor, rejected_lengths: Tensor) -> tuple[float, float]:
        chosen, rejected = sequences(policy, f64(-20), chosen_lengths), sequences(f64(-20), f64(-20), rejected_lengths)
        loss = LengthMargin(0.01).losses(chosen, rejected, 0.1)  # h = 0
        return loss.item(), -torch.autograd.grad(loss.sum(), policy)[0].item() / 0.1

    loss, weight = pull(torch.tensor([80]), torch.tensor([30]))  # logit 0.01 * 50
    assert (loss, weight) == pytest.approx((0.474077, 0.377541), abs=1e-6)
    assert (loss, weight) == pytest.approx((softplus(-0.5), 1 / (1 + math.exp(0.5))), abs=1e-9)
    assert pull(f64(30), f64(30)) == pytest.approx((math.log(2), 0.5), abs=1e-9)
    assert pull(f64(30), f64(80))[1] == pytest.approx(1 / (1 + math.exp(-0.5)), abs=1e-9)
    wrong_sign = softplus(0.5)
    assert abs(loss - wrong_sign) > 0.4


def test_kto_golden_numbers() -> None:
    delta, desirable = f64(1, -2), torch.tensor([True, False])
    loss = kto(delta - 9, f64(-9, -9), desirable, f64(0.5), 0.1)
    assert loss.tolist() == pytest.approx([0.487503, 0.437823], abs=1e-6)
    # 1 - sigma(0.1 (1 - 0.5)) and 1 - sigma(0.1 (0.5 + 2))
    assert loss.tolist() == pytest.approx([1 / (1 + math.exp(0.05)), 1 / (1 + math.exp(0.25))], abs=1e-9)
    weighted = kto(delta, f64(0, 0), desirable, f64(0.5), 0.1, (1.3, 0.7))
    torch.testing.assert_close(weighted, loss * f64(1.3, 0.7), atol=1e-12, rtol=0)
    flipped = kto(delta, f64(0, 0), ~desirable, f64(0.5), 0.1)
    torch.testing.assert_close(flipped, 1 - loss, atol=1e-12, rtol=0)
    assert not torch.allclose(flipped, loss)


def test_kto_where_policy_is_reference_and_the_zero_point() -> None:
    logp, desirable = f64(-4, -6), torch.tensor([True, False])
    torch.testing.assert_close(
        kto(logp, logp, desirable, f64(0), 0.1, (1.5, 0.8)), 0.5 * f64(1.5, 0.8), atol=1e-12, rtol=0
    )
    negative = kto(logp, logp - 1, desirable, f64(-3), 0.1)
    assert torch.equal(negative, kto(logp, logp - 1, desirable, f64(0), 0.1))
    assert not torch.allclose(negative, kto(logp, logp - 1, desirable, f64(3), 0.1))
    kl, policy = f64(0.5).requires_grad_(), logp.clone().requires_grad_()
    loss = kto(policy, logp - 1, desirable, kl, 0.1).sum()
    policy_gradient, kl_gradient = torch.autograd.grad(loss, [policy, kl], allow_unused=True)
    assert kl_gradient is None
    assert policy_gradient[0] < 0 < policy_gradient[1]  # desirable up, undesirable down
    assert torch.autograd.gradcheck(lambda x: kto(x, logp - 1, desirable, f64(0.5), 0.1), (policy,))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_huge_ratios_keep_losses_and_gradients_finite(dtype: torch.dtype) -> None:
    desirable = torch.tensor([True, True, False, False])
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        **{name: lambda h, loss=loss: of_h(loss, h) for name, loss in REFERENCED.items()},
        "bradley_terry": lambda h: BradleyTerry(0.01).losses(h, -h),
        "ranking": ranking,
        "simpo": lambda h: of_means(SimPO(1.0), h, -h, beta=10.0),
        "kto": lambda h: kto(h, 0 * h, desirable, torch.tensor(0.5), beta=1.0),
    }
    for name, loss in losses.items():
        h = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype, requires_grad=True)
        value = loss(h)
        assert value.isfinite().all(), name
        assert torch.autograd.grad(value.sum(), h)[0].isfinite().all(), name


def naive_pairs(prompt_index: list[int], rank: list[int]) -> list[tuple[int, int, float]]:
    rows = range(len(rank))
    found = [(i, j) for i in rows for j in rows if prompt_index[i] == prompt_index[j] and 0 <= rank[i] < rank[j]]
    return [(i, j, 1 / sum(prompt_index[a] == prompt_index[i] for a, _ in found)) for i, j in found]


def as_pairs(prompt_index: Tensor, rank: Tensor) -> list[tuple[int, int, float]]:
    return list(zip(*(x.tolist() for x in pairs_of_ranks(prompt_index, rank)[:3]), strict=True))


def test_preference_pairs_hand_case() -> None:
    # prompt 0: ranks 0 1 1, a tie makes no pair; prompt 1: a filler; prompt 2: rows apart, worse first; prompt 3: one
    # label
    prompt_index, rank = torch.tensor([0, 0, 0, 1, 1, 2, 3, 2]), torch.tensor([0, 1, 1, -1, -1, 1, 0, 0])
    assert as_pairs(prompt_index, rank) == [(0, 1, 0.5), (0, 2, 0.5), (7, 5, 1.0)]
    better, worse, weight, margin = pairs_of_ranks(prompt_index, rank)
    assert margin is None and better.dtype == worse.dtype == torch.int64 and weight.dtype == torch.float32
    assert pairs_of_ranks(prompt_index, torch.full((8,), -1)).weight.shape == (0,)
    assert as_pairs(torch.tensor([0, 0]), torch.tensor([-1, 0])) == []  # a filler is not better than what is ranked


def test_preference_pairs_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(4)
    prompt_index, rank = torch.randint(6, (40,), generator=generator), torch.randint(-1, 4, (40,), generator=generator)
    found = as_pairs(prompt_index, rank)
    expected = naive_pairs(prompt_index.tolist(), rank.tolist())
    assert len(expected) > 20
    assert [pair[:2] for pair in found] == [pair[:2] for pair in expected]
    assert [pair[2] for pair in found] == pytest.approx([pair[2] for pair in expected], abs=1e-7)
    better, _, weight, _ = pairs_of_ranks(prompt_index, rank)
    sums = torch.zeros(6).index_add(0, prompt_index[better], weight)
    torch.testing.assert_close(sums, torch.ones(6))


def test_pairs_carry_the_margin_of_their_prompt() -> None:
    batch: Any = {
        "prompt_index": torch.tensor([0, 1, 1, 1]),
        "rank": torch.tensor([0, 2, 0, 1]),
        "margin": f64(7, 3),
    }
    pairs = find_pairs(batch)
    assert (pairs.better.tolist(), pairs.worse.tolist()) == ([2, 2, 3], [1, 3, 1])
    assert pairs.margin is not None and pairs.margin.tolist() == [3, 3, 3]


def test_the_total_is_the_sum_over_examples_of_the_mean_over_their_pairs() -> None:
    # example 0 has one pair, example 1 three, example 2 is labelled and has none
    prompt_index, rank = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([1, 0, 2, 0, 1, 0])
    logps, ref_logps = -5 * torch.rand(2, 6, generator=torch.Generator().manual_seed(6), dtype=DOUBLE)
    h = [[float((logps - ref_logps)[i] - (logps - ref_logps)[j]) for j in range(6)] for i in range(6)]
    expected = softplus(-0.3 * h[1][0]) + sum(softplus(-0.3 * h[i][j]) for i, j in ((3, 2), (3, 4), (4, 2))) / 3
    batch: Any = {"prompt_index": prompt_index, "rank": rank}
    rows = sequences(logps, ref_logps, torch.ones(6))
    assert Sigmoid().total(rows, batch, find_pairs(batch), 0.3).item() == pytest.approx(expected, abs=1e-6)


def test_tokens_are_summed_with_their_weights() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    batch: Any = {"completion_mask": mask, "prompt_index": torch.tensor([0, 0])}
    logprobs, ref_logprobs = f64(-1, -2, -4, -8, math.nan, math.nan).view(2, 3), f64(-3, -3, -3, -3, 0, 0).view(2, 3)
    found = LengthDesensitized(0.5).sum_tokens(logprobs, ref_logprobs, batch)
    assert found.logps.tolist() == [-1 - 0.5 * 2 - 0.5 * 4, -8] and found.ref_logps.tolist() == [-6, -3]
    assert found.plain.tolist() == [-7, -8] and found.lengths.tolist() == [3, 1]
    assert Sigmoid().sum_tokens(logprobs, None, batch).log_ratio.tolist() == [-7, -8]


def test_length_desensitized_weights_hand_case() -> None:
    def weights_of(mask: Tensor, prompt_index: Tensor, alpha: float) -> Tensor:
        batch: Any = {"completion_mask": mask, "prompt_index": prompt_index}
        return LengthDesensitized(alpha).token_weights(batch)

    # prompt 0: 3 and 2 tokens; prompt 1: 1 and 4. The dropped column of row 0 lies inside.
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    weights = weights_of(mask, torch.tensor([0, 0, 1, 1]), 0.25)
    expected = [[1, 0, 1, 0.25], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0.25, 0.25, 0.25]]
    assert weights.tolist() == expected
    shortest_of_all = [[1, 0, 0.25, 0.25], [1, 0.25, 0, 0], [1, 0, 0, 0], [1, 0.25, 0.25, 0.25]]
    assert weights.tolist() != shortest_of_all
    assert torch.equal(weights_of(mask, torch.tensor([0, 0, 1, 1]), 1.0), mask.float())
    assert torch.equal(weights_of(mask, torch.arange(4), 0.25), mask.float())  # nothing to compare with
    padded = torch.cat([mask, torch.zeros(4, 2, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(weights_of(padded, torch.tensor([7, 7, 1, 1]), 0.25)[:, :4], weights)
