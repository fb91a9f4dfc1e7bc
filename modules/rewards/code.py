"""The reward of programs: unit tests."""

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

from modules.rewards.checks.unit_tests import START_SECONDS, start_host, stop_host
from modules.rewards.verifier import Verifier
from modules.types import Rollout

COLUMNS = ("prompt", "test", "entry_point", "test_list", "test_setup_code")


class CodeTests(Verifier):
    """Gives 1.0 when the program in the completion passes all unit tests of its row, else 0.0.

    A row has HumanEval's columns (arXiv 2107.03374) ``test``, which defines ``check(candidate)``, and ``entry_point``,
    the function's name; or MBPP's (arXiv 2108.07732) ``test_list``, assertions, and perhaps ``test_setup_code``. The
    program is the last fenced block after ``</think>``, else all of the text. If the row's column ``prompt`` is the head
    of the function, as in HumanEval, the program may go on with it or define the function anew.

    The program runs in a process of its own, and the tests in another, which calls its functions and gets plain values
    back: numbers, texts, bytes, lists, tuples, dicts and sets. So a program that ends early, prints that it passed,
    changes ``assert`` or returns an object that equals everything is wrong. A program that hangs, crashes, takes all
    memory or starts processes is wrong too; ``faults`` counts the ``program late`` and the ``program ended``. The process has an empty environment, an empty folder that is deleted, no
    input, no output, and limits of time, memory, file size and open files. On Linux it has no network, starts, sees and
    signals no process, and writes nowhere else; a warning says what the system does not let it give up.

    Not protected are what this user can read, the processor during ``seconds``, and the disk under many small files. The
    tests themselves are trusted. An object of the program's own class has attributes and methods in the tests, but
    equals only itself.

    Args:
        seconds: > 0, wall time for the program with all its tests, without the start of its process.
        memory: > 0, MiB of address space of the program.
        name: label of the metric.

    Raises:
        ValueError: an argument is out of range. When called: a row has no tests. Tests that do not compile, or that
            hand the program what is no plain value, count as ``error``: the score is None.
    """

    check = "unit_tests"
    checks_answer = True

    def __init__(self, seconds: float = 5.0, memory: int = 1024, name: str = "code_tests") -> None:
        if not 0 < seconds < float("inf") or memory <= 0:
            raise ValueError(
                f"CodeTests needs finite seconds > 0 and memory > 0 MiB, got seconds={seconds}, memory={memory}"
            )
        super().__init__(name, {"seconds": seconds, "memory": memory * 2**20}, timeout=2 * START_SECONDS + seconds)

    def describe(self, rollout: Rollout) -> dict[str, Any]:
        """Return the columns of the row's tests, or refuse the row."""
        info = {column: rollout.info[column] for column in COLUMNS if column in rollout.info} if rollout.info else {}
        listed, test, entry_point = info.get("test_list"), info.get("test"), info.get("entry_point")
        if isinstance(listed, list) and listed and all(isinstance(line, str) for line in listed):
            return info
        if isinstance(test, str) and isinstance(entry_point, str) and entry_point.isidentifier():
            return info
        raise ValueError(
            f"{rollout.uid}: CodeTests found no tests in this row; it reads the columns test (code that defines "
            "check(candidate)) and entry_point (a name), or test_list (a list of assertions)"
        )

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return 1.0, 0.0 or None per rollout."""
        warn_of_rights()
        return super().__call__(rollouts)


@cache
def warn_of_rights() -> None:
    """Say once what programs under test may do on this system although they should not.

    Raises:
        RuntimeError: the process for a program does not start.
    """
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        host = start_host(folder, 5.0, 2**30)
        try:
            said = host.communicate(timeout=START_SECONDS)[0]
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            stop_host(host)
    if not said:
        raise RuntimeError(f"CodeTests cannot start a process for programs; run it by hand to see why: {host.args!r}")
    left = {
        "network": "use the network",
        "processes": "start other processes",
        "files": "write to every file that this user may write to",
    }
    rights = [left[right] for right in json.loads(said.splitlines()[0])["left"]]
    if rights:
        warnings.warn(
            f"CodeTests: on this system ({sys.platform}) the programs under test can {' and '.join(rights)}; run in a "
            "container where that matters",
            stacklevel=3,
        )
