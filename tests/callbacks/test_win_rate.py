"""WinRate in a real Trainer: hand-made completions against hand-made baselines."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from programs import run_program
from torch.utils.data import DataLoader, DistributedSampler

from callbacks import Summary
from callbacks.win_rate import WinRate
from modules.types import Record, Reward, Rollout

# baseline, completion: the judge reads the verdict from the completion
ROWS = [("aaaa", "win"), ("bb", "win, long"), ("c", "tie"), ("dddddd", "loss"), ("e", "?")]
NAMES = ("win_rate", "win_rate_standard_error", "length_controlled_win_rate", "win_rate_ties", "win_rate_unscorable")


class Reads(Reward):
    """A judge that reads the verdict at the start of the completion."""

    name = "reads"

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        verdicts = {"win": 1.0, "tie": 0.5, "los": 0.0, "two": 2.0}
        return [verdicts.get(rollout.completion.text[:3]) for rollout in rollouts]


class Reporting(Reads):
    """A judge that reports how many completions it read."""

    def __init__(self) -> None:
        self.read = 0

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        self.read += len(rollouts)
        return super().__call__(rollouts)

    def report(self) -> dict[str, float]:
        return {"read": float(self.read)}


class Sampler(LightningModule):
    """Leaves ``batches[i]`` after validation batch i."""

    def __init__(self, batches: list[list[Rollout]]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = batches
        self.record = Record(held_out=[])

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.record.held_out = self.batches[batch_idx]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rollouts(make: Any, rows: Any = ROWS) -> list[Rollout]:
    return [
        dataclasses.replace(make(text=text, group=number), answer=answer) for number, (answer, text) in enumerate(rows)
    ]


def loader(length: int) -> DataLoader[torch.Tensor]:
    data = [torch.ones(1)] * length
    return DataLoader(data, sampler=DistributedSampler(data, num_replicas=1, rank=0))  # type: ignore[arg-type]


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), max_epochs=1, **quiet, **options
    )


def validate(
    folder: Path, module: Sampler, judge: Reward, num_batches: int | None = None, **options: Any
) -> dict[str, float]:
    running = trainer(folder, WinRate(judge), **options)
    running.validate(module, loader(num_batches or len(module.batches)), verbose=False)
    return {name: float(value) for name, value in running.callback_metrics.items()}


def test_rates_over_batches_of_unequal_size(make: Any, tmp_path: Path) -> None:
    found = rollouts(make)
    logged = validate(tmp_path, Sampler([found[:1], found[1:]]), Reads())
    # 1, 1, 1/2 and 0 of four; the fifth cannot be scored. Variance about 5/8: 2 * 9/64 + 1/64 + 25/64 = 44/64, / 3 / 4
    # = 11/192.
    assert logged["val/win_rate"] == pytest.approx(100 * 5 / 8, abs=1e-4)
    assert logged["val/win_rate_standard_error"] == pytest.approx(100 * (11 / 192) ** 0.5, abs=1e-4)
    assert logged["val/win_rate_ties"] == pytest.approx(100 / 4, abs=1e-4)
    assert logged["val/win_rate_unscorable"] == pytest.approx(100 / 5, abs=1e-4)
    assert set(logged) == {f"val/{name}" for name in NAMES}
    mean_of_batch_means = 100 * (1 + 1.5 / 3) / 2
    assert logged["val/win_rate"] != pytest.approx(mean_of_batch_means, abs=1)


def test_length_control_reads_characters_of_the_texts(make: Any, tmp_path: Path) -> None:
    # 6 of 8 wins at +6 characters, 1 of 2 at -6: logits log 3 and 0, so log(3) / 2 half-way, at equal length; the ridge
    # costs less than 0.5.
    longer = [("aaa", "win!!!!!!")] * 6 + [("aaa", "loss!!!!!")] * 2
    shorter = [("aaaaaaaaaa", "win!"), ("aaaaaaaaaa", "loss")]
    logged = validate(tmp_path, Sampler([rollouts(make, longer + shorter)]), Reads())
    assert logged["val/length_controlled_win_rate"] == pytest.approx(100 * 3**0.5 / (1 + 3**0.5), abs=0.5)
    assert logged["val/win_rate"] == pytest.approx(100 * 7 / 10, abs=1e-4)


def test_the_length_is_that_of_what_was_judged(make: Any, tmp_path: Path) -> None:
    """Reasoning before the answer counts in no length, so these rows give what those above give."""

    class Final(Reads):
        def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
            final = [
                dataclasses.replace(r, completion=dataclasses.replace(r.completion, text=r.final_text))
                for r in rollouts
            ]
            return super().__call__(final)

    longer = [("aaa", "win!!!!!!")] * 6 + [("aaa", "loss!!!!!")] * 2
    shorter = [("aaaaaaaaaa", f"<think>{'x' * 100}</think>{text}") for text in ("win!", "loss")]
    logged = validate(tmp_path, Sampler([rollouts(make, longer + shorter)]), Final())
    assert logged["val/length_controlled_win_rate"] == pytest.approx(100 * 3**0.5 / (1 + 3**0.5), abs=0.5)


def test_the_judges_report(make: Any, tmp_path: Path) -> None:
    found = rollouts(make)
    assert validate(tmp_path, Sampler([found[:2], found[2:]]), Reporting())["val/judge/read"] == 5


def test_before_and_after_training(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rollouts(make)
    summary = Summary(title="toy", headline="val/win_rate", metrics=[])
    module = Sampler([found[3:], found[1:3]])  # before: loss, ?, win, tie
    running = trainer(tmp_path, WinRate(Reads()), summary, num_sanity_val_steps=-1)
    running.fit(module, loader(1), loader(2))
    assert summary.before["val/win_rate"] == pytest.approx(50, abs=1e-4)
    module.batches = [found[:1], found[:1]]
    running.validate(module, loader(2), verbose=False)
    assert capsys.readouterr().out.rstrip().split("\n")[-1] == "toy: win_rate 50.00 -> 100.00"


def test_nothing_scorable_has_no_win_rate(make: Any, tmp_path: Path) -> None:
    assert validate(tmp_path, Sampler([rollouts(make, [("a", "?")])]), Reads()) == {"val/win_rate_unscorable": 100.0}


def test_a_column_holds_the_baseline_and_an_empty_completion_is_one(make: Any, tmp_path: Path) -> None:
    found = [
        dataclasses.replace(rollout, answer=None, info={"completion": text})
        for rollout, text in zip(rollouts(make, [("gold", "win"), ("gold", "loss")]), ("", "abc"), strict=True)
    ]
    callback = WinRate(Reads(), baseline="completion")
    running = trainer(tmp_path, callback)
    running.validate(Sampler([found]), loader(1), verbose=False)
    assert float(running.callback_metrics["val/win_rate"]) == 50
    assert callback.against_baseline(found[0]).answer == ""
    with pytest.raises(ValueError, match="in column 'other'"):
        WinRate(Reads(), baseline="other").against_baseline(found[0])


def test_bad_rows_and_scores_are_named(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row0 has no baseline completion in column 'answer'; set baseline of WinRate"):
        validate(tmp_path, Sampler([rollouts(make, [(None, "win")])]), Reads())
    with pytest.raises(ValueError, match=r"reads scored 2.0 for row1; a judge gives 1 \(win\)"):
        validate(tmp_path, Sampler([rollouts(make, [("a", "win"), ("a", "two")])]), Reads())


SCRIPT = """
import json, sys
from pathlib import Path
from conftest import make_rollout
from test_win_rate import Reporting, Sampler, rollouts, validate

class Ranked(Sampler):
    def on_validation_start(self):
        self.batches = self.batches[self.global_rank :]

if __name__ == "__main__":
    found, folder = rollouts(make_rollout), Path(sys.argv[1])
    logged = validate(folder, Ranked([found[:1], found[1:]]), Reporting(), num_batches=1, devices=2, strategy="ddp_fork")
    (folder / "two.json").write_text(json.dumps(logged))
"""


def test_two_ranks_equal_one(make: Any, tmp_path: Path) -> None:
    (tmp_path / "two_ranks.py").write_text(SCRIPT)
    done = run_program("two_ranks.py", ".", folder=tmp_path, path=[Path(__file__).parent])
    assert done.returncode == 0, done.stderr[-3000:]
    expected = validate(tmp_path, Sampler([rollouts(make)]), Reads())
    logged = json.loads((tmp_path / "two.json").read_text())
    assert logged.pop("val/judge/read") == (1 + 4) / 2
    assert logged == pytest.approx(expected, abs=1e-4)
    mean_of_rank_means = 100 * (1 + 1.5 / 3) / 2
    assert logged["val/win_rate"] != pytest.approx(mean_of_rank_means, abs=1)
