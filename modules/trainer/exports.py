"""Folders of exported models: written whole or not at all, replaced only if an export wrote them, with their origin."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from modules.trainer.saving import naming, sync

MARK = ".written-by-export"  # file in an export that names the other files of the export
LINEAGE = "lineage.json"  # file in an export that says what its weights are and what they were made from


@dataclass(frozen=True)
class Origin:
    """A model that others are made from."""

    policy: str  # as the run named it
    weights: str | None  # digest of its weights; None = a built-in model or a hub id, which its name tells

    def is_same(self, other: "Origin") -> bool:
        """Return whether both are the same weights, or without digests have the same name."""
        if self.weights is None and other.weights is None:
            return self.policy == other.policy
        return self.weights == other.weights


@dataclass(frozen=True)
class Lineage:
    """What an export says of its weights."""

    made_by: str  # the method that trained it, or the command that made it
    weights: str | None  # digest of its weights
    parents: list[Origin]  # what it was made from


def find_origin(policy: str) -> Origin:
    """Return what identifies a model: the digest of the weights in its folder or GGUF file, else its name."""
    path = Path(policy).expanduser()
    return Origin(policy, digest_weights(path) if path.exists() else None)


def digest_weights(path: Path) -> str | None:
    """Return a hash of a model's weight files, names and contents; None for a folder without any.

    Args:
        path: a folder, or one file.
    """
    kinds = (".safetensors", ".bin", ".gguf")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in kinds)
    whole = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as content:
            own = hashlib.file_digest(content, "blake2b")
        name = "" if path.is_file() else file.relative_to(path).as_posix()
        whole.update(f"{name} {own.hexdigest()}\n".encode())
    return whole.hexdigest() if files else None


def read_lineage(folder: Path) -> Lineage | None:
    """Read what an export says of its weights; None for a folder that says nothing.

    Raises:
        ValueError: the file that says so is damaged.
    """
    try:
        found = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
        return Lineage(found["made_by"], found["weights"], [Origin(**parent) for parent in found["parents"]])
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder / LINEAGE} is damaged") from error


def explain_occupied(folder: Path, may_lack_mark: bool = False) -> str | None:
    """Return why a folder must not be replaced; None = it is an export, is empty or does not exist.

    Args:
        folder: the folder.
        may_lack_mark: a folder without the mark of an export is one all the same, of an earlier version.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        return "which is a file"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if not found or (MARK not in found and may_lack_mark):
        return None
    if MARK not in found:
        return f"which no export has written (no {MARK} in it)"
    strange = found - set((folder / MARK).read_text(encoding="utf-8").splitlines()) - {MARK}
    return f"with files that no export has written ({', '.join(sorted(strange)[:3])})" if strange else None


def write_export(folder: Path, save: Callable[[Path], None], made_by: str, parents: Sequence[Origin]) -> None:
    """Write an export beside its name, and put it into the place of an earlier one when the disk holds it.

    Args:
        folder: the export; its parent folders are made.
        save: writes the model and its tokenizer into an existing folder.
        made_by: see ``Lineage``.
        parents: see ``Lineage``.

    Raises:
        OSError: it cannot be written; an earlier export stays as it was.
    """
    partial, aside = name_sibling(folder, "partial"), name_aside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming(folder):
            partial.mkdir(parents=True)
            save(partial)
            lineage = Lineage(made_by, digest_weights(partial), list(parents))
            (partial / LINEAGE).write_text(json.dumps(asdict(lineage), indent=1) + "\n", encoding="utf-8")
            mode = (partial / "config.json").stat().st_mode
            files = [path for path in partial.rglob("*") if path.is_file()]
            names = sorted(path.relative_to(partial).as_posix() for path in files)
            (partial / MARK).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
            for file in files:
                if file.suffix == ".safetensors":
                    file.chmod(mode)  # safetensors lets only the owner read, whatever the umask
            for path in (*files, partial / MARK, partial):
                sync(path)
            shutil.rmtree(aside, ignore_errors=True)
            if folder.exists():
                folder.rename(aside)
            partial.rename(folder)
            sync(folder.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Put back an export that a killed run had moved away and not yet replaced."""
    if name_aside(folder).is_dir() and not folder.exists():
        name_aside(folder).rename(folder)


def name_aside(folder: Path) -> Path:
    """Return where an earlier export lies while it is replaced."""
    return name_sibling(folder, "previous")


def name_sibling(folder: Path, suffix: str) -> Path:
    """Return a hidden name beside a folder. It is on the same disk, so that a rename is atomic."""
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.{suffix}")
