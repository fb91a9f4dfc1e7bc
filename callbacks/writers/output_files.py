"""Files that callbacks write: where they go, whole, or line by line."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from lightning.pytorch import Trainer


def in_run_folder(trainer: Trainer, path: Path | None, name: str) -> Path:
    """The path, or ``name`` in the run's folder, which is the Trainer's ``default_root_dir``, where it is None."""
    return Path(trainer.default_root_dir) / name if path is None else path


def require_writable(path: Path, who: str) -> None:
    """Raises ValueError, ``who`` first, unless ``path`` can be made or written; leaves nothing behind."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    if path.is_file():
        folder = path.absolute().parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{who}: {path} cannot be written ({folder}: {error.strerror}); name another place") from error


def open_whole_lines(path: Path) -> BinaryIO:
    """Open to append, without the half line that a killed run may have left."""
    file = path.open("a+b")
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)
    return file


def append_lines(file: BinaryIO, records: list[Any]) -> None:
    """Write records behind the others, all or nothing, and wait until they are on the disk."""
    file.write("".join(json.dumps(record) + "\n" for record in records).encode())
    file.flush()
    os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write beside and rename, so that ``path`` is never half a file."""
    part = path.with_name(f".{path.name}.whole")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """JSON, renamed into its place when it is complete; its parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=2) + "\n")
