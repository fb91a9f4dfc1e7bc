"""Writes what a module labels in ``predict`` as rows of JSON, and goes on where a killed run stopped."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.writers.output_files import (
    append_lines,
    in_run_folder,
    open_whole_lines,
    require_writable,
    write_whole,
)
from modules.types import Record


@runtime_checkable
class Labels(Protocol):
    """A module that labels rows."""

    done: set[str]  # uids that it must not label again
    record: Record  # ``labels`` of the last batch

    def identity(self) -> dict[str, str | int]:
        """What determines the labels."""

    def summary(self, records: list[dict[str, Any]]) -> dict[str, float]:
        """Numbers of the records."""


class ResumableJsonl(Callback):
    """JSONL with one line per labelled row, in the order of the data; a subclass says what labels and what the report
    reads.

    After each batch every rank adds its records to a hidden part beside ``path`` and waits until they are on the disk;
    a run that is started again labels nothing that the parts hold, also with another number of ranks. Rows without a
    valid label are tried again then. At the end rank zero writes ``path`` and ``<path>.report.json`` and drops the
    parts. The ranks must share that disk. A ``fast_dev_run`` writes nothing.

    Args:
        path: the file; its parents are made, and an earlier file is replaced at the end. None = ``file`` in the
            run's folder.

    Raises:
        ValueError: ``path`` is a folder, the module does not label, the parts were begun with another module or other
            rows, or at the end when no row has a valid label.
    """

    reads: type = Labels  # the protocol of the modules that label for this writer
    module: str  # the name of such a module
    begun_with: str  # what parts of another run differ in
    file: str  # its name in the run's folder

    def __init__(self, path: str | None = None) -> None:
        self._given = None if path is None else Path(path)
        self.path = self._given or Path(self.file)  # settled at setup
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}  # what a part begins with
        self._used: Counter[str] = Counter()  # as of the last batch

    @property
    def name(self) -> str:
        """As the user names it."""
        return type(self).__name__

    def usage(self, pl_module: Any) -> dict[str, float]:
        """What labelling has cost so far, summed over all starts in the report."""
        return {}

    def report(self, trainer: Trainer, report: dict[str, float]) -> str:
        """The report in one line, on rank zero; the place to log it, too."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything is asked."""
        if stage != "predict":
            return
        self.path = in_run_folder(trainer, self._given, self.file)
        if self.path.is_dir():
            raise ValueError(f"{self.name}: {self.path} is a folder; name a file, such as {self.path / 'rows.jsonl'}")
        require_writable(self.path, self.name)
        if not isinstance(pl_module, self.reads):
            raise ValueError(f"{self.name}: {type(pl_module).__name__} labels nothing; set model to {self.module}")

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """At the first batch: read the parts of a killed run."""
        if batch_idx > 0:
            return
        self._header = {**pl_module.identity(), "data": batch["info"][0].get("data")}
        records = self._read_parts()
        pl_module.done = {record["uid"] for record in records if record.get("label") is not None}
        self._used = Counter(self.usage(pl_module))
        if pl_module.done:
            rank_zero_info(f"labels: going on with the {len(pl_module.done)} rows that a run before this one labelled")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the records of the batch and what they cost, all or nothing."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Trainer sets it without declaring it
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_whole_lines(self._part(trainer.global_rank))
            if self._file.tell() == 0:
                append_lines(self._file, [self._header])
        used = Counter(self.usage(pl_module))
        spent = {name: value - self._used[name] for name, value in used.items()}
        self._used = used
        append_lines(self._file, [*pl_module.record.labels, {"usage": spent}])

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Join the parts."""
        if self._file is None:
            return
        self._close()
        trainer.strategy.barrier("labels")
        if trainer.is_global_zero:
            self._join(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the part: the next run goes on with it."""
        if self._file is not None:
            self._close()

    def _join(self, trainer: Trainer, pl_module: Labels) -> None:
        parts, lines = self._parts(), self._read_parts()
        records: dict[int, dict[str, Any]] = {}
        for record in lines:
            if "row" in record and (record["row"] not in records or record["label"] is not None):
                records[record["row"]] = record
        ordered = [records[row] for row in sorted(records)]
        labels = [record["label"] for record in ordered if record["label"] is not None]
        if not labels:
            raise ValueError(
                f"{self.name}: not one of {len(ordered)} rows got a valid label, so {self.path} is not written; look "
                "at a reply"
            )
        report = pl_module.summary(ordered)
        for record in lines:
            for name, value in record.get("usage", {}).items():
                report[name] = report.get(name, 0.0) + value
        write_whole(self.path.with_name(f"{self.path.name}.report.json"), json.dumps(report, indent=1) + "\n")
        write_whole(self.path, "".join(json.dumps(label, ensure_ascii=False) + "\n" for label in labels))
        for part in parts:
            part.unlink()
        rank_zero_info(f"labels: {self.path}: {self.report(trainer, report)}")

    def _read_parts(self) -> list[dict[str, Any]]:
        """The lines of all parts behind their headers. Raises ValueError when one begins with another header."""
        lines: list[dict[str, Any]] = []
        for part in self._parts():
            whole = part.read_bytes().split(b"\n")[:-1]  # a killed run may have left half a line
            first, *rest = [json.loads(line) for line in whole] or [self._header]
            if first != self._header:
                raise ValueError(
                    f"{self.name}: {part} was begun with {self.begun_with}; delete it, or go on as it was begun"
                )
            lines += rest
        return lines

    def _close(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None

    def _part(self, rank: int) -> Path:
        """A hidden name beside the file."""
        return self.path.with_name(f".{self.path.name}.rank{rank}")

    def _parts(self) -> list[Path]:
        """Those there are, of this run and of killed ones."""
        if not self.path.parent.is_dir():
            return []
        return sorted(path for path in self.path.parent.iterdir() if path.name.startswith(f".{self.path.name}.rank"))
