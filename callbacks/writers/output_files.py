"""Writes the files of callbacks: whole files that appear at once, and files that grow line by line."""

import fcntl
import json
import os
import re
from itertools import chain, count
from pathlib import Path
from typing import IO, Any, BinaryIO

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from modules.trainer.saving import naming, replacing


def in_run_folder(trainer: Trainer, path: Path | None, name: str) -> Path:
    """Return ``path``, or ``name`` in the run's folder if ``path`` is None. That folder is ``default_root_dir``."""
    return Path(trainer.default_root_dir) / name if path is None else path


def find_free_file(trainer: Trainer, path: Path | None, name: str, resumes: bool = False) -> Path:
    """Return ``path``, or in the run's folder the first of ``name``, ``name-2`` and so on that no earlier run wrote.

    With ``resumes``, a file is free as long as hidden part files of its number lie there, because a run goes on with
    them. Writers of one run share theirs.
    """
    first = in_run_folder(trainer, path, name)
    if path is not None or not first.is_file():
        return first
    hidden = [file.name for file in first.parent.glob(".*.*")] if resumes else []
    for end in chain([""], (f"-{number}" for number in count(2))):
        file = first.with_stem(f"{first.stem}{end}")
        if not file.exists() or any(re.fullmatch(rf"\.[a-z]+{end}{file.suffix}\.\w+", part) for part in hidden):
            return file
    raise AssertionError("numbers do not end")


def require_predict(stage: str, who: str) -> None:
    """Refuse a command that gives a writer nothing to write. Raises ValueError, which begins with ``who``."""
    if stage != "predict":
        raise ValueError(
            f"{who} writes what predict finds, and this is {TrainerFn(stage).value}: remove it, or run predict with it"
        )


def claim(file: IO[Any], path: Path) -> None:
    """Lock an open part file for this process until it is closed.

    Raises:
        ValueError: another run is writing ``path``.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{path} is being written by another run; name another file or folder") from error


def open_whole_lines(path: Path) -> BinaryIO:
    """Open a file to append, for this process alone, and remove the half line that a killed run may have left.

    Raises:
        ValueError: another run is writing it.
    """
    file = path.open("a+b")
    claim(file, path)
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)
    return file


def append_lines(file: BinaryIO, records: list[Any]) -> None:
    """Append records, all or nothing, and flush them to disk."""
    with naming(Path(file.name)):
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write a file beside ``path`` and rename it, so that ``path`` is never half a file."""
    with naming(path), replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is renamed into place when it is complete; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=2) + "\n")
