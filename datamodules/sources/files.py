"""Rows from files, folders, saved data sets and the hub."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datamodules.sources.base import Row, Source

Located = tuple[str, Any]  # origin, record


class Files(Source):
    """A JSONL, JSON, CSV, TSV, Parquet or Arrow file, a folder of such files, a ``save_to_disk`` folder, else a hub id.

    Text files may be gzipped (``.gz``). JSONL ends its records at "\\n" only, since text may hold other line separators; JSON is an
    array of objects, or one object with exactly one list; CSV and TSV have a header line and their cells stay text; TSV knows no quotes.

    Args:
        path: file, folder or hub id.
        split: of a hub data set or of a saved dictionary of data sets; files have none and ignore it.
    """

    def __init__(self, path: str, split: str = "train") -> None:
        self.path = path
        self.split = split

    def rows(self) -> list[Row]:
        """All rows in file order, files of a folder by name. Raises ValueError naming file and line."""
        location = Path(self.path).expanduser()
        if location.is_file():
            return read_file(location)
        if location.is_dir():
            return self._read_folder(location)
        if _looks_local(self.path):
            raise ValueError(f"{self.path}: no such file or folder")
        return self._read_hub()

    def _read_folder(self, folder: Path) -> list[Row]:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return self._read_saved(folder)
        files = sorted(path for path in folder.iterdir() if path.is_file() and _format(path) in READERS)
        if not files:
            raise ValueError(f"{folder}: the folder holds no file that ends in {', '.join(READERS)}; subfolders are not read")
        return [row for path in files for row in read_file(path)]

    def _read_saved(self, folder: Path) -> list[Row]:
        from datasets import load_from_disk

        saved: Any = load_from_disk(str(folder))
        if (folder / "dataset_dict.json").is_file():
            if self.split not in saved:
                raise ValueError(f"{folder}: no split {self.split!r}, it holds {', '.join(sorted(saved))}")
            saved = saved[self.split]
        return _named_rows(str(folder), saved)

    def _read_hub(self) -> list[Row]:
        from datasets import load_dataset

        try:
            loaded = load_dataset(self.path, split=self.split)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{self.path}: neither a file or folder here nor loadable from the hub ({self.split} split): {reason}") from error
        return _named_rows(self.path, loaded)


def read_file(path: Path) -> list[Row]:
    """The rows of one file. Raises ValueError with origin when it cannot be read, is empty or holds anything but objects."""
    if _format(path) not in READERS:
        raise ValueError(f"{path}: unknown kind of file, expected one that ends in {', '.join(READERS)}")
    rows = []
    for origin, record in READERS[_format(path)](path):
        if not isinstance(record, dict):
            raise ValueError(f"{origin}: a row must be an object with named columns, this is a {type(record).__name__}")
        rows.append(Row(record, origin, f"{path.absolute().parent.name}/{path.name.partition('.')[0]}"))
    if not rows:
        raise ValueError(f"{path}: the file holds no rows")
    return rows


def _named_rows(name: str, records: Any) -> list[Row]:
    rows = [Row(dict(record), f"{name}#{index}", name) for index, record in enumerate(records)]
    if not rows:
        raise ValueError(f"{name}: the data set holds no rows")
    return rows


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or _format(Path(path)) in READERS


def _format(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.suffix != ".gz":
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
        raise ValueError(f"{path}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save the file as UTF-8") from error


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{first_line + error.lineno - 1}: not valid JSON: {error.msg} (column {error.colno})") from error


def _encodable(record: Any, text: str, origin: str) -> Any:
    """The record parsed from ``text``. ValueError when an escape in it is half of a character, which no tokenizer can encode."""
    if "\\ud" in text.lower():  # \ud800 to \udfff, which UTF-8 holds only as escapes
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{origin}: the text holds half of a character (an unpaired surrogate such as \\ud83d); remove it") from error
    return record


def _jsonl(path: Path) -> Iterator[Located]:
    for number, line in enumerate(_bytes(path).split(b"\n"), start=1):
        text = _decode(line, path, number)
        if text.strip(" \t\r\n"):
            yield f"{path}:{number}", _encodable(_parse(text, path, number), text, f"{path}:{number}")


def _json(path: Path) -> Iterator[Located]:
    text = _decode(_bytes(path), path, 1)
    content = _parse(text, path, 1) if text.strip() else []
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise ValueError(f"{path}: an object must hold exactly one list of rows, this one has {len(lists)} among: {', '.join(content)}")
        content = lists[0]
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected an array of objects, found a {type(content).__name__}")
    yield from ((f"{path}#{index}", _encodable(record, text, f"{path}#{index}")) for index, record in enumerate(content))


def _tsv(path: Path) -> Iterator[Located]:
    return _csv(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _csv(path: Path, delimiter: str = ",", quoting: Any = csv.QUOTE_MINIMAL) -> Iterator[Located]:
    reader = csv.reader(io.StringIO(_decode(_bytes(path), path, 1), newline=""), strict=True, delimiter=delimiter, quoting=quoting)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if header is None:
                header = cells
            elif cells and len(cells) != len(header):
                raise ValueError(f"{path}:{line}: the row has {len(cells)} cells and the header {len(header)}")
            elif cells:
                yield f"{path}:{line}", dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: not valid CSV: {error}") from error


def _parquet(path: Path) -> Iterator[Located]:
    from pyarrow import parquet

    yield from _table(path, parquet.read_table)


def _arrow(path: Path) -> Iterator[Located]:
    from pyarrow import ipc

    with path.open("rb") as file:  # the file format starts with a magic word, the stream format that save_to_disk writes does not
        read = ipc.open_file if file.read(6) == b"ARROW1" else ipc.open_stream
    yield from _table(path, lambda name: read(name.read_bytes()).read_all())


def _table(path: Path, read: Callable[[Path], Any]) -> Iterator[Located]:
    try:
        records = read(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise ValueError(f"{path}: not a readable {path.suffix[1:]} file: {str(error).splitlines()[0]}") from error
    yield from ((f"{path}#{index}", record) for index, record in enumerate(records))


READERS: dict[str, Callable[[Path], Iterator[Located]]]
READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet, ".arrow": _arrow}
