"""Files that are whole or not there, whatever happens while they are written: checkpoints first of all."""

import os
import shutil
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError


def sync(path: Path) -> None:
    """Wait until the disk holds a file, or the names in a folder where its file system offers that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(*[OSError] if path.is_dir() else []):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file or folder that the ``with`` block cannot write, and why.

    Raises:
        OSError: it cannot be written; torch's writer and safetensors hide the system's reason behind errors of their
            own.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {find_reason(error)}; earlier files are as they were") from error


def find_reason(error: BaseException) -> str:
    """Return what the system said about a failed write; without that, the error's first line."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        cause = cause.__cause__ or cause.__context__
    return str(cause.strerror) if isinstance(cause, OSError) else (str(error).splitlines() or [repr(error)])[0]


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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the ``with`` block a hidden file beside ``path`` to write, which takes the place of ``path`` once whole.

    After an exception the hidden file is removed and ``path`` is as it was.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        yield part
        sync(part)
        part.replace(path)
        sync(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def require_whole(path: Path) -> None:
    """Check the checksums that torch writes into a checkpoint, one for each of its parts.

    Raises:
        ValueError: the file is damaged; the message names the newest checkpoint beside it that is whole.
    """
    if is_whole(path):
        return
    others = sorted(path.parent.glob("*.ckpt"), key=lambda other: other.stat().st_mtime, reverse=True)
    good = next((other for other in others if other != path and is_whole(other)), None)
    raise ValueError(
        f"the checkpoint '{path}' is damaged, or no checkpoint: its checksums do not fit; "
        + (f"the newest whole one beside it is '{good}'" if good else "there is no whole one beside it")
    )


def is_whole(path: Path) -> bool:
    """Return whether all checksums of a checkpoint fit."""
    try:
        with zipfile.ZipFile(path) as parts:
            return parts.testzip() is None
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, ValueError, EOFError):  # whatever damage causes
        return False


def require_plain(file: Path, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint loads as plain data, without running code that it holds.

    Raises:
        ValueError: it does not; the message names the part and the type that is in the way.
    """
    try:
        torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        strange = {
            name: sorted(kind for kind in _types(state) if not kind.startswith(("builtins.", "torch.", "collections.")))
            for name, state in checkpoint.get("callbacks", {}).items()
        }
        where = next((f"that of {name} has {kinds[0]}" for name, kinds in strange.items() if kinds), str(error))
        raise ValueError(
            "the checkpoint could never be loaded again: a state_dict may hold tensors, numbers, texts, lists and "
            f"dicts; {where}"
        ) from error


def _types(state: Any) -> set[str]:
    """Return the full names of the types of all that a state holds."""
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple | set) else ()
    own = f"{type(state).__module__}.{type(state).__qualname__}"
    return {own}.union(*map(_types, parts))


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its name and renames it when the disk holds it; refuses a damaged one.

    So a name never holds half a file, on any file system, and nothing is left in the temporary folder. The first
    checkpoint is read back, so that a run does not go on for hours with checkpoints that cannot be loaded.
    """

    _read_back = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it cannot be written; earlier files stay as they were.
            ValueError: it holds something that no resume would load.
        """
        file = Path(path)
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with naming(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            for left in file.parent.glob(".*.ckpt.*partial"):  # of a killed run
                left.unlink()
            with replacing(file) as part:
                with part.open("wb") as out:
                    torch.save(checkpoint, out)
                if not self._read_back:
                    require_plain(part, checkpoint)
                    self._read_back = True

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = lambda storage, _: storage, weights_only: Any = None
    ) -> dict[str, Any]:
        """Read a checkpoint: plain data, unless ``weights_only`` is False and the file is a local one.

        Raises:
            ValueError: the file is damaged.
        """
        local = "://" not in str(path)
        if local and Path(path).is_file():
            require_whole(Path(path))
        return super().load_checkpoint(path, map_location, weights_only=not local or weights_only is not False)


def refuse_unwritable_folders(trainer: Trainer) -> None:
    """Raise ValueError if a folder that a callback for checkpoints or the profiler names cannot be written."""
    for part in (*trainer.checkpoint_callbacks, trainer.profiler):  # type: ignore[attr-defined]
        folder = getattr(part, "dirpath", None)
        if folder and "://" not in str(folder) and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            if Path(folder).is_file():
                raise ValueError(f"{type(part).__name__}: {folder} is a file; name a folder")
            require_writable(Path(folder), type(part).__name__)


def keep_checkpoints_whole(trainer: Trainer) -> None:
    """Make a Trainer read and write checkpoints by ``WholeCheckpoints``, unless it was given another way.

    Where a ModelCheckpoint has ``save_last: link``, ``last.ckpt`` is a second name of the file; see ``link_last``.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            # Lightning's own is a symbolic link, which dangles once its file is moved or deleted.
            callback._link_checkpoint = link_last  # type: ignore[method-assign, assignment]


def link_last(trainer: Trainer, filepath: str, linkpath: str) -> None:
    """Give the checkpoint at ``filepath`` the name ``linkpath`` too, in place of what has it (collective).

    Neither name depends on the other, so either may be moved or deleted, and a copy of the folder holds both. A file
    with that name that is newer stays. A sharded checkpoint is a folder and gets Lightning's symbolic link.
    """
    if Path(filepath).is_dir():
        ModelCheckpoint._link_checkpoint(trainer, filepath, linkpath)
        return
    if trainer.is_global_zero:
        add_name(Path(filepath), Path(linkpath))
    trainer.strategy.barrier()


def add_name(file: Path, name: Path) -> None:
    """Give a file a second name (a hard link), or copy it where the file system has no such names.

    A newer file that has the name keeps it. A kill leaves the name to the old file or gives it to the new one.

    Raises:
        OSError: the name cannot be written; the file that had it stays as it was.
    """
    if name.exists() and (name.samefile(file) or name.stat().st_mtime_ns > file.stat().st_mtime_ns):
        return
    with naming(name), replacing(name) as part:
        try:
            os.link(file, part)
        except OSError:
            shutil.copyfile(file, part)
