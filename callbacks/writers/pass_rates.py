"""Writes the training rows back with the policy's pass rate on each. Curricula read this file."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.writers.output_files import find_free_file, require_predict, write_whole
from modules.trainer.ranks import from_all_ranks
from modules.trainer.saving import require_writable
from modules.types import HasPromptRows, require_accuracy


class PassRates(Callback):
    """Writes JSONL with the training rows in their order, each with what ``predict`` measured on it.

    A row keeps all its columns and gets ``<name>_rate``, the share of right completions among those that can be judged,
    [0, 1]; ``<name>_length``, their mean number of tokens; and ``<name>_truncated``, the share that does not end by
    itself, [0, 1]. They are null for a row that was not sampled, and the rate is null where nothing can be judged.
    Columns of these names are replaced. A completion is right if ``model.validation.accuracy`` scores it above 0.5, see
    ``OnPolicyModule``. The file is written at the end, or not at all. A ``fast_dev_run`` writes nothing.

    Args:
        name: the prefix of the columns: ``pass``, or ``guess`` for prompts that suppress thinking.
        path: the file; its parent folders are made, and an earlier file is replaced. None = ``rated.jsonl`` in the
            run's folder, or the next free name there.

    Raises:
        ValueError: ``name`` is no word; in ``setup``, when the command is not ``predict``, ``path`` cannot be written,
            nothing tells right from wrong, or two rows have one name.
    """

    def __init__(self, name: str = "pass", path: str | None = None) -> None:
        if not name.isidentifier():
            raise ValueError(f"PassRates: name is the beginning of column names, such as pass or guess, got {name!r}")
        self.name = name
        self._given = None if path is None else Path(path)
        self.path = self._given or Path("rated.jsonl")  # settled at setup
        self._counts: dict[str, Counter[str]] = {}  # uid -> sums over its completions on this rank

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything is sampled, data that could not be judged and a file that could not be written."""
        require_predict(stage, "PassRates")
        require_accuracy(pl_module, "PassRates")
        data = self._rows_of(trainer)
        name, count = Counter(uid for uid, _ in data).most_common(1)[0]
        if count > 1:
            raise ValueError(
                f"PassRates: {count} training rows are called {name.rpartition('#')[0]}; read every file once"
            )
        self.path = find_free_file(trainer, self._given, "rated.jsonl")
        if self.path.is_dir():
            raise ValueError(f"PassRates: {self.path} is a folder; name a file, such as {self.path / 'rated.jsonl'}")
        require_writable(self.path, "PassRates")
        self._counts = {}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the completions of the batch."""
        for outcome in require_accuracy(pl_module, "PassRates").find_outcomes():
            counts = self._counts.setdefault(outcome.uid, Counter())
            counts["sampled"] += 1
            counts["judged"] += outcome.right is not None
            counts["right"] += bool(outcome.right)
            counts["tokens"] += outcome.length
            counts["truncated"] += not outcome.stopped

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the counts of all ranks and write the rows."""
        found = dict(from_all_ranks(list(self._counts.items())))
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        rows = self._rows_of(trainer)
        measured = [self._measure(found.get(uid)) for uid, _ in rows]
        lines = [
            json.dumps(columns | measures, ensure_ascii=False) + "\n"
            for (_, columns), measures in zip(rows, measured, strict=True)
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, "".join(lines))
        rates = [rate for rate in (measures[f"{self.name}_rate"] for measures in measured) if rate is not None]
        told = [
            f"{len(rows)} rows",
            f"{rates.count(0.0)} never right",
            f"{rates.count(1.0)} always right",
            f"{len(rows) - len(rates)} not judged",
        ]
        rank_zero_info(f"{self.name}_rate: {', '.join(told)}: {self.path}")

    def _measure(self, counts: Counter[str] | None) -> dict[str, float | None]:
        values: tuple[float | None, float | None, float | None] = (None, None, None)
        if counts is not None:
            sampled, judged = counts["sampled"], counts["judged"]
            rate = counts["right"] / judged if judged else None
            values = (rate, counts["tokens"] / sampled, counts["truncated"] / sampled)
        return dict(zip([f"{self.name}_{what}" for what in ("rate", "length", "truncated")], values, strict=True))

    def _rows_of(self, trainer: Trainer) -> list[tuple[str, dict[str, Any]]]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, HasPromptRows):
            raise ValueError(
                f"PassRates writes the rows of a VerifiableDataModule, and data is {type(data).__name__}: set data to "
                "VerifiableDataModule"
            )
        return data.prompt_rows()
