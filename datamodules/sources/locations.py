"""Paths and hub ids: the files of a folder that hold a split, and the config behind an id."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

SPLITS = {  # words in file names, as the datasets library reads them
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def read_format(path: Path) -> str:
    """Return the ending that tells the format, in lower case and without ``.gz``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def split_hub_id(path: str) -> tuple[str, str | None]:
    """Split a hub id from the config that may stand behind its colon.

    >>> split_hub_id("openai/gsm8k:main")
    ('openai/gsm8k', 'main')
    """
    before, colon, config = path.rpartition(":")
    return (before, config) if colon and re.fullmatch(r"[\w.-]+", config) else (path, None)


def explain_hub_error(path: str, split: str, error: Exception) -> str:
    """Explain in one sentence why the ``datasets`` library could not load a hub id."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Config name is missing"):
        configs = re.findall(r"'([^']+)'", lines[1]) if len(lines) > 1 else []
        example = f"{path}:{configs[0] if configs else 'main'}"
        return f"{path}: the data set has several configs ({', '.join(configs)}); name one behind a colon: {example}"
    return f"{path}: neither a file or folder here nor loadable from the hub ({split} split): {lines[0]}"


def find_files(folder: Path, endings: Sequence[str], split: str | None) -> list[Path]:
    """Find the files of a folder that hold a split, by the words of ``SPLITS`` in their names, sorted. One printed line
    names the files that are left out.

    Args:
        folder: its subfolders are not read.
        endings: of the files that can be read, without ``.gz``.
        split: None = all files where no name tells a split, else train, or the only split there is.

    Raises:
        ValueError: there are no such files, or none of the split, or files without a split's name beside others and no
            train.
    """
    found = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    files = [path for path in found if path.is_file() and read_format(path) in endings]
    others = [f"{path.name}/" if path.is_dir() else path.name for path in found if path not in files]
    if not files:
        folders = ", ".join(name for name in others if name.endswith("/"))
        raise ValueError(
            f"{folder}: the folder holds no file that ends in {', '.join(endings)}; subfolders are not read"
            + (f", so name one of them: {folders}" if folders else "")
        )
    by_split: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        by_split[read_split(path)].append(path)
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


def read_split(path: Path) -> str:
    """Return the split that a file's name tells; "" if it tells none.

    >>> read_split(Path("data/test-00000-of-00001.parquet")), read_split(Path("contest.jsonl"))
    ('test', '')
    """
    words = re.split(r"[-._ 0-9]+", path.name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "")
