"""Where callbacks write when they are given no path, and a check that they can write there."""

import tempfile
from pathlib import Path

from lightning.pytorch import Trainer


def in_run_folder(trainer: Trainer, path: Path | None, name: str) -> Path:
    """Return ``path``, or ``name`` in the run's folder when ``path`` is None. The run's folder is ``default_root_dir``."""
    return Path(trainer.default_root_dir) / name if path is None else path


def require_writable(path: Path, who: str) -> None:
    """Check that ``path`` can be written, and leave nothing behind.

    Raises ValueError, which begins with ``who``, when it cannot.
    """
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    if path.is_file():
        folder = path.absolute().parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{who}: {path} cannot be written ({folder}: {error.strerror}); name another place") from error
