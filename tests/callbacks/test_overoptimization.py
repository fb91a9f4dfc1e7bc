"""Overoptimization in a real Trainer: the trained reward against a gold reward that reads the text."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks import Overoptimization
from modules.types import Reward, Rollout


class TextIsGold(Reward):
    """A reward: the number that the completion spells; unscorable if it spells none."""

    name = "gold"

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        texts = [rollout.completion.text for rollout in rollouts]
        return [None if text == "?" else float(text) for text in texts]


def hacked_phases(make: Any) -> list[list[Rollout]]:
    """Make phases in which the trained reward rises 0.5, 1, 2, the gold reward rises and falls 4, 6, 3, and the mean KL
    is -0.5, 4, 9.
    """
    return [
        [make(0.0, text="3", kl=1.0), make(1.0, text="5", kl=-2.0)],
        [make(1.0, text="6", kl=2.0), make(None, text="?", kl=6.0)],
        [make(2.0, text="3", kl=9.0), make(2.0, text="3", kl=9.0)],
    ]


def test_scalars(make: Any, fit: Any) -> None:
    events = fit(Overoptimization(TextIsGold()), hacked_phases(make))
    assert events.scalars("train/overoptimization/proxy") == pytest.approx([0.5, 1.0, 2.0], abs=1e-6)
    assert events.scalars("train/overoptimization/gold") == pytest.approx([4.0, 6.0, 3.0], abs=1e-6)
    assert events.scalars("train/overoptimization/gap") == pytest.approx([0.0, 0.5 - 2.0, 1.5 + 1.0], abs=1e-6)
    assert events.scalars("train/overoptimization/sqrt_kl") == pytest.approx([0.0, 2.0, 3.0], abs=1e-6)
    mean_of_roots = (math.sqrt(2) + math.sqrt(6)) / 2
    assert abs(mean_of_roots - 2.0) > 0.05


def test_without_kl_the_rewards_remain(make: Any, fit: Any) -> None:
    events = fit(Overoptimization(TextIsGold()), [[make(0.0, text="3")], [make(1.0, text="2")]])
    assert events.names("train/") == {f"train/overoptimization/{name}" for name in ("proxy", "gold", "gap")}
    assert events.scalars("train/overoptimization/gap") == pytest.approx([0.0, 2.0], abs=1e-6)
    assert len(events.images("train/overoptimization")) == 1


def test_no_gap_while_nothing_can_be_scored(make: Any, fit: Any) -> None:
    events = fit(Overoptimization(TextIsGold()), [[make(1.0, text="?")], [make(2.0, text="5")], [make(4.0, text="6")]])
    assert events.scalars("train/overoptimization/proxy") == pytest.approx([1.0, 2.0, 4.0], abs=1e-6)
    assert events.scalars("train/overoptimization/gap") == pytest.approx([0.0, 2.0 - 1.0], abs=1e-6)
    assert fit(Overoptimization(TextIsGold()), [[]]).names("train/overoptimization") == set()


def test_figures_appear_every_n_phases_and_at_the_end(make: Any, fit: Any) -> None:
    phases = [[make(float(i), text=str(i % 3), kl=float(i))] for i in range(5)]
    images = fit(Overoptimization(TextIsGold(), every_n_phases=2), phases).images("train/overoptimization")
    assert [step for step, _, _ in images] == [4, 8, 10]  # two steps a phase
    assert all(width > 400 and height > 200 for _, width, height in images)
    images = fit(Overoptimization(TextIsGold(), every_n_phases=5), phases).images("train/overoptimization")
    assert [step for step, _, _ in images] == [10]


def test_fitted_law_passes_through_noiseless_points() -> None:
    callback = Overoptimization(TextIsGold())
    distances = [0.0, 1.0, 2.0, 3.0]
    gold = [7.0] + [7.0 + d * (2 - 0.5 * math.log(d)) for d in distances[1:]]
    callback.history = [
        {"phase": float(i), "sqrt_kl": d, "gold": g} for i, (d, g) in enumerate(zip(distances, gold, strict=True))
    ]
    line, fitted = callback._fitted_gold()
    assert line[-1] == pytest.approx(3.0, abs=1e-9)
    assert fitted == pytest.approx([7.0 + d * (2 - 0.5 * math.log(d)) for d in line], abs=1e-9)
    callback.history = callback.history[:3]
    assert callback._fitted_gold() == ([], [])


def test_history_resumes_as_if_never_stopped(make: Any, fit: Any, tmp_path: Path) -> None:
    phases = hacked_phases(make)
    whole, first, second = (Overoptimization(TextIsGold()) for _ in range(3))
    expected = fit(whole, phases).scalars("train/overoptimization/gap")
    started = fit(first, phases[:2], save=tmp_path / "half.ckpt").scalars("train/overoptimization/gap")
    continued = fit(second, phases, ckpt_path=tmp_path / "half.ckpt").scalars("train/overoptimization/gap")
    assert started + continued == expected
    assert second.history == whole.history
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["Overoptimization"]
    assert saved == first.state_dict()
    assert len(saved["history"]) == 2


def test_long_history_is_thinned_but_keeps_the_first_phase(
    make: Any, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callbacks.phase.MAX_PHASES", 4)
    callback = Overoptimization(TextIsGold())
    events = fit(callback, [[make(float(i), text="0")] for i in range(7)])
    assert [row["phase"] for row in callback.history] == [0.0, 4.0, 6.0]  # 0 1 2 3 4 -> 0 2 4; then 0 2 4 5 6 -> 0 4 6
    assert events.scalars("train/overoptimization/gap") == pytest.approx([float(i) for i in range(7)], abs=1e-6)
