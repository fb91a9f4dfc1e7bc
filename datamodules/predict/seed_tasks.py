"""Gives human-written tasks, for a model to write more of them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.utilities.types import EVAL_DATALOADERS

from datamodules.base import RowsDataModule
from datamodules.formats.instruction_shapes import first_instance
from datamodules.formats.reading import Cells, Reading
from datamodules.sources import Row, Source
from modules.types import PromptBatch


@runtime_checkable
class Finishes(Protocol):
    """A module that generates tasks from seeds until it has enough."""

    finished: bool


@dataclass(frozen=True)
class SeedTask:
    """One row: a task with its input and output."""

    instruction: str
    input: str  # "" = none
    output: str
    origin: str
    source: str


class Rounds:
    """Yields the same batch until the module has finished.

    Lightning fetches one batch ahead, so a finished module gets one more.
    """

    def __init__(self, batch: PromptBatch, module: Finishes) -> None:
        self.batch, self.module = batch, module

    def __iter__(self) -> Iterator[PromptBatch]:
        while not self.module.finished:
            yield self.batch


class SeedTasksDataModule(RowsDataModule):
    """Gives all seeds in one batch (``PromptBatch``) to ``predict``, again and again until the module has finished.

    A row holds ``instruction``, ``output`` and optionally ``input``, as in Alpaca. Or it holds ``instruction`` and
    ``instances``, as in Self-Instruct's ``seed_tasks.jsonl``; of that list, ``input`` and ``output`` of the first
    object are read.

    In the batch, ``prompt`` is the instruction, ``answer`` the output, and ``prompt_ids`` are empty. ``info`` holds
    ``input`` and, as ``data``, a digest of all rows.

    Args:
        train: the seeds: a source, or a file, a folder or a hub id.
        columns: our name of a column -> its name in the data.

    Raises:
        ValueError: in ``setup``, a row is bad, with file and line, before anything is asked; or the module cannot use
            seeds.
    """

    batch_type = PromptBatch  # the batches that a module must accept
    purpose, may_drop = "seeds", False

    def __init__(self, train: str | Source, columns: dict[str, str] | None = None) -> None:
        super().__init__(train, columns)
        self.rows: list[SeedTask] = []

    def setup(self, stage: str) -> None:
        """Read all rows. Raises ValueError when a row is bad."""
        if not self.rows:
            self.rows = self.encode_rows(
                self.train, "train", lambda row: read_seed_task(row, self.reading), lambda _: 0, 0
            )
            self.report("seeds", f"{sum(bool(row.input) for row in self.rows)} with an input")

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """Return the seeds, once per round. Raises ValueError when the module cannot use seeds."""
        module: Any = self.trainer.lightning_module if self.trainer else None
        if not isinstance(module, Finishes):
            raise ValueError(f"{type(module).__name__} generates no tasks from seeds; set model to SelfInstructModule")
        return Rounds(self.batch(), module)

    def batch(self) -> PromptBatch:
        """Return all seeds as a batch."""
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


def read_seed_task(row: Row, reading: Reading) -> SeedTask:
    """Read the texts of a row, stripped.

    Raises ValueError with the row's origin when something is missing, empty or of the wrong type.
    """
    cells = Cells(row, reading)
    asks = next((name for name in ("instruction", "prompt") if cells.has(name)), None)
    nested = cells.has("instances") and (not cells.has("completion") or "instances" in reading.by_hand)
    if asks is None or not (nested or cells.has("completion")):
        raise cells.not_found("instruction + output or instruction + instances")
    output = first_instance(cells) if nested else cells.take_text("completion")
    instruction, given = cells.take_text(asks).strip(), cells.take_text("input").strip()
    for name, text in (("instruction", instruction), ("output", output.strip())):
        if not text:
            raise ValueError(
                f"{row.origin}: the {name} is empty, so it shows a model nothing; fill it in or remove the row"
            )
    reading.close(cells, "instruction + " + ("instances" if nested else "output"))
    return SeedTask(instruction, given, output.strip(), row.origin, row.source)
