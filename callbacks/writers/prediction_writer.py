"""Writes what ``predict`` sampled and scored.

Rejection sampling, difficulty filters, best-of-n and distillation start from this file.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.phase import record_of
from callbacks.writers.output_files import claim, find_free_file
from modules.trainer.saving import naming, require_writable, sync
from modules.types import HasAskedRows, Rollout


class PredictionWriter(Callback):
    """Writes JSONL, one line per completion: uid, prompt, completion, answer, reward, rewards by name, finish,
    num_tokens. A completion that called tools is its last turn; ``tool_turns`` holds all of them.

    A prompt is written as the policy read it. A DataModule reads a prompt that the chat template has rendered as it
    stands. To read plain prompts it needs ``chat: false`` if the tokenizer has a template; the run says so.

    Each rank writes a hidden part file beside ``path``. At the end of ``predict``, rank zero joins the parts in the
    order of the ranks and renames the result, so ``path`` is never half a file. The ranks must share that disk. A
    ``fast_dev_run`` writes nothing.

    Args:
        path: the file; its parent folders are made, and an earlier file is replaced. None = ``predictions.jsonl`` in
            the run's folder, or the next free name there.

    Raises:
        ValueError: in ``setup`` of ``predict``, when ``path`` is a folder or cannot be written.
    """

    def __init__(self, path: str | None = None) -> None:
        self._given = None if path is None else Path(path)
        self.path = self._given or Path("predictions.jsonl")  # settled at setup
        self._file: TextIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a path that cannot be written before anything is sampled."""
        if stage != "predict":
            return
        self.path = find_free_file(trainer, self._given, "predictions.jsonl")
        if self.path.is_dir():
            raise ValueError(
                f"PredictionWriter: {self.path} is a folder; name a file, such as {self.path / 'predictions.jsonl'}"
            )
        require_writable(self.path, "PredictionWriter")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this rank's part file."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # Trainer sets it without declaring it
            part = self._part(trainer.global_rank)
            part.parent.mkdir(parents=True, exist_ok=True)
            file = part.open("a", encoding="utf-8")
            claim(file, self.path)
            file.truncate(0)  # of a killed run
            self._file = file

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rollouts of the batch."""
        if self._file is not None:
            with naming(self.path):
                self._file.writelines(write_line(rollout) for rollout in record_of(pl_module).rollouts)
                self._file.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the part files."""
        if self._file is None:
            return
        trainer.strategy.barrier("predictions")  # every batch was flushed
        if trainer.is_global_zero:
            self._join(trainer.world_size)
            rank_zero_info(f"predictions: {self.path}{tell_how_to_read(trainer, pl_module)}")
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Delete the part file; an earlier file stays."""
        if self._file is not None:
            with suppress(OSError):  # a full disk
                self._close()
            self._part(trainer.global_rank).unlink(missing_ok=True)

    def _join(self, num_ranks: int) -> None:
        with naming(self.path):
            with self._part(0).open("ab") as whole:
                for rank in range(1, num_ranks):
                    with self._part(rank).open("rb") as part:
                        shutil.copyfileobj(part, whole)
                    self._part(rank).unlink()
            sync(self._part(0))
            self._part(0).replace(self.path)
            sync(self.path.parent)

    def _close(self) -> None:
        assert self._file is not None
        file, self._file = self._file, None
        file.close()

    def _part(self, rank: int) -> Path:
        """Return a hidden name beside the file. It is on the same disk, so that the rename is atomic."""
        return self.path.with_name(f".{self.path.name}.rank{rank}")


def tell_how_to_read(trainer: Trainer, pl_module: Any) -> str:
    """Return the end of a sentence that says which setting reads the prompts unchanged; "" where none is needed."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, HasAskedRows) or pl_module.tokenizer.chat_template is None:
        return ""
    plain = any(not row.chat for row in data.asked_rows())
    return "; some prompts are texts of the rows as they stand: read the file with data.chat: false" if plain else ""


def write_line(rollout: Rollout) -> str:
    """Return one rollout as a line of JSON."""
    completion = rollout.completion
    record = {
        "uid": rollout.uid,
        "prompt": rollout.prompt,
        "completion": completion.text,
        "answer": rollout.answer,
        "reward": rollout.reward,
        "rewards": rollout.rewards,
        "finish": completion.finish,
        "num_tokens": completion.length,
    }
    if completion.transcript is not None:
        record["tool_turns"] = completion.transcript
    return json.dumps(record, ensure_ascii=False) + "\n"
