"""Seed tasks in both formats, and a loader that ends when the module says so."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer

from datamodules.formats.reading import Reading
from datamodules.predict.seed_tasks import SeedTasksDataModule, read_seed_task
from datamodules.sources import Row

DATA = Path(__file__).parents[3] / "shared" / "data"


def read(columns: dict[str, Any], mapping: dict[str, str] | None = None) -> tuple[str, str, str]:
    task = read_seed_task(Row(columns, "file:1", "source"), Reading("seeds", mapping or {}))
    assert (task.origin, task.source) == ("file:1", "source")
    return task.instruction, task.input, task.output


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"instruction": " i ", "input": "x", "output": "o\n"}, ("i", "x", "o")),
        ({"instruction": "i", "output": "o"}, ("i", "", "o")),
        ({"instruction": "i", "input": None, "output": "o"}, ("i", "", "o")),
        ({"instruction": "i", "input": float("nan"), "output": "o"}, ("i", "", "o")),
        (
            {"id": 1, "instruction": "i", "instances": [{"input": "x", "output": "o"}, {"input": "y", "output": "p"}]},
            ("i", "x", "o"),
        ),
        ({"instruction": "i", "instances": [{"output": "o"}]}, ("i", "", "o")),
        ({"instruction": "i", "output": "o", "instances": [{"output": "p"}]}, ("i", "", "o")),
    ],
)
def test_shapes(columns: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert read(columns) == expected


def test_what_is_mapped_goes_before_what_is_found() -> None:
    row = {"task": "i", "instruction": "no", "output": "o", "examples": [{"output": "p"}]}
    assert read(row, {"instruction": "task"}) == ("i", "", "o")
    assert read(row, {"instances": "examples"}) == ("no", "", "p")
    with pytest.raises(ValueError, match=r"file:1: no column 'nowhere' \(for completion\); found task"):
        read(row, {"output": "nowhere"})
    with pytest.raises(
        ValueError,
        match="columns maps answer .the right answer, .*, which SeedTasksDataModule does not read",
    ):
        SeedTasksDataModule("x.jsonl", columns={"answer": "a"})


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            {"text": "p", "output": "o"},
            r"found the columns text, output; looked for instruction \+ output or instruction \+ instances",
        ),
        ({"instruction": "i"}, "found the columns instruction; looked for"),
        (
            {"instruction": "i", "instances": []},
            "column 'instances' must be a list of objects with input and output, at least one",
        ),
        ({"instruction": "i", "instances": ["o"]}, "column 'instances' must be"),
        ({"instruction": "i", "instances": [{"input": "x"}]}, "column 'instances' must be"),
        ({"instruction": True, "output": "o"}, "'instruction' holds a bool, text was expected"),
        ({"instruction": "i", "input": ["x"], "output": "o"}, "'input' holds a list, text was expected"),
        ({"instruction": "i", "output": None}, "the output is empty, so it shows a model nothing"),
        (
            {"instruction": "i", "output": "o", "system": "s"},
            "column 'system' .*, and SeedTasksDataModule does not read it; set",
        ),
        ({"instruction": " ", "output": "o"}, "the instruction is empty"),
        ({"instruction": "i", "output": "\n"}, "the output is empty, so it shows a model nothing"),
    ],
)
def test_bad_rows_in_one_sentence(columns: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^file:1: .*{sentence}"):
        read(columns)


class ThreeRounds(LightningModule):
    """A module that looks at three batches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    @property
    def finished(self) -> bool:
        return len(self.seen) >= 3

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        if not self.finished:
            self.seen.append(batch)


def test_the_same_batch_until_the_module_has_finished(tmp_path: Path, caplog: Any) -> None:
    file = tmp_path / "seeds.jsonl"
    file.write_text('{"instruction": "a", "input": "x", "output": "1"}\n{"instruction": "b", "output": "2"}\n')
    module, data = ThreeRounds(), SeedTasksDataModule(str(file))
    Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False).predict(
        module, data
    )
    assert "seeds: instruction + output; `output` -> completion; 2 rows in = 2 used; 1 with an input" in caplog.text
    assert len(module.seen) == 3
    first = module.seen[0]
    assert (first["uid"], first["prompt"], first["answer"]) == ([f"{file}:1", f"{file}:2"], ["a", "b"], ["1", "2"])
    assert [info["input"] for info in first["info"]] == ["x", ""]
    assert module.seen[1] == first == module.seen[2]


def test_other_seeds_have_another_digest(tmp_path: Path) -> None:
    digests = []
    for output in ("1", "2", "1"):
        (tmp_path / "seeds.json").write_text(json.dumps([{"instruction": "a", "output": output}]))
        data = SeedTasksDataModule(str(tmp_path / "seeds.json"))
        data.setup("predict")
        digests.append(data.batch()["info"][0]["data"])
    assert digests[0] == digests[2] != digests[1]


class Other(LightningModule):
    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing."""


def test_a_module_without_use_for_seeds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "seeds.json").write_text('[{"instruction": "a", "output": "1"}]')
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match="Other generates no tasks from seeds; set model to SelfInstructModule"):
        trainer.predict(Other(), SeedTasksDataModule(str(tmp_path / "seeds.json")))


@pytest.mark.parametrize(
    ("file", "rows", "with_input"),
    [
        ("self-instruct/seed_tasks.jsonl", 124, 90),
        ("nc-llama-factory-alpaca/alpaca_en_demo.json", 280, 110),
    ],  # 34 and 170 inputs are empty
)
def test_real_files(file: str, rows: int, with_input: int) -> None:
    if not DATA.is_dir():
        pytest.skip("no real data beside the repository")
    data = SeedTasksDataModule(str(DATA / file))
    data.setup("predict")
    assert (len(data.rows), sum(bool(row.input) for row in data.rows)) == (rows, with_input)
