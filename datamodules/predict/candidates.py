"""Gives prompts with several answers each, for a judge to compare or a reward to score."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.types import EVAL_DATALOADERS

from datamodules.base import RowsDataModule
from datamodules.formats.preference_shapes import read_answers, read_compared, settle_verdicts
from datamodules.formats.prompt_shapes import right_answer, settle_choices
from datamodules.formats.reading import Cells, Reading
from datamodules.formats.verdicts import Ours
from datamodules.sources import Row, Source
from datamodules.tokens.encoding import Dialogue
from modules.types import PromptBatch


@dataclass(frozen=True)
class Candidates:
    """One row: a prompt with its candidate answers."""

    prompt: str  # text that a judge reads
    completions: list[str]  # at least two
    given: int | None  # the data's own label of two completions: 1 or 2 = the better one, 0 = tie, None = no label
    answer: str | None  # the right answer, for a reward that checks it
    columns: dict[str, Any]  # prompt and completions (and tools) as given, text or messages, for the labelled row
    origin: str
    source: str


class CandidatesDataModule(RowsDataModule):
    """Gives rows with candidate answers to ``predict``, once and in order (``PromptBatch``).

    With several ranks, rank r takes row r and every row ``world_size`` further on. The shapes of rows are those of
    :class:`PreferenceDataModule`, messages and transcripts included. Two answers or a list of answers need no verdict.

    A batch holds no ``prompt_ids``, because nothing is sampled. ``answer`` is the right answer, for a reward that
    checks it. ``info`` holds

    - ``candidates``: the texts of the answers.
    - ``given``: the data's own verdict, 1 or 2 = the better answer, 0 = a tie, None = no verdict.
    - ``row``: the index of the row. ``data``: a digest of all rows.
    - ``columns``: prompt and completions as they were given.

    Args:
        train: the rows: a source, or a file, a folder or a hub id.
        columns: our name of a column -> its name in the data.
        batch_size: rows per batch and rank, >= 1. A killed run loses at most one batch.
        first_is_better: as in :class:`PreferenceDataModule`.

    Raises:
        ValueError: ``batch_size`` is below 1; in ``setup``, a row is bad, with file and line, before anything is
            judged.
    """

    batch_type = PromptBatch  # the batches that a module must accept
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
        """Read all rows. Raises ValueError when a row is bad."""
        if not self.rows:
            self.rows = self.encode_rows(
                self.train, "train", lambda row: read_candidates(row, self.reading), lambda _: 0, 0
            )
            labelled = sum(row.given is not None for row in self.rows)
            self.report("candidates", f"{labelled} with a given label")

    def settle(self, rows: Sequence[Row], stage: str) -> None:
        """Settle how columns of verdicts, and numbers beside options, are read."""
        settle_verdicts(rows, self.reading, self.first_is_better)
        settle_choices(self.reading.rows_with(rows, "options"), self.reading, ("answer",))

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """Return this rank's rows in batches, in order. Raises ValueError when there are fewer rows than ranks."""
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
        """Return the rows at these places as a batch."""
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
    """Read prompt, answers and label of a row, in every shape that ``PreferenceDataModule`` reads.

    Raises ValueError with the row's origin when something is missing or of the wrong type.
    """
    cells = Cells(row, reading)
    compared = read_compared(cells, needs_verdict=False)
    if len(compared.answers) < 2:
        raise ValueError(f"{row.origin}: there is one answer ({compared.shape}), and a judge compares at least 2")
    asked, answers = read_answers(cells, compared.answers, template=True, chat=True, may_be_empty=True)
    answer = None if "answer" in cells.roles.values() else right_answer(cells, ("answer",))[0]  # Nectar's are compared
    for name in ("margin", "strength"):
        cells.take(name)
    reading.close(cells, compared.shape)
    given = None
    if compared.ranks is not None and len(answers) == 2:
        first, second = compared.ranks
        given = 0 if first == second else 1 if first < second else 2
    prompt = write_dialogue(asked.prompt)
    if not prompt.strip():
        raise ValueError(f"{row.origin}: the prompt is empty")
    columns: dict[str, Any] = {"prompt": asked.prompt, "completions": answers}
    return Candidates(
        prompt,
        [text if isinstance(text, str) else write_dialogue(text) for text in answers],
        given,
        answer,
        columns | ({"tools": asked.tools} if asked.tools else {}),
        row.origin,
        row.source,
    )


def write_dialogue(dialogue: Dialogue) -> str:
    """Return a conversation as the text that a judge reads.

    Each turn follows the name of its role. Tool calls are JSON, and reasoning is left out. A text, and the only turn of
    a conversation, stay as they are.
    """
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
