"""Starts a process that samples for ``WorkerEngine``, which runs this file by path.

The packages are opened without what their ``__init__`` imports, so that the process starts in half of the time and needs
no trainer. They import it when something asks for it, such as a class of the user's.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


def open_package(name: str) -> None:
    """Put a package into ``sys.modules`` whose ``__init__`` runs when an attribute is missing."""
    folder = ROOT.joinpath(*name.split("."))
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package, loader = importlib.util.module_from_spec(spec), spec.loader

    def load(attribute: str) -> Any:
        if attribute.startswith("__") or not hasattr(package, "__getattr__"):
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        del package.__getattr__
        loader.exec_module(package)
        return getattr(package, attribute)

    package.__getattr__ = load  # type: ignore[method-assign]
    sys.modules[name] = package
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, package)


def start(parent: int, memory: int, number: int) -> None:
    """Serve the process ``parent`` until it ends or closes the pipe; see ``sampling_worker.serve_trainer``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    for name in ("modules", "modules.rewards", "modules.rollout", "modules.rollout.workers"):
        open_package(name)
    from modules.rewards.checks.program_host import die_with_parent

    die_with_parent()
    if os.getppid() != parent:
        return
    from modules.rollout.workers.sampling_worker import serve_trainer

    serve_trainer(parent, memory, number)


if __name__ == "__main__":
    start(*map(int, sys.argv[1:4]))
