"""Reads rows from files, folders, saved data sets and the hub."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from datamodules.sources.readers import HEADERLESS, READERS, TABLES_OF_TEXT, file_format
from datamodules.sources.source import Row, Source

SPLITS = {  # words in file names -> split, as in the datasets library
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


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
        path, name = hub_id(self.path)
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
        files = files_of_split(folder, list(READERS), self.split)
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
            raise ValueError(hub_trouble(self.path, split, error)) from error
        return _named_rows(self.path, loaded)


def hub_id(path: str) -> tuple[str, str | None]:
    """Split a path into the hub id and the config that may follow a colon.

    >>> hub_id("openai/gsm8k:main")
    ('openai/gsm8k', 'main')
    """
    before, colon, config = path.rpartition(":")
    return (before, config) if colon and re.fullmatch(r"[\w.-]+", config) else (path, None)


def hub_trouble(path: str, split: str, error: Exception) -> str:
    """Return in one sentence why the ``datasets`` library could not load a hub id."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Config name is missing"):
        configs = re.findall(r"'([^']+)'", lines[1]) if len(lines) > 1 else []
        example = f"{path}:{configs[0] if configs else 'main'}"
        return f"{path}: the data set has several configs ({', '.join(configs)}); name one behind a colon: {example}"
    return f"{path}: neither a file or folder here nor loadable from the hub ({split} split): {lines[0]}"


def files_of_split(folder: Path, endings: Sequence[str], split: str | None) -> list[Path]:
    """Return the files of a folder that hold a split, sorted by name. One line tells which files are left out.

    Words in the file names tell the split, see ``SPLITS``.

    Args:
        folder: the folder; its subfolders are not read.
        endings: endings of the files that can be read, without ``.gz``.
        split: the split. None = all files where no name tells a split, else ``train``, or the only split there is.

    Raises:
        ValueError: the folder has no such files, none of the split, or, without ``split``, several splits but no
            ``train``.
    """
    found = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    files = [path for path in found if path.is_file() and file_format(path) in endings]
    others = [f"{path.name}/" if path.is_dir() else path.name for path in found if path not in files]
    if not files:
        folders = ", ".join(name for name in others if name.endswith("/"))
        raise ValueError(
            f"{folder}: the folder holds no file that ends in {', '.join(endings)}; subfolders are not read"
            + (f", so name one of them: {folders}" if folders else "")
        )
    by_split: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        by_split[split_of(path)].append(path)
    named = sorted(name for name in by_split if name)
    if not named and split is not None:
        raise ValueError(
            f"{folder}: no split {split!r}, for no file name tells a split (train, validation or test); leave split "
            f"out, or name the files: {', '.join(path.name for path in files[:5])}"
        )
    wanted = SPLITS.get(split, split) if split is not None else "train" if "train" in named or not named else named[0]
    if split is None and "train" not in named and len(by_split) > 1:
        held = "; ".join(f"{name or 'no split'}: {', '.join(p.name for p in by_split[name][:3])}" for name in by_split)
        raise ValueError(
            f"{folder}: the file names tell several splits and none is train ({held}); name one with split"
        )
    if named and wanted not in by_split:
        raise ValueError(f"{folder}: no split {split!r}, the file names tell {', '.join(named)}")
    chosen = by_split[wanted] if named else files
    left = [path.name for path in files if path not in chosen] + others
    if left:
        kind = f" of the {wanted} split" if named else ""
        more = f" and {len(left) - 10} more" if len(left) > 10 else ""
        read = ", ".join(path.name for path in chosen[:10]) + (" ..." if len(chosen) > 10 else "")
        rank_zero_info(f"{folder}: {len(chosen)} files{kind} read ({read}), not read: {', '.join(left[:10])}{more}")
    return chosen


def split_of(path: Path) -> str:
    """Return the split that a file's name tells, "" if it tells none.

    >>> split_of(Path("data/test-00000-of-00001.parquet")), split_of(Path("contest.jsonl"))
    ('test', '')
    """
    words = re.split(r"[-._ 0-9]+", path.name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def read_rows(source: str | Source) -> list[Row]:
    """Read the rows of a source, or of what ``Files`` takes."""
    return (Files(source) if isinstance(source, str) else source).rows()


def maybe_headerless(source: str | Source, row: Row) -> str:
    """Return a hint for a row that cannot be read, "" where it does not apply.

    The hint says that the first line of a CSV or TSV file was taken for column names.
    """
    given = source.header if isinstance(source, Files) else None
    is_table = file_format(Path(row.origin.rpartition(":")[0])) in TABLES_OF_TEXT
    return HEADERLESS if is_table and given is None else ""


def read_file(path: Path, header: Sequence[str] | None = None) -> list[Row]:
    """Read the rows of one file. Raises ValueError with the origin when the file cannot be read or is empty, or when a
    row is neither an object nor a text.
    """
    if file_format(path) not in READERS:
        raise ValueError(f"{path}: unknown kind of file, expected one that ends in {', '.join(READERS)}")
    if header is not None and file_format(path) not in TABLES_OF_TEXT:
        raise ValueError(f"{path}: header {list(header)} has no effect on such a file; leave it out")
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


def looks_local(path: str) -> bool:
    """Return whether a path cannot be a hub id."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or file_format(Path(path)) in READERS
