"""Checkpoints and exports of the first edition still load.

``checkpoints_v1`` holds one of each kind; see its README.
"""

from typing import Any

import pytest
import torch
from fixed_runs import CHECKPOINTS, MIDDLE, fit, losses
from safetensors.torch import load_file

ROUNDING = 1e-6  # the checkpoints were written on another CPU


def largest_gap(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def histories(checkpoint: dict[str, Any]) -> list[list[dict[str, float]]]:
    return [state["history"] for state in checkpoint["callbacks"].values() if "history" in state]


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "grpo", "ppo"])
def test_a_run_goes_on_from_an_old_checkpoint(name, tmp_path):
    old = torch.load(CHECKPOINTS / f"{name}.ckpt", weights_only=True)
    straight = fit(name, tmp_path / "straight")
    resumed = fit(name, tmp_path / "resumed", "--ckpt_path", str(CHECKPOINTS / f"{name}.ckpt"))
    # The KL loss of GRPO has another weight since these checkpoints, which moved the weights by up to 1.2e-4.
    weights, values = (5e-4, 1e-3) if name == "grpo" else (ROUNDING, 1e-5)
    assert largest_gap(resumed["state_dict"], straight["state_dict"]) < weights
    before = {
        key: old["state_dict"][key] for key in straight["state_dict"]
    }  # without the frozen weights under adapters
    assert largest_gap(straight["state_dict"], before) > 1e-3
    assert (len(old["state_dict"]) > len(before)) == (name == "ppo")
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "straight")[MIDDLE:], abs=values)
    assert resumed["alignment"] == straight["alignment"]
    assert len(histories(old)) == (2 if name == "grpo" else 0)
    for before, after, there in zip(histories(old), histories(resumed), histories(straight), strict=True):
        assert after[: len(before)] == before  # not begun anew
        assert [row["phase"] for row in after] == [row["phase"] for row in there]


def test_an_old_export_is_a_policy_to_start_from(tmp_path):
    learned = fit("sft", tmp_path / "straight")["state_dict"]
    fit("sft", tmp_path / "more", "--model.policy", str(CHECKPOINTS / "export"), "--model.optimizer.lr", "0")
    more = load_file(tmp_path / "more" / "export" / "model.safetensors")  # what nothing was learned in
    assert len(more) == 20
    assert largest_gap(more, {name: learned[f"policy.model.{name}"] for name in more}) < ROUNDING
