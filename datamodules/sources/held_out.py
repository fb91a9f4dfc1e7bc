"""Holds out a share of a data set's training rows for validation."""

import json
from collections import defaultdict
from collections.abc import Mapping
from hashlib import blake2b

from datamodules.formats.reading import find_at_path, with_nested, without_nulls
from datamodules.formats.table import our_names
from datamodules.sources.source import Row, Source

ASKED = (
    "prompt",
    "instruction",
    "input",
    "context",
    "documents",
    "options",
)  # two rows that agree in these columns ask the same question


class Part(Source):
    """One side of a split.

    Args:
        rows: the rows of this side, at least one.
        whole: all rows of the data set. They settle what only a whole column can tell, such as its scale of labels.
    """

    def __init__(self, rows: list[Row], whole: list[Row]) -> None:
        self._rows, self.whole = rows, whole

    def rows(self) -> list[Row]:
        """Return the rows of this side, in the order of the data set."""
        return self._rows


def parse_share(val: object) -> float | None:
    """Return the share that ``val`` asks for, as a number or as text; None where ``val`` names something else.

    Raises ValueError when the number is outside (0, 1).

    >>> parse_share("0.05"), parse_share("rows.jsonl")
    (0.05, None)
    """
    try:
        share = None if isinstance(val, bool) or not isinstance(val, int | float | str) else float(val)
    except ValueError:
        return None
    if share is not None and not 0 < share < 1:
        raise ValueError(f"val must be a share between 0 and 1, such as 0.05, or name held-out rows; got {val!r}")
    return share


def hold_out(rows: list[Row], share: float, seed: int, columns: Mapping[str, str]) -> tuple[Part, Part]:
    """Split rows into training and held-out rows. Rows that ask the same stay on one side.

    A hash of ``seed`` and of what a row asks decides. The held-out side gets the questions with the smallest hashes, at
    least one, so that its rows come nearest to ``share`` of all. A row that asks nothing, such as a document or a
    conversation, goes by its whole content.

    Args:
        rows: the rows of the data set.
        share: share of the rows to hold out, in (0, 1).
        seed: seed of the hash.
        columns: our name of a column -> its name in the data.

    Raises:
        ValueError: all rows ask the same, so that one side would be empty.
    """
    alike: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        alike[_hash(row, seed, columns)].append(place)
    if len(alike) < 2:
        raise ValueError(
            f"{rows[0].origin}: all {len(rows)} rows ask the same, so none can be held out; name val by file"
        )
    held: set[int] = set()
    for places in [alike[key] for key in sorted(alike)][:-1]:
        if held and abs(len(held) + len(places) - share * len(rows)) >= abs(len(held) - share * len(rows)):
            break
        held.update(places)
    sides = [[row for place, row in enumerate(rows) if (place in held) == wanted] for wanted in (False, True)]
    return Part(sides[0], rows), Part(sides[1], rows)


def _hash(row: Row, seed: int, columns: Mapping[str, str]) -> str:
    by_hand = {theirs: ours for ours, theirs in columns.items()}
    values = with_nested(row.columns) | {
        name: found[0] for name in by_hand if (found := find_at_path(row.columns, name))
    }
    names = our_names(tuple(values)) | by_hand
    asked = {name: value for name, value in values.items() if names.get(name) in ASKED and value}
    key = json.dumps(without_nulls(asked or row.columns), sort_keys=True, default=str)
    return blake2b(f"{seed} {key}".encode(errors="replace"), digest_size=16).hexdigest()
