"""Judges completions in a child process: requests come as JSON lines, an answer goes back for each completion.

``Pool`` runs this file by path, so that it needs neither torch nor this repository's packages. A request is {"check":
name in ``checks`` or path of a file, "settings": dict, "timeout": seconds, "items": [[text, answer, info], ...]}. The
answers are one line "ready" when the check is loaded, or {"refused": why}; then a line per item: a number, null,
{"score": number, "cause": fault}, or {"score": null, "cause": "error" or "memory", "detail": str}.
"""

import importlib
import importlib.util
import json
import math
import os
import select
import signal
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

CHECKS = Path(__file__).parents[1] / "checks"
PATIENCE = 2.0  # seconds between two looks at whether the parent lives


def import_file(name: str, path: Path) -> ModuleType:
    """Import a file, or a package by its ``__init__.py``, under ``name``."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def load_check(check: str) -> ModuleType:
    """Import a check and let it load what it needs."""
    module = import_file(Path(check).stem, Path(check)) if "/" in check else importlib.import_module(f"checks.{check}")
    getattr(module, "prepare", lambda: None)()
    return module


def judge_item(check: ModuleType, item: list[Any], settings: dict[str, Any]) -> Any:
    """Return a check's verdict, or what went wrong, as JSON has it."""
    try:
        value = check.judge(*item, **settings)
        if isinstance(value, tuple):
            return {"score": float(value[0]), "cause": value[1]}
        number = None if value is None else float(value)
        if number is None or math.isfinite(number):
            return number
        return {"score": None, "cause": "error", "detail": f"judge returned {number}"}
    except MemoryError:
        return {"score": None, "cause": "memory"}
    except BaseException as error:  # SystemExit too: the item is lost, not the worker
        return {"score": None, "cause": "error", "detail": f"{type(error).__name__}: {str(error)[:500]}"}


def limit_memory(limit: int) -> None:
    """Bound the address space of this process, in bytes, where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, ValueError, OSError):
        pass


def wait_for_line(parent: int) -> bool:
    """Wait until a request or the end of the input comes; False = the parent is gone."""
    while not select.select([0], [], [], PATIENCE)[0]:
        if os.getppid() != parent:
            return False
    return True


def serve_checks(parent: int, memory: int) -> None:
    """Answer requests until the input ends or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what checks and libraries print is no verdict
    importlib.import_module("importlib.machinery")
    import_file("checks", CHECKS / "__init__.py").__path__ = [str(CHECKS)]
    # A check may switch off the alarm below, and hang with no parent left that could end it.
    importlib.import_module("checks.program_host").die_with_parent()
    if os.getppid() != parent:
        return
    limit_memory(memory)

    def reply(value: Any) -> None:
        os.write(replies, json.dumps(value).encode() + b"\n")

    while wait_for_line(parent) and (line := sys.stdin.buffer.readline()):
        request = json.loads(line)
        try:
            check = load_check(request["check"])
        except Exception as error:
            reply({"refused": f"{type(error).__name__}: {error}"})
            continue
        reply("ready")
        for item in request["items"]:
            # The parent kills this process at the timeout. If the parent is gone, the system's alarm ends a hang that
            # no Python code can end.
            signal.setitimer(signal.ITIMER_REAL, request["timeout"] + 1.0)
            reply(judge_item(check, item, request["settings"]))
        signal.setitimer(signal.ITIMER_REAL, 0.0)


if __name__ == "__main__":
    serve_checks(int(sys.argv[1]), int(sys.argv[2]))
