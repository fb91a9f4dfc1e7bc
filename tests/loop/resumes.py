"""Stops a method's run in every way, resumes it, and compares what comes out with the uninterrupted run, bit for bit.

    python resumes.py FOLDER METHOD ...
    python resumes.py FOLDER METHOD --SETTING ...

do so as one of two ranks: from every stop if the method is one of ``EVERY_STOP`` and has no setting, from few stops
with a setting, and else from a checkpoint inside a phase.
"""

import csv
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fixed_runs
import pytest
from fixed_runs import same

import modules
from modules.cli.command import AlignmentCLI

VALIDATES = ["--data.val=rows.jsonl", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
LORA_DROPS = ["--model.lora.r=2", "--model.lora.alpha=4", "--model.lora.dropout=0.5"]
SETTINGS = {"sft": LORA_DROPS, "dpo": LORA_DROPS, "grpo": LORA_DROPS, "ppo": ["--model.lora.dropout=0.5"]}
# Steps of one micro-batch a rank, so that two ranks take as many steps as one that accumulates two.
TWO_RANKS = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accumulate_grad_batches=1"]
TWO_RANKS += ["--trainer.val_check_interval=1"]


def read_numbers(folder: Path) -> dict[tuple[str, str], str]:
    """Read what a run logged, by step, without wall times and means that they weigh."""
    with (folder / "log/metrics.csv").open() as file:
        return {
            (row["step"], name): value
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and not any(part in name for part in ("time", "second", "occupancy"))
        }


def stop_at_a_step(name: str, folder: Path, settings: list[str]) -> Path:
    """Stop nothing: a checkpoint of the whole run, inside its second epoch."""
    return folder.parent / "whole/checkpoints/step3.ckpt"


def stop_by_max_steps(name: str, folder: Path, settings: list[str]) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlignmentCLI, "after_fit", lambda self: self.trainer.save_checkpoint(folder / "after.ckpt"))
        fixed_runs.fit(name, folder, *settings, "--trainer.max_steps=3")
    return folder / "checkpoints/last.ckpt"


def stop_by_max_epochs(name: str, folder: Path, settings: list[str]) -> Path:
    fixed_runs.fit(name, folder, *settings, "--trainer.max_epochs=1")
    return folder / "checkpoints/last.ckpt"


def save_after_fit(name: str, folder: Path, settings: list[str]) -> Path:
    """Stop nothing: what ``stop_by_max_steps`` saved behind its fit."""
    return folder.parent / "stop_by_max_steps/after.ckpt"


def stop_inside_a_validation(name: str, folder: Path, settings: list[str]) -> Path:
    """Stop by a signal to the last rank."""
    kind = getattr(modules, fixed_runs.RUNS[name][1][0])
    step, ranks = kind.validation_step, []

    def told_to_stop(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 3:
            ranks.append(self.global_rank)
            if self.global_rank == self.trainer.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "validation_step", told_to_stop)
        with pytest.raises(SystemExit) as stop:
            fixed_runs.fit(name, folder, *settings)
    assert stop.value.code == (128 + signal.SIGTERM if ranks == [0] else 0)  # see ``StopTogether.stop``
    return folder / "checkpoints/last.ckpt"


Stop = Callable[[str, Path, list[str]], Path]
STOPS: list[Stop] = [
    stop_at_a_step,
    stop_by_max_steps,
    stop_by_max_epochs,
    save_after_fit,
    stop_inside_a_validation,
]


FEW_STOPS: list[Stop] = [stop_at_a_step, stop_by_max_epochs]  # inside a phase and at its end
EVERY_STOP = ("sft", "grpo")  # one of each base; what a method adds to it is in every checkpoint alike


def check_resumes(name: str, folder: Path, *more: str, stops: Sequence[Stop] = STOPS) -> None:
    """Fail unless a run of ``fixed_runs`` goes on from every stop as if nothing had happened."""
    settings = [*SETTINGS.get(name, []), *VALIDATES, *more]
    whole = fixed_runs.fit(name, folder / "whole", *settings)
    for stop in stops:
        checkpoint = stop(name, folder / stop.__name__, settings)
        after = folder / f"after {stop.__name__}"
        resumed = fixed_runs.fit(name, after, *settings, "--ckpt_path", str(checkpoint))
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            assert same(whole[part], resumed[part]), (stop.__name__, part)
        orders = [end.get("VerifiableDataModule", {}).get("order", {}) for end in (whole, resumed)]
        assert same(*orders), (stop.__name__, orders)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            continue  # rank 0 logs
        numbers, found = read_numbers(folder / "whole"), read_numbers(after)
        assert {step for step, metric in numbers if metric.startswith("val/")} == set("012345")
        assert found.items() <= numbers.items(), (stop.__name__, found.items() - numbers.items())
        assert {key for key in numbers if key[0] >= "3"} <= found.keys(), stop.__name__
        if stop in (stop_at_a_step, stop_inside_a_validation):  # the validation after step 3 was not done or not whole
            assert any(step == "2" and metric.startswith("val/") for step, metric in found), stop.__name__


if __name__ == "__main__":
    given = [argument for argument in sys.argv[2:] if argument.startswith("--")]
    for method in sys.argv[2 : len(sys.argv) - len(given)]:
        stops = FEW_STOPS if given else STOPS if method in EVERY_STOP else [stop_at_a_step]
        check_resumes(method, Path(sys.argv[1]) / method, *TWO_RANKS, *given, stops=stops)
