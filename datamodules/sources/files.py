"""Reads rows from files, folders, saved data sets and the hub: one reader per file format."""

import csv
import gzip
import inspect
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.formats.strict import Refused, load_json
from datamodules.sources.locations import explain_hub_error, find_files, read_format, split_hub_id
from datamodules.sources.source import Row, Source

Located = tuple[str, Any]  # origin, record
Header = Sequence[str] | None

TABLES_OF_TEXT = (".csv", ".tsv")
HEADERLESS = "; if the file has no line of column names, name them with Files' header, such as [prompt, completion]"
QUOTED = re.compile('"(?:[^"]|"")*""(?:[^"]|"")*"')  # in quotes, with doubled quotes inside

csv.field_size_limit(2**31 - 1)  # Python refuses cells above 128 KiB


class Files(Source):
    """Reads rows from a file, a folder of files, a ``save_to_disk`` folder, or a hub data set.

    A file is JSONL, JSON, CSV, TSV, Parquet or Arrow. Text files may be gzipped (``.gz``).

    - JSONL (also ``.ndjson``): a record ends at "\\n" only, since text may hold other line separators.
    - JSON: an array of rows; an object with one list of rows; an object of parallel lists, one per column (empty lists
      are left out); categories -> sub-categories -> texts, which become rows with ``text``, ``category`` and
      ``subcategory``; or JSONL under another name.
    - CSV and TSV: cells stay text. TSV knows no quotes.

    A text in the place of a row becomes a row with the column ``text``. Values stay as the file has them: types may be
    mixed, and null is None.

    Args:
        path: file, folder or hub id. A config may follow a hub id, or a local copy of its folder, after a colon, such
            as ``openai/gsm8k:main``.
        split: split of a hub data set, of a saved dictionary of data sets, or of a folder whose file names tell splits,
            such as ``train-00000-of-00002.parquet`` and ``test.jsonl``. None = ``train``, or all files of a folder
            whose names tell no split, or its only split.
        header: column names of CSV and TSV files without a header line, such as FLAN's. In such a TSV file, a backslash
            and an n in a cell are a line break.
        name: config of a hub data set.

    Raises:
        ValueError: ``header`` names no column or one twice; in ``rows``, an argument has no effect on what ``path``
            names.
    """

    def __init__(
        self, path: str, split: str | None = None, header: Sequence[str] | None = None, name: str | None = None
    ) -> None:
        if header is not None and (not header or len(set(header)) < len(header)):
            raise ValueError(f"header must name every column once, got {list(header)}")
        self.path, self.split, self.header, self.name = path, split, header, name

    def rows(self) -> list[Row]:
        """Read all rows in file order, the files of a folder by name. Raises ValueError with file and line."""
        location = Path(self.path).expanduser()
        if location.is_file():
            self._refuse("a file", "split", "name")
            return read_file(location, self.header)
        if location.is_dir() and self.name is None:
            if (location / "dataset_dict.json").is_file() or (location / "state.json").is_file():
                return self._read_saved(location)
            return self._read_folder(location)
        path, name = split_hub_id(self.path)
        if looks_local(self.path) and not Path(path).expanduser().is_dir():
            raise ValueError(f"{self.path}: no such file or folder")
        if name is not None and self.name is not None:
            raise ValueError(f"{self.path}: the config is named twice, {name!r} and name {self.name!r}; leave out one")
        self._refuse("a data set of the hub", "header")
        return self._read_hub(path, name or self.name)

    def _refuse(self, kind: str, *names: str) -> None:
        """Refuse arguments that have no effect on a kind of data. Raises ValueError."""
        if given := [f"{name} {getattr(self, name)!r}" for name in names if getattr(self, name) is not None]:
            raise ValueError(f"{self.path}: {' and '.join(given)} has no effect on {kind}; leave it out")

    def _read_folder(self, folder: Path) -> list[Row]:
        files = find_files(folder, list(READERS), self.split)
        return [row for path in files for row in read_file(path, self.header)]

    def _read_saved(self, folder: Path) -> list[Row]:
        from datasets import load_from_disk

        self._refuse("a saved data set", "header")
        saved: Any = load_from_disk(str(folder))
        if (folder / "dataset_dict.json").is_file():
            split = self.split or "train"
            if split not in saved:
                raise ValueError(f"{folder}: no split {split!r}, it holds {', '.join(sorted(saved))}")
            saved = saved[split]
        else:
            self._refuse("a saved data set without splits", "split")
        return _named_rows(str(folder), saved)

    def _read_hub(self, path: str, name: str | None) -> list[Row]:
        from datasets import load_dataset

        split = self.split or "train"
        try:
            loaded = load_dataset(str(Path(path).expanduser()) if looks_local(path) else path, name, split=split)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(explain_hub_error(self.path, split, error)) from error
        return _named_rows(self.path, loaded)


def read_rows(source: str | Source) -> list[Row]:
    """Read the rows of a source, or of what ``Files`` takes.

    Raises ValueError for the bare name of a source, which cannot be made without its arguments.
    """
    if not isinstance(source, str):
        return source.rows()
    kind = find_kinds(Source).get(source)
    parameters = inspect.signature(kind).parameters.values() if kind is not None else ()
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    if needed and not Path(source).exists():
        options = " ".join(f"--data.train.{name} ..." for name in needed)
        raise ValueError(f"{source} is a source that needs {', '.join(needed)}: write --data.train {source} {options}")
    return Files(source).rows()


def find_kinds(base: Any) -> dict[str, type[Source]]:
    """Find all classes that derive from ``base``, by name."""
    found = {kind.__name__: kind for kind in base.__subclasses__()}
    return found | {name: kind for each in found.values() for name, kind in find_kinds(each).items()}


def hint_at_header(source: str | Source, row: Row) -> str:
    """Return a hint for a row that cannot be read, "" where it does not apply.

    The hint says that the first line of a CSV or TSV file was taken for column names.
    """
    given = source.header if isinstance(source, Files) else None
    is_table = read_format(Path(row.origin.rpartition(":")[0])) in TABLES_OF_TEXT
    return HEADERLESS if is_table and given is None else ""


def read_file(path: Path, header: Sequence[str] | None = None) -> list[Row]:
    """Read the rows of one file. Raises ValueError with the origin when the file cannot be read or is empty, or when a
    row is neither an object nor a text.
    """
    if read_format(path) not in READERS:
        raise ValueError(f"{path}: unknown kind of file, expected one that ends in {', '.join(READERS)}")
    if header is not None and read_format(path) not in TABLES_OF_TEXT:
        raise ValueError(f"{path}: header {list(header)} has no effect on such a file; leave it out")
    rows = []
    for origin, record in READERS[read_format(path)](path, header):
        if not isinstance(record, dict | str):
            raise ValueError(
                f"{origin}: a row must be an object with named columns or a text, this is a {type(record).__name__}"
            )
        columns = {"text": record} if isinstance(record, str) else record
        rows.append(Row(columns, origin, f"{path.absolute().parent.name}/{path.name.partition('.')[0]}"))
    if not rows:
        raise ValueError(f"{path}: the file holds no rows")
    return rows


def _named_rows(name: str, records: Any) -> list[Row]:
    rows = [Row(dict(record), f"{name}#{index}", name) for index, record in enumerate(records)]
    if not rows:
        raise ValueError(f"{name}: the data set holds no rows")
    return rows


def looks_local(path: str) -> bool:
    """Return whether a path cannot be a hub id."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or read_format(Path(path)) in READERS


def _read_bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.suffix.lower() != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from error


def _decode_utf8(raw: bytes, path: Path, first_line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from error


def parse_record(text: str, origin: str, path: Path | None = None) -> Any:
    """Parse the JSON text of a row, or of a whole file ``path``, as :func:`load_json` does.

    Raises ValueError that begins with ``origin``, or with the line of the file.
    """
    try:
        return load_json(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}" if path else origin
        raise ValueError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from error
    except Refused as error:
        raise ValueError(f"{f'{path}:{error.line}' if path else origin}: {error}") from error


def _read_jsonl(path: Path, _: Header) -> Iterator[Located]:
    for number, line in enumerate(_read_bytes(path).split(b"\n"), start=1):
        text = _decode_utf8(line, path, number)
        if text.strip(" \t\r\n"):
            yield f"{path}:{number}", parse_record(text, f"{path}:{number}")


def _read_json(path: Path, header: Header) -> Iterator[Located]:
    text = _decode_utf8(_read_bytes(path), path, 1)
    if _is_jsonl(text):
        yield from _read_jsonl(path, header)
        return
    content = parse_record(text, str(path), path) if text.strip() else []
    if isinstance(content, dict):
        content = _rows_in_object(content, path)
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected an array of rows, found a {type(content).__name__}")
    yield from ((f"{path}#{index}", record) for index, record in enumerate(content))


def _is_jsonl(text: str) -> bool:
    """Whether the first line is a whole object and more follows."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _rows_in_object(content: dict[str, Any], path: Path) -> list[Any]:
    """Read the rows of ``{..., name: [objects]}``, of parallel lists or of categories. Values beside lists, such as a
    licence, are no rows.
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


def _read_tsv(path: Path, header: Header) -> Iterator[Located]:
    for origin, cells in _read_csv(path, header, delimiter="\t", quoting=csv.QUOTE_NONE):
        if quoted := next((cell for cell in cells.values() if QUOTED.fullmatch(cell)), None):
            raise ValueError(
                f"{origin}: the cell {quoted[:60]!r} is quoted as in CSV, and TSV knows no quotes; save the file as CSV"
            )
        yield origin, {name: cell.replace("\\n", "\n") for name, cell in cells.items()} if header else cells


def _read_csv(path: Path, header: Header, delimiter: str = ",", quoting: Any = csv.QUOTE_MINIMAL) -> Iterator[Located]:
    reader = csv.reader(
        io.StringIO(_decode_utf8(_read_bytes(path), path, 1), newline=""),
        strict=True,
        delimiter=delimiter,
        quoting=quoting,
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
                if other := [mark for mark in ";\t|" if len(names) == 1 and mark in names[0]]:
                    raise ValueError(
                        f"{path}:{line}: the header is one column, {names[0]!r}; the cells seem to be separated by "
                        f"{other[0]!r}: save the file with commas" + (" or as .tsv" if other[0] == "\t" else "")
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


def _read_parquet(path: Path, _: Header) -> Iterator[Located]:
    from pyarrow import parquet

    yield from _read_table(path, parquet.read_table)


def _read_arrow(path: Path, _: Header) -> Iterator[Located]:
    from pyarrow import ipc

    with path.open(
        "rb"
    ) as file:  # the file format starts with a magic word, the stream format that save_to_disk writes does not
        read = ipc.open_file if file.read(6) == b"ARROW1" else ipc.open_stream
    yield from _read_table(path, lambda name: read(name.read_bytes()).read_all())


def _read_table(path: Path, read: Callable[[Path], Any]) -> Iterator[Located]:
    try:
        records = read(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise ValueError(
            f"{path}: not a readable {read_format(path)[1:]} file: {str(error).splitlines()[0]}"
        ) from error
    yield from ((f"{path}#{index}", record) for index, record in enumerate(records))


READERS: dict[str, Callable[[Path, Header], Iterator[Located]]]
READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
