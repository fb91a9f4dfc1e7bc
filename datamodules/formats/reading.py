"""How the rows of one data set are read: every column of a row is used, refused, or named as not read."""

import ast
import datetime
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datamodules.formats.strict import Refused, guess_json, load_json, load_literal
from datamodules.formats.table import (
    COMPARED,
    LEARNED,
    MODULES,
    NAMED,
    NESTED,
    WRITTEN,
    Layout,
    Purpose,
    check_mapping,
    lay_out,
    normalize,
    option_columns,
    our_names,
    suggest,
)

if TYPE_CHECKING:  # sources read rows through this file
    from datamodules.sources.source import Row

ASKS = ("prompt", "instruction")  # our columns of which a row has one, unless the other holds its text too
CHANCE = 20  # a text of at least so many characters does not stand in another one by chance
# Values of a column ``split`` that are no training rows.
OTHER_SPLITS = ("test", "val", "valid", "validation", "dev", "eval", "held_out", "heldout")
Columns = Mapping[str, str]


class UnclearColumn(ValueError):
    """Raised for columns that can be read in two ways. The fault is the data set's, so no option drops the row that
    shows it.
    """


class Reading:
    """The account of one data set: what is known of it as a whole, and what its rows were read as.

    Args:
        purpose: the kind of DataModule that reads.
        columns: our name of a column -> its name in the data, which may be a path into nested columns, such as
            ``reward_model.ground_truth``. A column that is mapped to ``""`` is not read.

    Attributes:
        settled: what only a whole column tells, by name, such as which of 0 and 1 is the first answer.
        counts: rows by what became of them: ``used``, ``too long``, ...

    Raises:
        ValueError: a mapping of names that do not exist or that ``purpose`` does not read.
    """

    def __init__(self, purpose: Purpose, columns: Columns | None = None) -> None:
        self.purpose, self.by_hand = purpose, check_mapping(columns or {}, purpose)
        self.settled: dict[str, Any] = {}
        self.counts: Counter[str] = Counter()
        self.shapes: Counter[str] = Counter()
        self._became: dict[str, Counter[str]] = {}  # the data's column -> what it was read as
        self._unread: dict[str, str] = {}  # the data's column -> why not
        self._notes: dict[str, None] = {}
        self.mapped_seen: set[str] = set()  # our names of mapped columns that some row has, or is read by
        self._layouts: dict[tuple[str, ...], Layout] = {}  # by the names of a row's columns

    def lay_out(self, columns: Mapping[str, Any]) -> Layout:
        """Find what the columns of a row mean by their names; rows with the same names share the result."""
        names = tuple(columns)
        if names not in self._layouts:
            self._layouts[names] = lay_out(names, self.by_hand)
        return self._layouts[names]

    def rows_with(self, rows: Iterable["Row"], *ours: str) -> Iterator["Cells"]:
        """Give the cells of the rows that may have one of some columns."""
        for row in rows:
            layout = self.lay_out(with_nested(row.columns))
            if any(name in layout.names or name in self.by_hand for name in ours) or (
                layout.options and "options" in ours
            ):
                yield Cells(row, self)

    def close(self, cells: "Cells", shape: str, chosen: bool = False) -> None:
        """Account for a row that was read as ``shape``; what is left of the row is named as not read.

        Raises ValueError for a column that would change what was read, and for one that another DataModule reads,
        unless the user chose (``chosen``, or by a mapping) what to read.
        """
        read = [value for theirs, value in cells.used.items() if cells.roles.get(theirs) != "tools"]
        asks_once = not (chosen or self.by_hand or "messages" in cells.roles.values())
        for ours, theirs in cells.left():
            column = NAMED[ours]
            if repeats(cells.values[theirs], read):
                self._unread.setdefault(theirs, "repeats what was read")
            elif self.purpose == "verifiable" and (not column.side or column.used_by in (COMPARED, LEARNED)):
                self._unread.setdefault(theirs, "")
            elif (
                column.side
                or not (self.purpose in column.used_by or chosen or self.by_hand)
                or (ours in ASKS and asks_once and not _stands_in(cells.values[theirs], read))
            ):
                raise ValueError(f"{cells.origin}: {self._refusal(ours, theirs, shape)}")
            else:
                self._unread.setdefault(theirs, f"the row is read as {shape}")
        for name, why in cells.unread.items():
            self._unread.setdefault(name, why)
        self.shapes[shape] += 1
        for theirs in cells.values:
            if theirs in cells.roles:
                self._became.setdefault(theirs, Counter())[cells.roles[theirs]] += 1

    def note(self, sentence: str) -> None:
        """Add a sentence to say once about the data set."""
        self._notes.setdefault(sentence)

    def refuse_unused_mapping(self, rows: Sequence["Row"], all_rows: bool = True) -> None:
        """Refuse, with a ValueError, a mapping that had no effect on any of the rows.

        Columns to leave out may stand in other rows that the run reads, unless these are ``all_rows``.
        """
        for ours, theirs in self.by_hand.items():
            if not theirs and all_rows and self.shapes and not self._has_left_out(ours):
                raise ValueError(
                    f"{rows[0].origin}: no row has a column for {ours}, which data.columns leaves out; found "
                    f"{', '.join(rows[0].columns)}; remove it from the mapping"
                )
            if theirs and self.shapes and not self.has_read(ours):
                if ours not in self.mapped_seen:
                    raise ValueError(
                        f"{rows[0].origin}: no row has the column {theirs!r} (for {ours}); found "
                        f"{', '.join(rows[0].columns)}"
                    )
                raise ValueError(
                    f"columns maps {ours} to {theirs!r}, and nothing reads it in rows that are "
                    f"{' or '.join(self.shapes)}; leave it out of the mapping"
                )

    def _has_left_out(self, ours: str) -> bool:
        """Tell whether some row has such a column, or was read otherwise for lack of it."""
        found = (ours in our_names(names).values() for names in self._layouts)
        split = (ours == "options" and option_columns(names) for names in self._layouts)
        return ours in self.mapped_seen or any(found) or any(split)

    def has_read(self, ours: str) -> bool:
        """Tell whether such a column was read in some row."""
        return any(ours in roles for roles in self._became.values())

    def drop(self, reason: str, count: int) -> None:
        """Count some of the used rows under another reason."""
        self.counts["used"] -= count
        self.counts[reason] += count

    def line(self) -> str:
        """Say how the columns were read, as :meth:`columns_line`, and what became of the rows."""
        others = [f"{count} {reason}" for reason, count in self.counts.items() if count and reason != "used"]
        rows = " + ".join([f"{self.counts['used']} used", *others])
        return f"{self.columns_line()}; {sum(self.counts.values())} rows in = {rows}"

    def columns_line(self) -> str:
        """Say the shape, which column became what, and what was not read and why."""
        parts = [" or ".join(self.shapes)]
        became = [
            f"`{theirs}` -> {' or '.join(roles)}"
            for theirs, roles in self._became.items()
            if any(role != theirs for role in roles)
        ]
        parts += [", ".join(became)] if became else []
        reasons: dict[str, list[str]] = {}
        for name, why in self._unread.items():
            if name not in self._became:
                reasons.setdefault(why, []).append(f"`{name}`")
        to_rewards = " (but by rewards, as info)" if self.purpose == "verifiable" else ""
        parts += [f"{', '.join(names)}: not read{f' ({why})' if why else to_rewards}" for why, names in reasons.items()]
        return "; ".join(filter(None, [*parts, *self._notes]))

    def _refusal(self, ours: str, theirs: str, shape: str) -> str:
        column = NAMED[ours]
        readers = [MODULES[reader] for reader in column.used_by if reader != self.purpose]
        way_out = f"or leave it out with --data.columns '{{{ours}: \"\"}}'"
        if self.purpose in column.used_by or not readers:
            return (
                f"column {theirs!r} ({column.means}) is not empty, and a row that is read as {shape} has no use for "
                f"it; remove it, {way_out}"
            )
        return (
            f"column {theirs!r} ({column.means}) is not empty, and {MODULES[self.purpose]} does not read it; set data "
            f"to {' or '.join(readers)}, {way_out}"
        )


class Cells:
    """The columns of a row by our names, and what has been taken of them.

    Attributes:
        values: the row's columns, as they are.
        used: what was read, by the data's name.
        roles: the data's name -> what it was read as.
        unread: the data's name -> why it was not read.
    """

    def __init__(self, row: "Row", reading: Reading) -> None:
        self.row, self.origin, self.reading = row, row.origin, reading
        self.values = with_nested(row.columns)
        self.used: dict[str, Any] = {}
        self.roles: dict[str, str] = {}
        self.missing: dict[str, str] = {}  # mapped names that this row lacks
        self.names: dict[str, list[str]] = {}  # our name -> the data's, those that hold something first
        layout = reading.lay_out(self.values)
        self.unread = dict(layout.left_out)
        for ours, theirs in reading.by_hand.items():
            if theirs and (cell := find_at_path(row.columns, theirs)):
                self.names[ours] = [theirs]
                self.values[theirs] = cell[0]
                reading.mapped_seen.add(ours)
            elif theirs:
                self.missing[ours] = theirs
        for ours, names in layout.names.items():
            self.names[ours] = sorted(names, key=lambda name: is_empty(self.values[name])) if names[1:] else [*names]
        if layout.asked_by is not None and _is_prose(self.values[layout.asked_by]):  # SHP's post
            self.names["prompt"] = [layout.asked_by]
            others = [name for name in self.names.pop("history") if name != layout.asked_by]
            self.names |= {"history": others} if others else {}
        options = {
            name[-1].upper(): as_text(self.values[name]) for name in layout.options if not is_empty(self.values[name])
        }
        if options:
            self.add("options", ", ".join(layout.options), options)
        for ours, names in self.names.items():
            if ours in WRITTEN:
                self.values |= {name: str(value) for name in names if _is_number(value := self.values[name])}
        for name in layout.unknown:
            if not is_empty(self.values[name]):
                self.unread[name] = ""

    def holds(self, ours: str) -> bool:
        """Tell whether there is such a column and it is not empty."""
        return ours in self.names and not is_empty(self.values[self.names[ours][0]])

    def unpack(self, ours: str) -> Any:
        """Read the list or object in a column, as :func:`unpack` does; the column does not count as used."""
        return unpack(self.values[self.name(ours)], self.place(ours))

    def take_unpacked(self, ours: str, one_of_several: bool = False) -> Any:
        """Take the value of a column as :meth:`take` does, and the list or object in it as :func:`unpack` does."""
        value = self.take(ours, one_of_several)
        return value if value is None else unpack(value, self.place(ours))

    def place(self, ours: str) -> str:
        """Say where a column that is there stands."""
        return f"{self.origin}: column {self.name(ours)!r}"

    def has(self, ours: str) -> bool:
        """Tell whether there is such a column, empty or not."""
        return ours in self.names

    def name(self, ours: str) -> str:
        """Return the data's name of a column that is there."""
        return self.names[ours][0]

    def take(self, ours: str, one_of_several: bool = False) -> Any:
        """Take the value of a column, None where it is missing or empty; the column counts as used.

        Raises ValueError where two columns mean the same and hold different things, unless one has our own name or
        ``one_of_several`` says that the first will do.
        """
        if ours not in self.names:
            return None
        first, *others = self.names[ours]
        value = self.values[first]
        if is_empty(value):
            return None
        for other in others:
            named = normalize(first) == ours and ours != "answer"  # which may stand beside a worked solution
            if named or one_of_several or is_empty(self.values[other]):
                continue
            if value == self.values[other] or repeats(value, self.values[other]) or repeats(self.values[other], value):
                self.used[other], self.unread[other] = self.values[other], "repeats what was read"
                continue
            raise UnclearColumn(
                f"{self.origin}: columns {first!r} and {other!r} may both be the {ours} ({NAMED[ours].means}); name "
                f"one, such as --data.columns '{{{ours}: {first}}}'"
            )
        self.used[first], self.roles[first] = value, ours
        return value

    def take_text(self, ours: str) -> str:
        """Take the text in a column, "" where it is missing. Raises ValueError for a value that is no text."""
        value = self.take(ours)
        if value is not None and not isinstance(value, str):
            raise self.wrong_type(ours, value, "text")
        return value or ""

    def accept_empty(self, ours: str) -> Any:
        """Take the value of a column that is there, empty or not; the column counts as used."""
        name = self.name(ours)
        self.used[name], self.roles[name] = self.values[name], ours
        return self.values[name]

    def find_shape(self, shapes: Sequence[tuple[str, ...]], has: Callable[[str], bool]) -> tuple[str, ...] | None:
        """Find the first shape whose columns the row ``has``; shapes with more columns mapped by hand go first."""
        by_hand = set(self.reading.by_hand)
        ordered = sorted(shapes, key=lambda shape: -len(by_hand & set(shape)))
        return next((shape for shape in ordered if all(map(has, shape))), None)

    def wrong_type(self, ours: str, value: Any, expected: str) -> ValueError:
        """Make the error for a column that holds something else than expected."""
        name = self.name(ours)
        keys = sorted(value, key=lambda key: not isinstance(value[key], str)) if isinstance(value, Mapping) else []
        way_out = f"; name one of its keys, such as --data.columns '{{{ours}: {name}.{keys[0]}}}'" if keys else ""
        return ValueError(
            f"{self.origin}: column {name!r} holds a {type(value).__name__}, {expected} was expected{way_out}"
        )

    def add(self, ours: str, theirs: str, value: Any) -> None:
        """Add a column that a nested one of the row brings."""
        self.values[theirs] = value
        self.names.setdefault(ours, []).insert(0, theirs)

    def left(self) -> list[tuple[str, str]]:
        """List known columns that hold something and were not used: our name and the data's."""
        return [
            (ours, theirs)
            for ours, names in self.names.items()
            for theirs in names
            if theirs not in self.used
            and not is_empty(self.values[theirs])
            and not _is_neutral(ours, self.values[theirs])
        ]

    def not_found(self, wanted: str, mapping: Mapping[str, str] | None = None) -> ValueError:
        """Make the error for a row that has no shape of ours.

        Args:
            wanted: what was looked for.
            mapping: an example of what the user may map; None = the longest columns as prompt and completion.
        """
        found, purpose = ", ".join(map(str, self.row.columns)) or "nothing", self.reading.purpose
        if self.missing:
            mapped = ", ".join(f"{theirs!r} (for {ours})" for ours, theirs in self.missing.items())
            return ValueError(f"{self.origin}: no column {mapped}; found {found}")
        if purpose != "preference" and {"chosen", "preference"} & set(self.names):
            prompts = ", or data.train to PreferencePrompts for its prompt alone" if purpose == "verifiable" else ""
            return ValueError(
                f"{self.origin}: the row is a preference ({found}); set data to {MODULES['preference']}{prompts}"
            )
        asks = {"prompt", "instruction", "messages", "input", "context"} & set(self.names)
        wants = ["prompt"] if not asks else []
        wants += ["completion"] if "completion" in wanted and "completion" not in self.names else []
        longest = sorted(self.unread, key=lambda name: -len(str(self.values[name])))
        if len(self.row.columns) == 1 and wanted.endswith(" text"):
            mapping = {"text": next(iter(self.row.columns))}
        if mapping is None and purpose != "preference":  # whose answers cannot be told by their length
            mapping = dict(zip(wants or ["prompt"], longest, strict=False))
        example = ", ".join(f"{ours}: {theirs}" for ours, theirs in (mapping or {}).items())
        way = f"columns, such as --data.columns '{{{example}}}'" if example else "data.columns"
        return ValueError(
            f"{self.origin}: found the columns {found}; looked for {wanted}; map others with {way}"
            f"{suggest(list(self.row.columns))}"
        )


def refuse_mixed_splits(rows: Sequence["Row"], mapping: Mapping[str, str] | None) -> None:
    """Refuse rows to train on among which a column ``split`` tells some of another part of the data.

    Raises:
        ValueError: the column holds train and another part, and the mapping does not leave it out.
    """
    if "split" in (mapping or {}):
        return
    found: dict[str, str] = {}
    for row in rows:
        if isinstance(said := row.columns.get("split"), str):
            found.setdefault(said.strip().lower(), row.origin)
    others = [name for name in found if name in OTHER_SPLITS]
    if others and not found.keys().isdisjoint(("train", "training")):
        raise ValueError(
            f"{found[others[0]]}: column 'split' holds {others[0]!r} here and 'train' in other rows: keep what is not to "
            "be trained on in a file of its own, or train on all rows with --data.columns '{split: \"\"}'"
        )


def with_nested(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the columns of a row the parts of objects that ``NESTED`` names."""
    values = dict(columns)
    for name, (key, others) in NESTED.items():
        held = columns.get(name)
        if isinstance(held, Mapping) and key in held and all(other in columns for other in others):
            values[f"{name}.{key}"] = held[key]
    return values


def find_at_path(record: Mapping[str, Any], name: str) -> list[Any]:
    """Find the value of a column, or of a dotted path into nested columns: a list of one value, empty without it."""
    if name in record:
        return [record[name]]
    first, dot, rest = name.partition(".")
    return find_at_path(record[first], rest) if dot and isinstance(record.get(first), Mapping) else []


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value == value  # NaN is an empty cell


def _is_prose(value: Any) -> bool:
    """Tell whether a cell is text that holds no list and no object."""
    return isinstance(value, str) and isinstance(guess(value), str)


def _stands_in(value: Any, other: Any) -> bool:
    """Tell whether every text of a value is a part of a text of another one, of whatever length."""
    others = texts_in(other)
    return all(any(text.strip() in given for given in others) for text in texts_in(value))


def _is_neutral(ours: str, value: Any) -> bool:
    """Tell whether a column changes nothing, as a weight of 1, or as the text of an empty list."""
    return is_empty(guess(value)) or (ours == "weight" and value in (1, 1.0, "1", "1.0"))


def is_empty(value: Any) -> bool:
    """Tell whether a cell says nothing: null, NaN, white space, or lists and objects of these. 0 says something."""
    if isinstance(value, str):  # first, since nearly every cell is text
        return not value or value.isspace()
    if value is None:
        return True
    if isinstance(value, list | tuple):
        return all(map(is_empty, value))
    return all(map(is_empty, value.values())) if isinstance(value, Mapping) else bool(value != value)


def without_nulls(value: Any) -> Any:
    """Drop keys that hold null, since Parquet gives every object the keys of all others."""
    if isinstance(value, Mapping):
        return {str(key): without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list | tuple) else value


def parse_json(text: str, where: str) -> Any:
    """Parse the JSON in a text. Raises ValueError that begins with ``where``."""
    try:
        return load_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} holds text where JSON was expected ({error.msg}): {text[:60]!r}") from error
    except Refused as error:
        raise ValueError(f"{where.rstrip(',')}: {error}") from error


def unpack(value: Any, where: str) -> Any:
    """Read a list or object that a table holds as text (JSON, or Python's); any other value stays as it is.

    Raises ValueError that begins with ``where`` for one that :func:`load_json` refuses.
    """
    if not isinstance(value, str) or not (text := value.strip()).startswith(("[", "{")):
        return value
    for read in (load_json, load_literal):
        try:
            return read(text)
        except Refused as error:
            raise ValueError(f"{where.rstrip(',')}: {error}") from error
        except ValueError:
            continue
    return value


def guess(value: Any) -> Any:
    """Read a cell as :func:`unpack` does, to see what it may be; one that would be refused is read loosely."""
    if not isinstance(value, str) or not (text := value.strip()).startswith(("[", "{")):
        return value
    for read in (guess_json, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return value


def as_number(value: Any) -> float | None:
    """Read a finite number from a number, a boolean (True = 1) or a text (``0.5``, ``True``); else None."""
    if isinstance(value, str):
        value = {"true": 1.0, "false": 0.0}.get(value.strip().lower(), value)
    try:
        number = float(value) if isinstance(value, bool | int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_text(value: Any) -> Any:
    """Turn a number into text, as CSV holds it; any other value stays."""
    return str(value) if isinstance(value, bool | int | float) and not is_empty(value) else value


def texts_in(value: Any) -> list[str]:
    """List all texts inside a value."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in texts_in(part)]


def take_references(value: Any, where: str) -> Any:
    """Take the texts from SQuAD's ``{"text": [...], "answer_start": [...]}``; any other value stays.

    Raises ValueError as :func:`unpack` does.
    """
    held = guess(value)
    if isinstance(held, Mapping) and set(held) == {"text", "answer_start"}:
        return unpack(value, where)["text"]
    return value


def repeats(value: Any, other: Any) -> bool:
    """Tell whether all texts of a value stand in another one: equal, or too long to be there by chance."""
    texts, others = texts_in(value), texts_in(other)
    return bool(texts) and all(
        any(text.strip() == given.strip() or (len(text) >= CHANCE and text.strip() in given) for given in others)
        for text in texts
    )


def make_plain(value: Any) -> Any:
    """Make a value of None, bool, int, float, str, list and dict alone, which torch's safe loading reads.

    Dates become ISO text, anything else its own text.
    """
    if isinstance(value, dict):
        return {str(key): make_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [make_plain(part) for part in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)
