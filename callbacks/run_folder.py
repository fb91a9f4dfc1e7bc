"""Where callbacks write that are given no path of their own, and whether they can write there at all."""

import tempfile
from pathlib import Path

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
