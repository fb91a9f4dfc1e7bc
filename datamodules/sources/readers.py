"""One reader per file format. It yields the origin and the record of everything in a file."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Located = tuple[str, Any]  # origin, record
Header = Sequence[str] | None

TABLES_OF_TEXT = (".csv", ".tsv")
HEADERLESS = "; if the file has no line of column names, name them with Files' header, such as [prompt, completion]"
MAX_DEPTH = 100  # levels of nested lists and objects

csv.field_size_limit(2**31 - 1)  # Python refuses cells above 128 KiB


def file_format(path: Path) -> str:
    """Return the ending that tells the format, in lower case and without ``.gz``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.suffix.lower() != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from error


def _decode(raw: bytes, path: Path, first_line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from error


def parse_json(text: str, origin: str) -> Any:
    """Parse the JSON text of a row.

    Raises ValueError, which begins with ``origin``, when the text is not JSON, is nested more than MAX_DEPTH deep, or
    holds half of a character, which no tokenizer can encode.
    """
    value = _parse(text, origin)
    return _encodable(value, origin) if _has_surrogates(text) else value


def _parse(text: str, origin: str, path: Path | None = None) -> Any:
    """Parse a JSON text. If it is a whole file ``path``, errors name the line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}" if path else origin
        raise ValueError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from error
    except RecursionError:
        value = None
    if value is None or text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(text, origin)
    return value


def _has_surrogates(text: str) -> bool:
    return "\\ud" in text.lower()  # \ud800 to \udfff, which UTF-8 holds only as escapes


def _encodable(record: Any, origin: str) -> Any:
    """Return the record. Raises ValueError when it holds half of a character."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{origin}: the text holds half of a character (an unpaired surrogate such as \\ud83d); remove it"
        ) from error
    return record


def _check_depth(text: str, origin: str) -> None:
    depth = 0
    for bracket in re.sub(r'"(?:[^"\\]|\\.)*"|[^][{}]', "", text):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"{origin}: lists and objects are nested more than {MAX_DEPTH} deep; flatten them")


def _jsonl(path: Path, _: Header) -> Iterator[Located]:
    for number, line in enumerate(_bytes(path).split(b"\n"), start=1):
        text = _decode(line, path, number)
        if text.strip(" \t\r\n"):
            yield f"{path}:{number}", parse_json(text, f"{path}:{number}")


def _json(path: Path, header: Header) -> Iterator[Located]:
    text = _decode(_bytes(path), path, 1)
    if _is_jsonl(text):
        yield from _jsonl(path, header)
        return
    content = _parse(text, str(path), path) if text.strip() else []
    if isinstance(content, dict):
        content = _rows_in_object(content, path)
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected an array of rows, found a {type(content).__name__}")
    check = _has_surrogates(text)
    for index, record in enumerate(content):
        yield f"{path}#{index}", _encodable(record, f"{path}#{index}") if check else record


def _is_jsonl(text: str) -> bool:
    """Return whether the first line is a whole object and more text follows."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except (json.JSONDecodeError, RecursionError):
        return False


def _rows_in_object(content: dict[str, Any], path: Path) -> list[Any]:
    """Return the rows of an object: its one list of objects, its parallel lists, or its categories.

    Other values beside lists, such as a licence, are not rows.
    """
    lists = {name: value for name, value in content.items() if isinstance(value, list)}
    columns = {name: value for name, value in lists.items() if value}
    objects = [name for name, value in columns.items() if all(isinstance(record, dict) for record in value)]
    if len(columns) == len(objects) == 1:
        return columns[objects[0]]
    if len(columns) == len(objects) > 1:
        raise ValueError(
            f"{path}: an object must hold one list of rows, this one has {len(objects)}: {', '.join(objects)}; split "
            "the file"
        )
    if len({len(value) for value in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {len(value)}" for name, value in columns.items())
        raise ValueError(f"{path}: parallel lists must be equally long or empty, these are not: {lengths}")
    if lists:
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if not content or not all(_is_category(value) for value in content.values()):
        raise ValueError(
            f"{path}: an object must hold one list of rows, parallel lists, or categories of sub-categories of texts; "
            f"this one has: {', '.join(content) or 'nothing'}"
        )
    return [
        {"text": text, "category": category, "subcategory": subcategory}
        for category, groups in content.items()
        for subcategory, texts in groups.items()
        for text in texts
    ]


def _is_category(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in value.values()
    )


def _tsv(path: Path, header: Header) -> Iterator[Located]:
    for origin, cells in _csv(path, header, delimiter="\t", quoting=csv.QUOTE_NONE):
        yield origin, {name: cell.replace("\\n", "\n") for name, cell in cells.items()} if header else cells


def _csv(path: Path, header: Header, delimiter: str = ",", quoting: Any = csv.QUOTE_MINIMAL) -> Iterator[Located]:
    reader = csv.reader(
        io.StringIO(_decode(_bytes(path), path, 1), newline=""), strict=True, delimiter=delimiter, quoting=quoting
    )
    names = header
    line = 1
    try:
        for cells in reader:
            if names is None:
                names = cells
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise ValueError(
                        f"{path}:{line}: the header names {', '.join(map(repr, twice))} twice; name every column once"
                        f"{HEADERLESS}"
                    )
            elif cells and len(cells) != len(names):
                raise ValueError(
                    f"{path}:{line}: the row has {len(cells)} cells and the header {len(names)}"
                    f"{'' if header else HEADERLESS}"
                )
            elif cells:
                yield f"{path}:{line}", dict(zip(names, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: not valid CSV: {error}") from error


def _parquet(path: Path, _: Header) -> Iterator[Located]:
    from pyarrow import parquet

    yield from _table(path, parquet.read_table)


def _arrow(path: Path, _: Header) -> Iterator[Located]:
    from pyarrow import ipc

    # The file format starts with a magic word. The stream format, which save_to_disk writes, does not.
    with path.open("rb") as file:
        read = ipc.open_file if file.read(6) == b"ARROW1" else ipc.open_stream
    yield from _table(path, lambda name: read(name.read_bytes()).read_all())


def _table(path: Path, read: Callable[[Path], Any]) -> Iterator[Located]:
    try:
        records = read(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise ValueError(
            f"{path}: not a readable {file_format(path)[1:]} file: {str(error).splitlines()[0]}"
        ) from error
    yield from ((f"{path}#{index}", record) for index, record in enumerate(records))


READERS: dict[str, Callable[[Path, Header], Iterator[Located]]]
READERS = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
