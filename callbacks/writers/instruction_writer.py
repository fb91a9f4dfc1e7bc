"""Writes the tasks that ``predict`` grew from seeds, and goes on where a killed run stopped."""

import json
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.writers.output_files import append_lines, in_run_folder, open_whole_lines, require_writable, write_whole


@runtime_checkable
class GrowsTasks(Protocol):
    """A module that makes more tasks of seeds, round by round."""

    rounds: list[Any]  # what each round brought, with ``accepted``; all but the tasks is numbers by name
    num_instructions: int  # enough
    num_accepted: int  # so far
    fruitless: int  # requests of this run since something was kept

    def identity(self) -> dict[str, str | int]:
        """What determines the tasks."""

    def summary(self) -> dict[str, float]:
        """Numbers of all rounds."""


class InstructionWriter(Callback):
    """JSONL in Alpaca's shape, one line per kept task in the order of keeping: instruction, input, output,
    most_similar, similarity.

    After each round a line with all that it brought goes to a hidden part beside ``path``, and onto the disk; a run
    that is started again goes on behind the last whole line. At the end the module's tasks become ``path`` and its
    numbers ``<path>.report.json`` (kept, rejected by reason, requests, tokens, cost, over all starts). The part is
    dropped when there are as many tasks as were wanted; otherwise another start goes on with it. A ``fast_dev_run``
    writes nothing.

    Args:
        path: the file; its parents are made, and an earlier file is replaced at the end. None = ``instructions.jsonl`` in the
            run's folder.

    Raises:
        ValueError: ``path`` is a folder, the module grows nothing, the part was begun with other seeds or settings, or
            at the end when nothing was kept.
    """

    def __init__(self, path: str | None = None) -> None:
        self._given = None if path is None else Path(path)
        self.path = self._given or Path("instructions.jsonl")  # settled at setup
        self._file: BinaryIO | None = None
        self._written = 0  # rounds on the disk

    @property
    def part(self) -> Path:
        """A hidden name beside the file."""
        return self.path.with_name(f".{self.path.name}.rounds")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything is asked."""
        if stage != "predict":
            return
        self.path = in_run_folder(trainer, self._given, "instructions.jsonl")
        if self.path.is_dir():
            raise ValueError(
                f"InstructionWriter: {self.path} is a folder; name a file, such as {self.path / 'instructions.jsonl'}"
            )
        require_writable(self.path, "InstructionWriter")
        if not isinstance(pl_module, GrowsTasks):
            raise ValueError(
                f"InstructionWriter: {type(pl_module).__name__} grows no tasks; set model to SelfInstructModule"
            )

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """At the first round: hand the module what a killed run left, and open the part."""
        if batch_idx > 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]  # Trainer sets it without declaring it
            return
        header = {**pl_module.identity(), "data": batch["info"][0].get("data")}
        lines = (
            self.part.read_bytes().split(b"\n")[:-1] if self.part.is_file() else []
        )  # a killed run may have left half a line
        first, *pl_module.rounds = [json.loads(line) for line in lines] or [header]
        if first != header:
            raise ValueError(
                f"InstructionWriter: {self.part} was begun with other seeds or settings; delete it, or go on as it was "
                "begun"
            )
        self._written = len(pl_module.rounds)
        if pl_module.rounds:
            rank_zero_info(f"instructions: going on with the {pl_module.num_accepted} that a run before this one kept")
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
        """Write the file and the report. Raises ValueError when there is nothing to write."""
        if self._file is None:
            return
        self._close()
        report = pl_module.summary()
        if not pl_module.num_accepted:
            self.part.unlink()
            raise ValueError(
                f"InstructionWriter: {write_counts(report)}, so {self.path} is not written; ask a model that keeps to the "
                "form of the list, "
                "with room for 3000 tokens"
            )
        tasks = [task for one in pl_module.rounds for task in one["accepted"]]
        write_whole(self.path.with_name(f"{self.path.name}.report.json"), json.dumps(report, indent=1) + "\n")
        write_whole(self.path, "".join(json.dumps(task, ensure_ascii=False) + "\n" for task in tasks))
        short = pl_module.num_instructions - pl_module.num_accepted
        if short > 0:
            why = f"; {short} too few, the last {pl_module.fruitless} requests brought nothing new; another start goes on from here"
        else:
            why = ""
            self.part.unlink()
        rank_zero_info(f"instructions: {self.path}: {write_counts(report)}{why}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the part: the next run goes on with it."""
        if self._file is not None:
            self._close()

    def _close(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None


def write_counts(report: dict[str, float]) -> str:
    """The report in one line."""
    counts = {
        name.rpartition("/")[2]: count
        for name, count in report.items()
        if name.startswith("rejected/") or name == "client/failed"
    }
    details = "".join(f", {count:.0f} {name}" for name, count in counts.items() if count)
    cost = f", cost {report['client/cost']:.2f}" if "client/cost" in report else ""
    return f"{report['instructions']:.0f} kept of {report['tasks']:.0f} tasks from {report['requests']:.0f} requests{details}{cost}"
