"""Writes the tasks that ``predict`` generates from seeds. A killed run continues where it stopped."""

import json
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.writers.output_files import (
    append_lines,
    find_free_file,
    open_whole_lines,
    require_predict,
    write_whole,
)
from modules.trainer.saving import require_writable


@runtime_checkable
class GrowsTasks(Protocol):
    """A module that generates more tasks from seeds, round by round."""

    rounds: list[Any]  # the result of each round: ``accepted`` holds its tasks, every other key a number
    num_instructions: int  # tasks that are wanted
    num_accepted: int  # tasks kept so far
    fruitless: int  # requests of this run since a task was last kept

    def identity(self) -> dict[str, str | int]:
        """Return what determines the tasks."""

    def summary(self) -> dict[str, float]:
        """Return the numbers of all rounds."""


class InstructionWriter(Callback):
    """Writes JSONL in Alpaca's format, one line per kept task: instruction, input, output, most_similar, similarity.

    Tasks stand in the order in which they were kept. After each round, one line with its result is written to a hidden
    part file beside ``path`` and flushed to disk. A run that is started again continues after the last whole line.

    At the end, the tasks are written to ``path`` and the numbers to ``<path>.report.json``: kept, rejected by reason,
    requests, tokens and cost over all starts. The part file is deleted when there are enough tasks; otherwise another
    start continues from it. A ``fast_dev_run`` writes nothing.

    Args:
        path: the file; its parent folders are made, and an earlier file is replaced at the end. None =
            ``instructions.jsonl`` in the run's folder, or the next free name there.

    Raises:
        ValueError: the command is not ``predict``, ``path`` is a folder or cannot be written, the module generates no
            tasks, the part file was started with other seeds or settings, or at the end when no task was kept.
    """

    def __init__(self, path: str | None = None) -> None:
        self._given = None if path is None else Path(path)
        self.path = self._given or Path("instructions.jsonl")  # settled at setup
        self._file: BinaryIO | None = None
        self._written = 0  # rounds in the part file

    @property
    def part(self) -> Path:
        """The hidden part file beside ``path``."""
        return self.path.with_name(f".{self.path.name}.rounds")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before any request is sent."""
        require_predict(stage, "InstructionWriter")
        self.path = find_free_file(trainer, self._given, "instructions.jsonl", resumes=True)
        if self.path.is_dir():
            raise ValueError(
                f"InstructionWriter: {self.path} is a folder; name a file, such as {self.path / 'instructions.jsonl'}"
            )
        require_writable(self.path, "InstructionWriter")
        if not isinstance(pl_module, GrowsTasks):
            raise ValueError(
                f"InstructionWriter: {type(pl_module).__name__} generates no tasks; set model to SelfInstructModule"
            )

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """At the first round, give the module the rounds of a killed run, and open the part file."""
        if batch_idx > 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]  # Trainer sets it without declaring it
            return
        header = {**pl_module.identity(), "data": batch["info"][0].get("data")}
        lines = (
            self.part.read_bytes().split(b"\n")[:-1] if self.part.is_file() else []
        )  # a killed run may have left half a line
        first, *pl_module.rounds = [json.loads(line) for line in lines] or [header]
        if first != header:
            raise ValueError(
                f"InstructionWriter: {self.part} was started with other seeds or settings; delete it, or use those "
                "seeds and settings again"
            )
        self._written = len(pl_module.rounds)
        if pl_module.rounds:
            rank_zero_info(f"instructions: resuming with the {pl_module.num_accepted} that an earlier run kept")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_whole_lines(self.part)
        if not lines:
            append_lines(self._file, [header])

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the round."""
        new = pl_module.rounds[self._written :]
        if self._file is None or not new:
            return
        append_lines(self._file, new)
        self._written += len(new)
        rank_zero_info(f"instructions: round {self._written}: {pl_module.num_accepted} of {pl_module.num_instructions}")

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the file and the report. Raises ValueError when no task was kept."""
        if self._file is None:
            return
        self._close()
        report = pl_module.summary()
        if not pl_module.num_accepted:
            self.part.unlink()
            raise ValueError(
                f"InstructionWriter: {write_counts(report)}, so {self.path} is not written; use a model that follows "
                "the format of the list, with room for 3000 tokens"
            )
        tasks = [task for one in pl_module.rounds for task in one["accepted"]]
        write_whole(self.path.with_name(f"{self.path.name}.report.json"), json.dumps(report, indent=1) + "\n")
        write_whole(self.path, "".join(json.dumps(task, ensure_ascii=False) + "\n" for task in tasks))
        short = pl_module.num_instructions - pl_module.num_accepted
        if short > 0:
            why = (
                f"; {short} are missing, the last {pl_module.fruitless} requests gave no new task; start again to "
                "continue from here"
            )
        else:
            why = ""
            self.part.unlink()
        rank_zero_info(f"instructions: {self.path}: {write_counts(report)}{why}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the part file: the next run continues from it."""
        if self._file is not None:
            self._close()

    def _close(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None


def write_counts(report: dict[str, float]) -> str:
    """Return the report in one line."""
    counts = {
        name.rpartition("/")[2]: count
        for name, count in report.items()
        if name.startswith("rejected/") or name == "client/failed"
    }
    details = "".join(f", {count:.0f} {name}" for name, count in counts.items() if count)
    cost = f", cost {report['client/cost']:.2f}" if "client/cost" in report else ""
    return (
        f"{report['instructions']:.0f} kept of {report['tasks']:.0f} tasks from {report['requests']:.0f} requests"
        f"{details}{cost}"
    )
