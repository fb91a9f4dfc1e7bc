"""Rows from files, folders, saved data sets and the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.sources.readers import READERS, file_format
from datamodules.sources.source import Row, Source


class Files(Source):
    """A JSONL, JSON, CSV, TSV, Parquet or Arrow file, a folder of such files, a ``save_to_disk`` folder, else a hub id.

    Text files may be gzipped (``.gz``). JSONL ends its records at "\\n" only, since text may hold other line
    separators. JSON is an array, an object with one list of rows, an object of parallel lists (columns; empty ones are
    left out), or categories -> sub-categories -> texts, which become rows ``text``, ``category``, ``subcategory``. A
    text in the place of a row is a row ``text``. Cells of CSV and TSV stay text; TSV knows no quotes. Values are as the
    file has them: types may be mixed, null is None.

    Args:
        path: file, folder or hub id.
        split: of a hub data set or of a saved dictionary of data sets; files have none and ignore it.
        header: column names of CSV and TSV files without a header line, such as FLAN's; a backslash and an n in a cell
            of such a TSV are a line break. Other files name their own columns and ignore it.
    """

    def __init__(self, path: str, split: str = "train", header: Sequence[str] | None = None) -> None:
        if header is not None and (not header or len(set(header)) < len(header)):
            raise ValueError(f"header must name every column once, got {list(header)}")
        self.path, self.split, self.header = path, split, header

    def rows(self) -> list[Row]:
        """All rows in file order, files of a folder by name. Raises ValueError naming file and line."""
        location = Path(self.path).expanduser()
        if location.is_file():
            return read_file(location, self.header)
        if location.is_dir():
            return self._read_folder(location)
        if _looks_local(self.path):
            raise ValueError(f"{self.path}: no such file or folder")
        return self._read_hub()

    def _read_folder(self, folder: Path) -> list[Row]:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return self._read_saved(folder)
        files = sorted(path for path in folder.iterdir() if path.is_file() and file_format(path) in READERS)
        if not files:
            raise ValueError(
                f"{folder}: the folder holds no file that ends in {', '.join(READERS)}; subfolders are not read"
            )
        return [row for path in files for row in read_file(path, self.header)]

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
            raise ValueError(
                f"{self.path}: neither a file or folder here nor loadable from the hub ({self.split} split): {reason}"
            ) from error
        return _named_rows(self.path, loaded)


def read_rows(source: str | Source) -> list[Row]:
    """The rows of a source, or of what Files takes."""
    return (Files(source) if isinstance(source, str) else source).rows()


def read_file(path: Path, header: Sequence[str] | None = None) -> list[Row]:
    """The rows of one file. Raises ValueError with origin when it cannot be read, is empty or holds anything but
    objects and texts.
    """
    if file_format(path) not in READERS:
        raise ValueError(f"{path}: unknown kind of file, expected one that ends in {', '.join(READERS)}")
    rows = []
    for origin, record in READERS[file_format(path)](path, header):
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


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or file_format(Path(path)) in READERS
