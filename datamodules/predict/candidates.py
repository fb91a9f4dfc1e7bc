"""Prompts with several answers each, for a judge to compare or a reward to score."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import EVAL_DATALOADERS

from datamodules.base import RowsDataModule
from datamodules.formats.columns import Columns, alpaca_prompt, check_mapping, final_answer, renamed
from datamodules.sources import Row, Source
from datamodules.sources.files import read_rows
from modules.types import PromptBatch

PROMPTS = ("prompt", "question", "instruction", "input")
PAIRS = {"output_1": "output_2", "response1": "response2", "chosen": "rejected"}
LABELS = ("preference", "label")
KNOWN = (*PROMPTS, "completions", *(name for pair in PAIRS.items() for name in pair), *LABELS, "answer")


@dataclass(frozen=True)
class Candidates:
    """One row."""

    prompt: str
    completions: list[str]  # at least two
    given: int | None  # what the data say of two completions: 1 or 2 is better, 0 = tie, None = nothing
    answer: str | None  # the right one, for a reward that checks
    origin: str
    source: str


class CandidatesDataModule(RowsDataModule):
    """Rows in order (``PromptBatch``), once, for ``predict`` alone; with several ranks, rank r takes every world-th.

    A row holds ``prompt``, ``question``, ``instruction`` (with ``input`` or without) or ``input``, and the texts
    ``completions`` (a list), ``output_1`` and ``output_2``, ``response1`` and ``response2``, or ``chosen`` and
    ``rejected``. A column ``preference`` or ``label`` tells which of two is better as a person saw it: 1, 2, 0 or
    ``Tie``, or a number between 1 and 2; of ``chosen`` and ``rejected`` it is the first. A column ``answer`` is the
    right answer, for a reward that checks it. ``info`` of a batch holds the texts as ``candidates``, that label as
    ``given`` (1, 2, 0, None), the place of the row as ``row``, and as ``data`` a digest of all rows; ``prompt_ids`` are
    empty, since nothing is sampled.

    Args:
        train: the rows: a source, or a file, a folder or a hub id.
        columns: our column name -> the data's.
        batch_size: rows per batch and rank, what is lost at most when a run is killed.

    Raises:
        ValueError: naming file and line, in ``setup``, before anything is judged.
    """

    batch_type = PromptBatch  # what a module must read

    def __init__(self, train: str | Source, columns: dict[str, str] | None = None, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        check_mapping(columns or {}, KNOWN)
        super().__init__(train, columns)
        self.batch_size = batch_size
        self.rows: list[Candidates] = []

    def setup(self, stage: str) -> None:
        """Read all rows; bad ones fail here."""
        if not self.rows:
            self.rows = [candidates(row, self.columns) for row in read_rows(self.train)]
            labelled = sum(row.given is not None for row in self.rows)
            rank_zero_info(f"candidates: {len(self.rows)} rows, {labelled} with a given label")

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
                {"candidates": row.completions, "given": row.given, "row": place, "data": digest}
                for place, row in zip(places, rows, strict=True)
            ],
        )


def candidates(row: Row, columns: Columns) -> Candidates:
    """The texts and the label of a row. Raises ValueError with its origin when something is missing or of the wrong
    type.
    """
    record = renamed(row, columns)
    found, completions = _completions(record, columns, row.origin)
    given = 1 if found == "chosen" else _given(record, columns, len(completions), row.origin)
    return Candidates(
        _prompt(record, columns, row.origin), completions, given, _answer(record, row.origin), row.origin, row.source
    )


def _present(names: tuple[str, ...], record: Mapping[str, Any], columns: Columns) -> str | None:
    """The first name that there is, those mapped by hand before those found."""
    return next((name for name in sorted(names, key=lambda name: name not in columns) if name in record), None)


def _prompt(record: Mapping[str, Any], columns: Columns, origin: str) -> str:
    name = _present(PROMPTS, record, columns)
    if name is None:
        raise ValueError(
            f"{origin}: found the columns {', '.join(record)} and no prompt: {' or '.join(PROMPTS)}; map it with "
            "data.columns"
        )
    text = alpaca_prompt(record, origin) if name == "instruction" else _text(record[name], name, origin)
    if not text.strip():
        raise ValueError(f"{origin}: the prompt (column {name!r}) is empty")
    return text


def _completions(record: Mapping[str, Any], columns: Columns, origin: str) -> tuple[str, list[str]]:
    """The (first) column that holds them, and the texts."""
    firsts = ("completions", *(first for first, second in PAIRS.items() if first in record and second in record))
    found = _present(firsts, record, columns)
    if found == "completions":
        texts = record["completions"]
        if not isinstance(texts, list) or len(texts) < 2:
            raise ValueError(f"{origin}: column 'completions' must be a list of at least 2 texts to compare")
        return found, [_text(text, "completions", origin) for text in texts]
    if found is not None:
        return found, [_text(record[name], name, origin) for name in (found, PAIRS[found])]
    wanted = " or ".join(["completions", *(" + ".join(pair) for pair in PAIRS.items())])
    raise ValueError(
        f"{origin}: found the columns {', '.join(record)} and no answers to compare: {wanted}; map them with "
        "data.columns"
    )


def _given(record: Mapping[str, Any], columns: Columns, num_completions: int, origin: str) -> int | None:
    """1, 2, 0 = tie, or None without a label."""
    name = _present(LABELS, record, columns)
    value = record[name] if name is not None and num_completions == 2 else None
    if value is None or value != value:  # NaN, which tables hold where a cell is empty
        return None
    if isinstance(value, str) and value.strip().lower() == "tie":
        return 0
    try:
        number = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = -1.0
    if number != 0 and not 1 <= number <= 2:
        raise ValueError(
            f"{origin}: column {name!r} holds {value!r}; expected 1, 2, 0 or Tie, a number between 1 and 2, or nothing"
        )
    return 0 if number in (0, 1.5) else 1 if number < 1.5 else 2


def _answer(record: Mapping[str, Any], origin: str) -> str | None:
    """The right answer, None without one."""
    answer = record.get("answer")
    if isinstance(answer, dict | list):
        raise ValueError(f"{origin}: column 'answer' holds a {type(answer).__name__}, a single answer was expected")
    return final_answer(answer)


def _text(value: Any, name: str, origin: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{origin}: column {name!r} holds a {type(value).__name__}, text was expected")
    return value
