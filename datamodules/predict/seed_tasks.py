"""Human-written tasks, for a model to write more of."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import EVAL_DATALOADERS

from datamodules.base import RowsDataModule
from datamodules.formats.columns import Columns, check_mapping, renamed
from datamodules.sources import Row, Source
from datamodules.sources.files import read_rows
from modules.types import PromptBatch

KNOWN = ("instruction", "input", "output", "instances")


@runtime_checkable
class Finishes(Protocol):
    """A module that makes more of the seeds, until it has enough."""

    finished: bool


@dataclass(frozen=True)
class SeedTask:
    """One row."""

    instruction: str
    input: str  # "" = none
    output: str
    origin: str
    source: str


class Rounds:
    """The same batch, until the module has finished. Lightning fetches one batch ahead, so a finished module gets one
    more.
    """

    def __init__(self, batch: PromptBatch, module: Finishes) -> None:
        self.batch, self.module = batch, module

    def __iter__(self) -> Iterator[PromptBatch]:
        while not self.module.finished:
            yield self.batch


class SeedTasksDataModule(RowsDataModule):
    """All seeds in one batch (``PromptBatch``), again and again until the module has finished. For ``predict`` alone.

    A row holds ``instruction``, ``output`` and perhaps ``input`` (Alpaca), or ``instruction`` and ``instances``, a list
    of which the first object's ``input`` and ``output`` are read (Self-Instruct's ``seed_tasks.jsonl``). In the batch
    ``prompt`` is the instruction, ``answer`` the output, ``prompt_ids`` are empty, and ``info`` holds ``input`` and, as
    ``data``, a digest of all rows.

    Args:
        train: the seeds: a source, or a file, a folder or a hub id.
        columns: our column name -> the data's.

    Raises:
        ValueError: naming file and line, in ``setup``, before anything is asked; a module that has no use for seeds.
    """

    batch_type = PromptBatch  # what a module must read

    def __init__(self, train: str | Source, columns: dict[str, str] | None = None) -> None:
        check_mapping(columns or {}, KNOWN)
        super().__init__(train, columns)
        self.rows: list[SeedTask] = []

    def setup(self, stage: str) -> None:
        """Read all rows; bad ones fail here."""
        if not self.rows:
            self.rows = [seed_task(row, self.columns) for row in read_rows(self.train)]
            rank_zero_info(f"seeds: {len(self.rows)} tasks, {sum(bool(row.input) for row in self.rows)} with an input")

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """The seeds, once a round."""
        module: Any = self.trainer.lightning_module if self.trainer else None
        if not isinstance(module, Finishes):
            raise ValueError(f"{type(module).__name__} makes no tasks of seeds; set model to SelfInstructModule")
        return Rounds(self.batch(), module)

    def batch(self) -> PromptBatch:
        """All seeds."""
        digest = hashlib.blake2b(
            json.dumps([astuple(row)[:3] for row in self.rows]).encode(), digest_size=8
        ).hexdigest()
        return PromptBatch(
            uid=[row.origin for row in self.rows],
            prompt=[row.instruction for row in self.rows],
            prompt_ids=[[] for _ in self.rows],
            answer=[row.output for row in self.rows],
            source=[row.source for row in self.rows],
            info=[{"input": row.input, "data": digest} for row in self.rows],
        )


def seed_task(row: Row, columns: Columns) -> SeedTask:
    """The texts of a row, stripped. Raises ValueError with its origin when something is missing, empty or of the wrong
    type.
    """
    record = renamed(row, columns)
    nested = "instances" in record and ("output" not in record or "instances" in columns)
    if "instruction" not in record or not (nested or "output" in record):
        wanted = "instruction + output or instruction + instances"
        raise ValueError(
            f"{row.origin}: found the columns {', '.join(record)}; looked for {wanted}; map others with columns"
        )
    task = _first_instance(record["instances"], row.origin) if nested else record
    instruction, output = _text(record, "instruction", row.origin), _text(task, "output", row.origin)
    for name, text in (("instruction", instruction), ("output", output)):
        if not text:
            raise ValueError(
                f"{row.origin}: the {name} is empty, so it shows a model nothing; write one or remove the row"
            )
    return SeedTask(instruction, _text({"input": "", **task}, "input", row.origin), output, row.origin, row.source)


def _first_instance(instances: Any, origin: str) -> dict[str, Any]:
    if (
        not isinstance(instances, list)
        or not instances
        or not isinstance(instances[0], dict)
        or "output" not in instances[0]
    ):
        raise ValueError(f"{origin}: column 'instances' must be a list of at least one object with input and output")
    found: dict[str, Any] = instances[0]
    return found


def _text(record: dict[str, Any], name: str, origin: str) -> str:
    value = record[name]
    if name == "input" and (value is None or value != value):  # NaN, which tables hold where a cell is empty
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{origin}: {name!r} holds a {type(value).__name__}, text was expected")
    return value.strip()
