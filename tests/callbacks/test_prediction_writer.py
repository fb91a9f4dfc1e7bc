"""PredictionWriter in a real Trainer: one line per completion, and a whole file or none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from callbacks import PredictionWriter
from callbacks.writers.output_files import find_free_file
from datamodules import Addition, VerifiableDataModule
from modules import GRPOModule
from modules.rewards import NumericMatch
from modules.rollout import Sampling
from modules.types import Record, Rollout


class Sampler(LightningModule):
    """Gives ``batches[i]`` for batch i; None makes it fail."""

    def __init__(self, batches: list[list[Rollout] | None]) -> None:
        super().__init__()
        self.batches, self.record = batches, Record()

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        found = self.batches[batch_idx]
        if found is None:
            raise RuntimeError("killed")
        self.record.rollouts = found


def predict(path: Path, batches: list[list[Rollout] | None], **options: Any) -> None:
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options}
    data: DataLoader[torch.Tensor] = DataLoader([torch.ones(1)] * len(batches))  # type: ignore[arg-type]
    Trainer(accelerator="cpu", callbacks=[PredictionWriter(str(path))], **options).predict(Sampler(batches), data)


def test_without_a_path_no_earlier_predictions_are_replaced(tmp_path: Path, make: Any) -> None:
    for text in ("first", "second", "third"):
        data: DataLoader[torch.Tensor] = DataLoader([torch.ones(1)])  # type: ignore[arg-type]
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
        Trainer(accelerator="cpu", callbacks=[PredictionWriter()], **quiet).predict(Sampler([[make(text=text)]]), data)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["predictions-2.jsonl", "predictions-3.jsonl", "predictions.jsonl"]
    assert [json.loads(file.read_text())["completion"] for file in files] == ["second", "third", "first"]
    (tmp_path / ".verified-2.jsonl.rank0").touch()  # of a killed run
    trainer = Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu")
    found = [find_free_file(trainer, None, "predictions.jsonl", resumes).name for resumes in (False, True)]
    assert found == ["predictions-4.jsonl", "predictions-2.jsonl"]


def test_one_line_per_completion_in_order(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "new" / "out.jsonl"
    predict(
        path,
        [
            [make(1.0, [1, 2, 3], "\u00e9\n\u2028", group=0), make(None, group=0)],
            [make(0.5, text="x", group=1, finish="length")],
        ],
    )
    rows = [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]
    assert rows[0] == {
        "uid": "row0",
        "prompt": "2 + 2 = ?",
        "completion": "\u00e9\n\u2028",
        "answer": "4",
        "reward": 1.0,
        "rewards": {"exact": 1.0},
        "finish": "stop",
        "num_tokens": 3,
    }
    assert [(row["uid"], row["reward"], row["finish"]) for row in rows[1:]] == [
        ("row0", None, "stop"),
        ("row1", 0.5, "length"),
    ]
    assert [file.name for file in path.parent.iterdir()] == ["out.jsonl"]


def test_a_failed_run_leaves_the_old_file_and_nothing_else(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "out.jsonl"
    predict(path, [[make(text="old")]])
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="killed"):
        predict(path, [[make(text="new")], None])
    predict(path, [[make(text="new")]], fast_dev_run=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_rank_zero_joins_the_parts_in_the_order_of_the_ranks(tmp_path: Path) -> None:
    writer = PredictionWriter(str(tmp_path / "out.jsonl"))
    for rank, text in enumerate(("zero\n", "one\n", "two\n")):
        writer._part(rank).write_text(text)
    writer._join(3)
    assert (tmp_path / "out.jsonl").read_text() == "zero\none\ntwo\n"
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_folder_is_refused_before_sampling(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"PredictionWriter: {tmp_path} is a folder; name a file"):
        predict(tmp_path, [None])


class Twice(Sampler):
    """Starts another run with the same file in the middle of this one."""

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        super().predict_step(batch, batch_idx)
        if batch_idx == 1:
            with pytest.raises(ValueError, match=r"out.jsonl is being written by another run; name another file"):
                predict(self.path, self.batches)


def test_two_runs_do_not_write_the_same_file(tmp_path: Path, make: Any) -> None:
    batches = [[make(group=group)] for group in range(3)]
    module = Twice(batches)
    module.path = tmp_path / "out.jsonl"
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    data: DataLoader[torch.Tensor] = DataLoader([torch.ones(1)] * 3)  # type: ignore[arg-type]
    Trainer(accelerator="cpu", callbacks=[PredictionWriter(str(module.path))], **options).predict(module, data)
    assert [json.loads(line)["uid"] for line in module.path.read_text().splitlines()] == ["row0", "row1", "row2"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_are_read_back_as_they_were_sampled_from(tmp_path: Path, caplog: Any, chat: bool) -> None:
    """A plain text would become a user message, and the run says how to read it; a rendered one stays as it is."""
    module = GRPOModule("tiny", NumericMatch(), num_generations=2, sampling=Sampling(max_completion_length=4), seed=0)
    data = VerifiableDataModule(train=Addition(6, seed=0), chat=chat)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    writer = PredictionWriter(str(tmp_path / "out.jsonl"))
    Trainer(accelerator="cpu", callbacks=[writer], **options).predict(module, data)
    said = "out.jsonl; some prompts are texts of the rows as they stand: read the file with data.chat: false"
    assert (said in caplog.text) is not chat
    again = VerifiableDataModule(module.tokenizer, str(writer.path), chat=None if chat else False)
    again.setup("fit")
    assert [prompt.ids for prompt in again.train_prompts] == [p.ids for p in data.train_prompts for _ in range(2)]
