"""KnowledgeWriter end to end: rows come back with their categories, killed runs continue, and two ranks equal one."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from programs import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import InstructionWriter, KnowledgeWriter, PreferenceWriter
from datamodules import FactsDataModule
from modules import KnowledgeModule, SFTModule
from modules.rollout import InProcessEngine, WorkerEngine

ROOT = Path(__file__).parents[2]
ROWS = [{"question": f"q{n}", "answer": [f"zz{n}", "another"], "id": n, "note": "\u00e9"} for n in range(7)]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


class Fails(InProcessEngine):
    """The real engine, which fails before its call number ``at``."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.calls, self.at = 0, at

    def generate(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise ValueError("gave up")
        return super().generate(*arguments)


def ask(
    file: Path, rows: Path, engine: Any = None, batch_size: int = 2, seed: int = 0, **options: Any
) -> KnowledgeModule:
    module = KnowledgeModule("tiny", num_samples=3, max_completion_length=2, engine=engine, seed=seed)
    data = FactsDataModule(module.tokenizer, str(rows), batch_size=batch_size, num_prompts=2, num_shots=1)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options}
    Trainer(accelerator="cpu", devices=1, callbacks=[KnowledgeWriter(str(file))], **options).predict(module, data)
    return module


def known_rows(tmp_path: Path) -> Path:
    """Make rows whose second and fifth have an answer that the untrained model gives to their first prompt."""
    file = write_rows(tmp_path / "in.jsonl", ROWS)
    module = KnowledgeModule("tiny", max_completion_length=2)
    data = FactsDataModule(module.tokenizer, str(file), num_prompts=2, num_shots=1)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    module.engine.sync_weights(module.policy, 0)
    said = module.engine.generate(
        batch["prompt_ids"], 1, type(module.sampling)(temperature=0.0, max_completion_length=2), [0] * 14
    )
    # the questions of the first answers stay as they are; only aliases change, which no prompt shows
    rows = [
        {**row, "answer": [*row["answer"], said[2 * n][0].text.strip() or "?"]} if n in (1, 4) else row
        for n, row in enumerate(ROWS)
    ]
    return write_rows(file, rows)


def test_an_engine_that_samples_ahead_is_refused():
    with pytest.raises(
        ValueError, match="WorkerEngine: max_staleness is 1, and KnowledgeModule trains nothing: set it to"
    ):
        KnowledgeModule("tiny", engine=WorkerEngine(1, max_staleness=1))


def test_rows_come_back_with_what_is_known_of_them(tmp_path: Path, caplog: Any) -> None:
    rows, file = known_rows(tmp_path), tmp_path / "new" / "out.jsonl"
    logger = TensorBoardLogger(str(tmp_path / "logs"), name="", version="")
    ask(file, rows, logger=logger)
    found, given = read_rows(file), read_rows(rows)
    added = [{name: row.pop(name) for name in ("knowledge", "p_greedy", "p_sampled")} for row in found]
    assert found == given  # all columns, in order
    known = [index for index, row in enumerate(added) if row["p_greedy"] > 0]
    assert known == [1, 4]
    assert all(
        row["knowledge"] == ("HighlyKnown" if row["p_greedy"] == 1 else "MaybeKnown")
        for row in added
        if row["p_greedy"]
    )
    assert all(
        row["knowledge"] == ("WeaklyKnown" if row["p_sampled"] else "Unknown") for row in added if not row["p_greedy"]
    )
    counts = {
        name: sum(row["knowledge"] == name for row in added)
        for name in ("HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown")
    }
    report = json.loads((file.parent / "out.jsonl.report.json").read_text())
    assert report["rows"] == 7 and {name: report[name] for name in counts} == pytest.approx(
        {name: count / 7 for name, count in counts.items()}
    )
    said = ", ".join(f"{name} {count / 7:.1%}" for name, count in counts.items())
    assert f"labels: {file}: 7 rows, {said}" in caplog.text
    assert sorted(path.name for path in file.parent.iterdir()) == ["out.jsonl", "out.jsonl.report.json"]
    logged = EventAccumulator(str(tmp_path / "logs")).Reload()
    for name, count in counts.items():
        assert [event.value for event in logged.Scalars(f"predict/knowledge/{name}")] == [pytest.approx(count / 7)]


def test_a_run_that_stopped_goes_on_and_asks_nothing_twice(tmp_path: Path, caplog: Any) -> None:
    rows, calm, file = known_rows(tmp_path), tmp_path / "calm.jsonl", tmp_path / "out.jsonl"
    ask(calm, rows)
    with pytest.raises(ValueError, match="gave up"):
        ask(file, rows, Fails(at=6))  # two calls a batch: within the third of four batches
    assert not file.exists()
    with (tmp_path / ".out.jsonl.rank0").open("ab") as part:
        part.write(b'{"row": 4, "uid"')  # as after a power cut
    (tmp_path / ".out.jsonl.rank0").rename(tmp_path / ".out.jsonl.rank3")  # as of a run with more ranks
    engine = Fails(at=0)
    ask(file, rows, engine, batch_size=7)
    assert "resuming with the 4 rows" in caplog.text and engine.calls == 2
    assert file.read_bytes() == calm.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_parts_of_another_run_are_refused(tmp_path: Path) -> None:
    rows, file = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="gave up"):
        ask(file, rows, Fails(at=3))
    with pytest.raises(
        ValueError, match=r"\.out\.jsonl\.rank0 was started with another model, other settings or other rows; delete it"
    ):
        ask(file, rows, seed=1)
    with pytest.raises(ValueError, match="was started with another model, other settings or other rows"):
        ask(file, write_rows(rows, ROWS[1:]))


def test_refusals_and_a_fast_dev_run_write_nothing(tmp_path: Path) -> None:
    rows, file = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    ask(file, rows, fast_dev_run=True)
    with pytest.raises(ValueError, match="is a folder; name a file, such as"):
        ask(tmp_path, rows)
    trainer = Trainer(logger=False, accelerator="cpu")
    with pytest.raises(
        ValueError, match="KnowledgeWriter cannot write the results of SFTModule; set model to KnowledgeModule"
    ):
        KnowledgeWriter(str(file)).setup(trainer, SFTModule("tiny"), "predict")
    with pytest.raises(
        ValueError, match="PreferenceWriter cannot write the results of KnowledgeModule; set model to LabelModule"
    ):
        PreferenceWriter(str(file)).setup(trainer, KnowledgeModule("tiny"), "predict")
    for writer in (KnowledgeWriter(), PreferenceWriter(), InstructionWriter()):
        with pytest.raises(
            ValueError, match=f"{type(writer).__name__} writes what predict finds, and this is fit: rem"
        ):
            writer.setup(trainer, SFTModule("tiny"), "fit")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


SCRIPT = """
import sys
from lightning.pytorch import Trainer
from callbacks import KnowledgeWriter
from datamodules import FactsDataModule
from modules import KnowledgeModule

if __name__ == "__main__":
    module = KnowledgeModule("tiny", num_samples=3, max_completion_length=2)
    data = FactsDataModule(module.tokenizer, sys.argv[1], batch_size=2, num_prompts=2, num_shots=1)
    Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            callbacks=[KnowledgeWriter(sys.argv[2])]).predict(module, data)
"""


def test_two_ranks_write_what_one_writes(tmp_path: Path) -> None:
    rows = known_rows(tmp_path)
    ask(tmp_path / "one.jsonl", rows)
    (tmp_path / "two.py").write_text(SCRIPT)
    run_ranks("two.py", str(rows), "two.jsonl", folder=tmp_path)
    for name in ("{}.jsonl", "{}.jsonl.report.json"):
        assert (tmp_path / name.format("two")).read_bytes() == (tmp_path / name.format("one")).read_bytes()
