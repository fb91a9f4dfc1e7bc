"""Commands as they can be pasted into the terminal that the run was started from."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def python() -> str:
    """This interpreter: ``python`` where that is it, else its path, from here where it lies below.

    >>> python().endswith(("python", "python3", Path(sys.executable).name))
    True
    """
    found = shutil.which("python")
    if found and os.path.samefile(found, sys.executable) and Path(found).parent == Path(sys.executable).parent:
        return "python"
    return from_here(Path(sys.executable))


def from_here(path: Path) -> str:
    """A path, from the current folder where it lies below."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def command(*arguments: object, module: str = "modules") -> str:
    """A line that runs a module with these arguments; paths are written from here."""
    shown = (from_here(argument) if isinstance(argument, Path) else str(argument) for argument in arguments)
    return shlex.join([python(), "-m", module, *shown])
