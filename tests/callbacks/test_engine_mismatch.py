"""The mismatch panel: numbers by hand, alarms that a planted fault raises once, and none on healthy runs."""

import warnings
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from mismatch_cases import FAULTS, HEALTHY, Bfloat16, build, watch

from callbacks import EngineMismatch
from callbacks.measures.gaps import Gaps, count_rising, estimate_ratio, find_growth
from modules import DistillModule, SFTModule
from modules.losses import ImportanceWeights
from modules.types import Rollout


def rescored(make: Any, log_weights: list[float], version: int = 0, **changes: Any) -> Rollout:
    """Make a completion whose tokens have log p -1 of the sampler and -1 + log w of the trainer."""
    rollout = make(token_ids=[7] * len(log_weights))
    scores = [-1.0 + gap for gap in log_weights]
    completion = replace(rollout.completion, **changes)
    return replace(rollout, completion=completion, trainer_logprobs=scores, trainer_version=version)


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in caught if str(one.message).startswith("engine_mismatch")]


def test_numbers_by_hand(make: Any, fit: Any) -> None:
    """Of 8 places, two are a quarter. The third token of the second completion was given by a tool."""
    first = rescored(make, [0.5, -0.5, 1.0], version=6, versions=[4, 6, 6])
    second = rescored(make, [0.0, 0.0, 9.0, 0.0, 0.0, 0.0, -2.0], version=6, policy_version=6)
    second = replace(second, completion=replace(second.completion, sampled=[True, True, False, *[True] * 4]))
    plain = make(token_ids=[7] * 5)  # nothing was computed for it
    events = fit(EngineMismatch(), [[first, second, plain]])

    def k3(gap: float) -> float:
        return exp(gap) - 1 - gap

    gaps = [0.5, -0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.0]
    expected = {
        "kl": sum(map(k3, gaps)) / 9,
        "fresh_kl": sum(map(k3, gaps[1:])) / 8,  # the first token is of weights two updates older
        "perplexity_ratio": exp(1.0 / 9),  # the mean log w is -1 / 9
        "log_weight_mean": 4.0 / 9,
        "log_weight_max": 2.0,
        "truncated": 1 / 9,  # exp(1) > 2
        "quarter_1_kl": (k3(0.5) + k3(-0.5)) / 4,
        "quarter_1_log_weight": 1.0 / 4,
        "quarter_1_truncated": 0.0,
        "quarter_2_kl": k3(1.0) / 2,
        "quarter_2_log_weight": 1.0 / 2,
        "quarter_2_truncated": 1 / 2,
        "quarter_3_kl": 0.0,
        "quarter_3_log_weight": 0.0,
        "quarter_3_truncated": 0.0,
        "quarter_4_kl": k3(-2.0),
        "quarter_4_log_weight": 2.0,
        "quarter_4_truncated": 0.0,
    }
    assert events.names("train/engine_mismatch") == {f"train/engine_mismatch/{name}" for name in expected}
    for name, value in expected.items():
        assert events.scalars(f"train/engine_mismatch/{name}") == pytest.approx([value], abs=1e-6), name
    assert len(events.images("train/engine_mismatch")) == 1


@pytest.mark.parametrize(
    ("importance", "truncated"),
    [
        (ImportanceWeights(cap=3.0), 0.0),
        (ImportanceWeights("sequence", 4.0), 1.0),
        (ImportanceWeights("sequence", 5.0), 0.0),
    ],
)
def test_the_cap_is_that_of_the_run(make: Any, fit: Any, monkeypatch: Any, importance: Any, truncated: float) -> None:
    """Tokens have w = e^1 and e^0.5, the completion e^1.5 = 4.48."""
    monkeypatch.setattr(fit.__globals__["Scripted"], "importance", importance)
    events = fit(EngineMismatch(), [[rescored(make, [1.0, 0.5])]])
    assert events.scalars("train/engine_mismatch/truncated") == [truncated]


def phase_of(make: Any, kl: float) -> list[Rollout]:
    """Make completions with this KL per token: two tokens of log w +-g, about g^2 / 2 each."""
    return [rescored(make, [(2 * kl) ** 0.5, -((2 * kl) ** 0.5)])] * 8


def test_a_gap_is_told_in_its_second_phase_and_again_at_ten_times(make: Any, fit: Any, tmp_path: Path) -> None:
    kls = [1e-6, 5e-3, 1e-6, 5e-3, 6e-3, 7e-3, 8e-3, 7e-2, 8e-2]  # one phase alone is not told
    panel = EngineMismatch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(panel, [phase_of(make, kl) for kl in kls[:6]], save=tmp_path / "half.ckpt")
    (once,) = said(caught)
    assert once.startswith("engine_mismatch: the engine's probabilities are 0.006 nats a token (KL over 16 tokens)")
    assert "At first both agreed (1e-06), so the engine lacks what was learned since" in once
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = EngineMismatch()
        fit(resumed, [phase_of(make, kl) for kl in kls], ckpt_path=tmp_path / "half.ckpt")
    (again,) = said(caught)  # what was told before is not told again
    assert "are 0.071 nats" in again
    assert [row["fresh_kl"] for row in resumed.history] == pytest.approx(kls, rel=0.2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(EngineMismatch(max_kl=0.1), [phase_of(make, kl) for kl in kls])
    assert said(caught) == []


@pytest.mark.parametrize(
    ("lr", "times", "told"), [(0.1, 2.5, False), (0.1, 4.0, True), (0.0, 2.5, True), (0.0, 1.5, False)]
)
def test_a_steady_growth_is_told_sooner_at_learning_rate_0(
    make: Any, fit: Any, lr: float, times: float, told: bool
) -> None:
    kls = [1e-4 * times ** (place / 7) for place in range(10)]  # first three to last three: ``times``
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(EngineMismatch(), [phase_of(make, kl) for kl in kls], lr=lr)
    assert len(said(caught)) == told
    assert all(("although the learning rate is 0" in one) == (lr == 0) for one in said(caught))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(EngineMismatch(), [phase_of(make, kl / 100) for kl in kls], lr=lr)  # too small to matter
    assert said(caught) == []


def test_growth_is_read_from_the_last_ten_values_or_all_of_them() -> None:
    assert count_rising([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) == 45
    assert count_rising([2, 1, 3, 4, 5, 6, 7, 8, 10, 9]) == 41  # two pairs fall
    flat = [1.0] * 20
    assert find_growth(flat, 0.0) is None and find_growth([1.0, 2.0] * 20, 0.0) is None
    last = [*flat, *map(float, range(2, 12))]
    assert find_growth(last, 0.0) == (20, pytest.approx((9 + 10 + 11) / (2 + 3 + 4)))
    slow = [1 + 0.1 * (place // 10) + 0.3 * (place % 2) for place in range(100)]  # hidden in noise over ten phases
    first, times = find_growth(slow, 0.0) or (9, 0.0)
    assert first == 0 and times == pytest.approx(1.95 / 1.25)
    assert find_growth(last, 12.0) is None


def test_the_error_of_a_ratio_by_hand() -> None:
    # 3 completions of 1, 2, 3 tokens and sums 1, 1, 4: mean 1; residuals 0, -1, 1: sqrt(3 / 2 * 2) / 6
    assert estimate_ratio([1, 1, 4], [1, 2, 3]) == (1.0, pytest.approx(3**0.5 / 6))


def test_a_few_large_weights_do_not_hide_a_gap(make: Any) -> None:
    """Log w counts up to 1: e - 2 a token, beside k3(-2) = e^-2 + 1; the sums of w - 1 are those of all of it."""
    gaps = Gaps.of([rescored(make, [9.0, -2.0]), rescored(make, [0.0])])
    (count, distance, excess), still = gaps.sum_completions(gaps.ages == 0)
    assert (count, distance) == (2, pytest.approx(exp(1) - 2 + exp(-2) + 1))
    assert excess == pytest.approx(exp(9) - 1 + exp(-2) - 1) and still == (1, 0, 0)
    assert gaps.distances.tolist() == pytest.approx([exp(9) - 10, exp(-2) + 1, 0])


def test_methods_without_log_probs_are_refused() -> None:
    trainer = Trainer(logger=False, accelerator="cpu")
    for module in (SFTModule("tiny"), DistillModule("tiny", "tiny-addition")):
        with pytest.raises(ValueError, match=f"EngineMismatch compares .* {type(module).__name__} does not compute"):
            EngineMismatch().setup(trainer, module, "fit")
        EngineMismatch().setup(trainer, module, "validate")
    with pytest.raises(ValueError, match="EngineMismatch: max_kl must be > 0"):
        EngineMismatch(max_kl=0.0)


def run(make_case: Any, **options: Any) -> tuple[EngineMismatch, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        panel = watch(make_case(0, **options))
    return panel, said(caught)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("weights never synced", {"phases": 4, "lr": 3e-3}),
        ("another temperature", {"phases": 2}),
        ("raw log-probs", {"phases": 3}),
        ("prompt cut", {"phases": 2}),
        ("adds up at learning rate 0", {"phases": 11}),
    ],
)
def test_the_cause_of_a_planted_fault_is_told(name: str, options: dict[str, Any]) -> None:
    words, make_case = FAULTS[name]
    _, told = run(make_case, **options)
    assert words in told[0]


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("GRPO in process", 0.0, 1e-9), ("GRPO, bf16-mixed", 1e-7, 1e-2), ("GRPO, 16-bit copy", 1e-7, 1e-2)],
)
def test_healthy_runs_are_not_alarmed(name: str, least: float, most: float) -> None:
    panel, told = run(HEALTHY[name], phases=3)
    assert told == []
    assert all(least <= row["kl"] == row["fresh_kl"] <= most for row in panel.history) and len(panel.history) == 3


def test_the_panel_changes_no_weight() -> None:
    found = []
    for callback in (True, False):
        module, data, trainer = build(3, Bfloat16, phases=2)
        trainer.callbacks += [EngineMismatch()] * callback  # type: ignore[attr-defined]
        trainer.fit(module, datamodule=data)
        found.append([weight.tolist() for weight in module.parameters()])
    assert found[0] == found[1]
