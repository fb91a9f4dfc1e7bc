"""Writes the labels of ``predict`` as rows of JSON. A killed run continues where it stopped."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
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
from modules.types import Record


@runtime_checkable
class Labels(Protocol):
    """A module that labels rows."""

    done: set[str]  # uids that are labelled already and are skipped
    record: Record  # its ``labels`` are those of the last batch

    def identity(self) -> dict[str, str | int]:
        """Return what determines the labels."""

    def summary(self, records: list[dict[str, Any]]) -> dict[str, float]:
        """Return the numbers of the report."""


class ResumableJsonl(Callback):
    """Writes JSONL with one line per labelled row, in the order of the data.

    A subclass names the modules that it accepts and words the report.

    After each batch, every rank appends its records to a hidden part file beside ``path`` and flushes them to disk. A
    run that is started again skips every row with a valid label in the part files, also on another number of ranks.
    Rows without a valid label are tried again.

    At the end, rank zero writes ``path`` and ``<path>.report.json`` and deletes the parts. The ranks must share that
    disk. A ``fast_dev_run`` writes nothing.

    Args:
        path: the file; its parent folders are made, and an earlier file is replaced at the end. None = ``file`` in the
            run's folder, or the next free name there.

    Raises:
        ValueError: the command is not ``predict``, ``path`` is a folder or cannot be written, the module does not
            label, the part files were started with another module or other rows, or at the end when no row has a valid
            label.
    """

    reads: type = Labels  # protocol of the modules whose labels this writer accepts
    module: str  # name of such a module, for messages
    begun_with: str  # what another run's part files were begun with, for messages
    file: str  # default name in the run's folder

    def __init__(self, path: str | None = None) -> None:
        self._given = None if path is None else Path(path)
        self.path = self._given or Path(self.file)  # settled at setup
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}  # first line of a part file: the settings that determine the labels
        self._used: Counter[str] = Counter()  # usage after the last batch

    @property
    def name(self) -> str:
        """The class as the user names it."""
        return type(self).__name__

    def usage(self, pl_module: Any) -> dict[str, float]:
        """Return what labelling has cost so far; the report sums it over all starts."""
        return {}

    def report(self, trainer: Trainer, report: dict[str, float]) -> str:
        """Return the report in one line, and log it if wanted; called on rank zero."""
        raise NotImplementedError

    def head(self, trainer: Trainer, pl_module: Any, batch: Any) -> dict[str, Any]:
        """Return what determines the lines; a run continues the part files of an earlier run only if both agree in it."""
        return {**pl_module.identity(), "data": batch["info"][0].get("data")}

    def skip(self, trainer: Trainer, pl_module: Any, records: list[dict[str, Any]]) -> None:
        """Tell the module to skip the rows that are in the records of earlier runs."""
        pl_module.done = {record["uid"] for record in records if record.get("label") is not None}
        if pl_module.done:
            rank_zero_info(f"labels: resuming with the {len(pl_module.done)} rows that an earlier run labelled")

    def take(self, pl_module: Any) -> list[dict[str, Any]]:
        """Return the records of the last batch."""
        return list(pl_module.record.labels)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything is labelled."""
        require_predict(stage, self.name)
        self.path = find_free_file(trainer, self._given, self.file, resumes=True)
        if self.path.is_dir():
            raise ValueError(f"{self.name}: {self.path} is a folder; name a file, such as {self.path / 'rows.jsonl'}")
        require_writable(self.path, self.name)
        if not isinstance(pl_module, self.reads):
            raise ValueError(
                f"{self.name} cannot write the results of {type(pl_module).__name__}; set model to {self.module}"
            )
        twins = [each for each in trainer.callbacks if isinstance(each, ResumableJsonl) and each is not self]  # type: ignore[attr-defined]
        if any(each.path.absolute() == self.path.absolute() for each in twins):
            raise ValueError(f"{self.name}: another writer of this run writes {self.path} too; name another path")

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """At the first batch, read the part files of a killed run."""
        if batch_idx > 0:
            return
        self._header = self.head(trainer, pl_module, batch)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # Trainer sets it without declaring it
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_whole_lines(self._part(trainer.global_rank))
        records = self.read_parts()
        self.skip(trainer, pl_module, records)
        self._used = Counter(self.usage(pl_module))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the records of the batch and what they cost, all or nothing."""
        if self._file is None:
            return
        used = Counter(self.usage(pl_module))
        spent = {name: value - self._used[name] for name, value in used.items()}
        self._used = used
        self._append([*self.take(pl_module), {"usage": spent}])

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Join the part files."""
        if self._file is None:
            return
        trainer.strategy.barrier("labels")
        if trainer.is_global_zero:
            self.join(trainer, pl_module)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the part file, from which the next run continues, unless nothing was written."""
        if self._file is not None:
            with suppress(OSError):  # a full disk
                self._close()
            part = self._part(trainer.global_rank)
            if part.is_file() and not part.stat().st_size:
                part.unlink()

    def join(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the file and the report from the part files, and delete these; called on rank zero."""
        lines = self.read_parts()
        records: dict[int, dict[str, Any]] = {}
        for record in lines:
            if "row" in record and (record["row"] not in records or record["label"] is not None):
                records[record["row"]] = record
        ordered = [records[row] for row in sorted(records)]
        labels = [record["label"] for record in ordered if record["label"] is not None]
        if not labels:
            raise ValueError(
                f"{self.name}: none of {len(ordered)} rows got a valid label, so {self.path} is not written; check "
                "what the judge replies"
            )
        report = pl_module.summary(ordered)
        for record in lines:
            for name, value in record.get("usage", {}).items():
                report[name] = report.get(name, 0.0) + value
        self.finish(report, labels)
        rank_zero_info(f"labels: {self.path}: {self.report(trainer, report)}")

    def finish(self, report: Mapping[str, float], rows: list[Any]) -> None:
        """Write the report and the rows, and delete the part files."""
        write_whole(self.path.with_name(f"{self.path.name}.report.json"), json.dumps(report, indent=1) + "\n")
        write_whole(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for part in self._parts():
            part.unlink()

    def read_parts(self, parts: Iterable[Path] | None = None) -> list[dict[str, Any]]:
        """Read the lines after the headers of part files, by default of all parts of this writer. Raises ValueError
        when a header belongs to another run.
        """
        lines: list[dict[str, Any]] = []
        for part in self._parts() if parts is None else parts:
            whole = part.read_bytes().split(b"\n")[:-1]  # a killed run may have left half a line
            first, *rest = [json.loads(line) for line in whole] or [self._header]
            if first != self._header:
                raise ValueError(
                    f"{self.name}: {part} was started with {self.begun_with}; delete it, or use the earlier ones again"
                )
            lines += rest
        return lines

    def _append(self, records: list[dict[str, Any]]) -> None:
        """Add records to the part file of this rank, which begins with the header."""
        assert self._file is not None
        append_lines(self._file, [*([self._header] if self._file.tell() == 0 else []), *records])

    def _close(self) -> None:
        assert self._file is not None
        file, self._file = self._file, None
        file.close()

    def _part(self, rank: int) -> Path:
        """Return the hidden name of a rank's part file beside ``path``."""
        return self.path.with_name(f".{self.path.name}.rank{rank}")

    def _parts(self) -> list[Path]:
        """Return the part files that exist, of this run and of killed ones."""
        if not self.path.parent.is_dir():
            return []
        return sorted(path for path in self.path.parent.iterdir() if path.name.startswith(f".{self.path.name}.rank"))
