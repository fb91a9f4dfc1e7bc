"""A loss or gradient that is not finite: the step is not taken, its rows are kept, and nothing good is overwritten."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixed_runs import MIDDLE, RUNS, configuration, fit

from modules.trainer.guard import FiniteGuard

ROOT = Path(__file__).parents[2]


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, steps: set[int], gradient: bool) -> None:
    """Spoil the loss of the second micro-batch of these optimiser steps, or only its gradient."""
    import modules

    kind = getattr(modules, RUNS[name][1][0])
    step = kind.training_step

    def spoiled(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        if self.global_step + 1 in steps and batch_idx % 2:
            if not gradient:
                return loss * math.nan
            loss.register_hook(lambda grad: grad * math.inf)
        return loss

    monkeypatch.setattr(kind, "training_step", spoiled)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("name", RUNS)
def test_a_broken_step_stops_every_method_and_spoils_nothing(tmp_path, monkeypatch, capsys, name, gradient):
    spoil(monkeypatch, name, {MIDDLE}, gradient)
    with pytest.raises(SystemExit) as stop:
        fit(name, tmp_path / "run")
    assert stop.value.code == 1
    method, rows = RUNS[name][1][0], tmp_path / "run" / f"nonfinite-step-{MIDDLE}.jsonl"
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert f"{method}: the loss or gradient of step {MIDDLE} is not finite; its rows: " in error and rows.name in error
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {line["micro_batch"] for line in lines} == {0, 1}
    text = "input_text" if name == "sft" else "prompt_text"
    assert all(line[text] and line["step"] == MIDDLE for line in lines)
    assert [math.isfinite(line["loss"]) for line in lines if line["micro_batch"] == 0].count(False) == 0
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == MIDDLE - 1
    assert all(bool(weight.isfinite().all()) for weight in last["state_dict"].values())
    assert not (tmp_path / "run/export").exists()


def test_skip_leaves_a_step_out_as_if_it_had_no_gradient(tmp_path, monkeypatch):
    spoil(monkeypatch, "sft", {MIDDLE}, gradient=True)
    fit("sft", tmp_path / "run", "--on_nonfinite=skip")
    before, at, behind = (
        torch.load(tmp_path / f"run/checkpoints/step{step}.ckpt", weights_only=True)
        for step in (MIDDLE - 1, MIDDLE, MIDDLE + 1)
    )
    assert at["global_step"] == MIDDLE
    assert same(before["state_dict"], at["state_dict"]) and not same(at["state_dict"], behind["state_dict"])
    moments = [part["optimizer_states"][0]["state"] for part in (before, at)]
    assert all(same(moments[0][place], moments[1][place]) for place in moments[0])
    assert (tmp_path / "run/export/model.safetensors").is_file()


def test_skip_has_a_bound(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FiniteGuard.__init__, "__defaults__", ("stop", 2))
    spoil(monkeypatch, "sft", {2, 4, 5, 6}, gradient=False)
    with pytest.raises(SystemExit):
        fit("sft", tmp_path / "run", "--on_nonfinite=skip")
    assert "the loss or gradient of step 6 is not finite" in capsys.readouterr().err
    assert len(list((tmp_path / "run").glob("nonfinite-step-*.jsonl"))) == 4


@pytest.mark.parametrize("name", RUNS)
def test_a_learning_rate_that_blows_up_writes_no_broken_weights(tmp_path, capsys, name):
    with pytest.raises(SystemExit) as stop:
        fit(name, tmp_path / "run", "--model.optimizer.lr=1e10")
    assert stop.value.code == 1
    assert "finite" in capsys.readouterr().err
    for file in (tmp_path / "run/checkpoints").glob("*.ckpt"):
        weights = torch.load(file, weights_only=True)["state_dict"].values()
        assert all(bool(weight.isfinite().all()) for weight in weights), file.name
    assert not (tmp_path / "run/export").exists()


@pytest.mark.parametrize("settings", [{"on_nonfinite": "go on"}, {"max_skips": -1}])
def test_a_value_out_of_range_is_refused(settings):
    with pytest.raises(ValueError, match="on_nonfinite must be stop or skip and max_skips >= 0"):
        FiniteGuard(**settings)


def test_the_command_line_names_the_choices(tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        fit("sft", tmp_path / "run", "--on_nonfinite=go")
    assert "on_nonfinite" in capsys.readouterr().err


SECOND_RANK_OVERFLOWS = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests/loop")!r}]
from modules import SFTModule
from modules.__main__ import main

step = SFTModule.training_step
SFTModule.training_step = lambda self, batch, place: step(self, batch, place) + (self.global_rank and float("inf"))
main()
"""


def test_a_loss_that_overflows_on_one_rank_stops_both(tmp_path):
    (tmp_path / "run.py").write_text(SECOND_RANK_OVERFLOWS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RUNS["sft"][0]))
    (tmp_path / "config.yaml").write_text(json.dumps(configuration("sft")))
    command = [sys.executable, "run.py", "fit", "--config=config.yaml", "--trainer.devices=2", "--trainer.strategy=ddp"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 1, done.stderr
    (said,) = {line for line in done.stderr.splitlines() if "SFTModule: the loss or gradient of step 1 is not" in line}
    assert "nonfinite-step-1.rank1.jsonl" in said and "rank0" not in said
    assert {path.name for path in tmp_path.glob("nonfinite-step-1.rank*")} == {
        f"nonfinite-step-1.rank{rank}.jsonl" for rank in (0, 1)
    }
