"""Prompts with several answers each, for a judge to compare or a reward to score."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.types import EVAL_DATALOADERS

from datamodules.base import RowsDataModule
from datamodules.formats.preference_shapes import read_answers, read_compared, settle_verdicts
from datamodules.formats.prompt_shapes import right_answer
from datamodules.formats.reading import Cells, Reading
from datamodules.formats.verdicts import Ours
from datamodules.sources import Row, Source
from datamodules.tokens.chat import Dialogue
from modules.types import PromptBatch


@dataclass(frozen=True)
class Candidates:
    """One row."""

    prompt: str  # as a judge reads it
    completions: list[str]  # at least two
    given: int | None  # what the data say of two completions: 1 or 2 is better, 0 = tie, None = nothing
    answer: str | None  # the right one, for a reward that checks
    columns: dict[str, Any]  # prompt and completions (and tools) as they were, text or messages, for the labelled row
    origin: str
    source: str


class CandidatesDataModule(RowsDataModule):
    """Rows in order (``PromptBatch``), once, for ``predict`` alone; with several ranks, rank r takes every world-th.

    Rows are those of :class:`PreferenceDataModule`, messages and transcripts included, and two answers or a list of them
    need no verdict. What a verdict says is kept as ``given``: 1 or 2 is better, 0 = a tie, None = nothing is said. A
    column ``answer`` is the right answer, for a reward that checks it. ``info`` of a batch holds the texts as
    ``candidates``, ``given``, the place of the row as ``row``, its ``columns`` (prompt and completions as they were), and
    as ``data`` a digest of all rows; ``prompt_ids`` are empty, since nothing is sampled.

    Args:
        train: the rows: a source, or a file, a folder or a hub id.
        columns: our column name -> the data's.
        batch_size: rows per batch and rank, what is lost at most when a run is killed.
        first_is_better: as in :class:`PreferenceDataModule`.

    Raises:
        ValueError: naming file and line, in ``setup``, before anything is judged.
    """

    batch_type = PromptBatch  # what a module must read
    purpose, may_drop = "preference", False

    def __init__(
        self,
        train: str | Source,
        columns: dict[str, str] | None = None,
        batch_size: int = 16,
        first_is_better: Ours | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        super().__init__(train, columns)
        self.batch_size, self.first_is_better = batch_size, first_is_better
        self.rows: list[Candidates] = []

    def setup(self, stage: str) -> None:
        """Read all rows; bad ones fail here."""
        if not self.rows:
            self.rows = self.encode_rows(
                self.train, "train", lambda row: read_candidates(row, self.reading), lambda _: 0, 0
            )
            labelled = sum(row.given is not None for row in self.rows)
            self.report("candidates", f"{labelled} with a given label")

    def settle(self, rows: Sequence[Row], stage: str) -> None:
        """How columns of verdicts are read."""
        settle_verdicts(rows, self.reading, self.first_is_better)

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """All rows, in order."""
        if len(self.rows) < self.world_size:
            raise ValueError(f"{len(self.rows)} rows cannot be shared by {self.world_size} ranks; use fewer ranks")
        content = json.dumps([[row.prompt, row.completions, row.answer] for row in self.rows])
        digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        mine = range(self.rank, len(self.rows), self.world_size)
        batches = [
            self.batch(mine[start : start + self.batch_size], digest) for start in range(0, len(mine), self.batch_size)
        ]
        return self.ready_loader(batches)

    def batch(self, places: range, digest: str) -> PromptBatch:
        """The rows at these places."""
        rows = [self.rows[place] for place in places]
        return PromptBatch(
            uid=[row.origin for row in rows],
            prompt=[row.prompt for row in rows],
            prompt_ids=[[] for _ in rows],
            answer=[row.answer for row in rows],
            source=[row.source for row in rows],
            info=[
                {
                    "candidates": row.completions,
                    "given": row.given,
                    "row": place,
                    "data": digest,
                    "columns": row.columns,
                }
                for place, row in zip(places, rows, strict=True)
            ],
        )


def read_candidates(row: Row, reading: Reading) -> Candidates:
    """The prompt, the answers and the label of a row, in every shape that PreferenceDataModule reads.

    Raises ValueError with its origin when something is missing or of the wrong type.
    """
    cells = Cells(row, reading)
    compared = read_compared(cells, needs_verdict=False)
    if len(compared.answers) < 2:
        raise ValueError(f"{row.origin}: there is one answer ({compared.shape}), and a judge compares at least 2")
    asked, answers = read_answers(cells, compared.answers, template=True, chat=True, may_be_empty=True)
    answer, _ = right_answer(cells, ("answer",))
    for name in ("margin", "strength"):
        cells.take(name)
    reading.close(cells, compared.shape)
    given = None
    if compared.ranks is not None and len(answers) == 2:
        first, second = compared.ranks
        given = 0 if first == second else 1 if first < second else 2
    prompt = as_text(asked.prompt)
    if not prompt.strip():
        raise ValueError(f"{row.origin}: the prompt is empty")
    columns: dict[str, Any] = {"prompt": asked.prompt, "completions": answers}
    return Candidates(
        prompt,
        [text if isinstance(text, str) else as_text(text) for text in answers],
        given,
        answer,
        columns | ({"tools": asked.tools} if asked.tools else {}),
        row.origin,
        row.source,
    )


def as_text(dialogue: Dialogue) -> str:
    """A conversation as a judge reads it: each turn behind its role, tool calls as JSON, no reasoning. Text, and the
    only turn of a conversation, as they are."""
    if isinstance(dialogue, str):
        return dialogue
    texts = []
    for turn in dialogue:
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", [])]
        texts.append("\n".join(text for text in [turn["content"], *calls] if text))
    if len(dialogue) == 1:
        return texts[0]
    return "\n\n".join(
        f"{turn['role'].capitalize()}: {text}" for turn, text in zip(dialogue, texts, strict=True) if text
    )
