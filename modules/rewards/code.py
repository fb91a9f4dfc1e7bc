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

TEXTS, LISTS = ("prompt", "test", "entry_point", "test_setup_code"), ("test_list", "test_imports")


class CodeTests(Verifier):
    """Gives 1.0 when the program in the completion passes all unit tests of its row, else 0.0.

    A row has HumanEval's columns (arXiv 2107.03374) ``test``, which defines ``check(candidate)``, and ``entry_point``,
    the function's name; or MBPP's (arXiv 2108.07732) ``test_list``, assertions, and perhaps ``test_setup_code``. With
    either, ``test_imports`` may hold lines that import what the tests use. A name that the tests neither define nor
    import is the program's, except modules of Python's library such as ``math`` in ``math.isclose``.

    The program is the last fenced block after ``</think>``, else all of the text. If the row's column ``prompt`` is the
    head of the function, as in HumanEval, the program may go on with it or define the function anew.

    The program runs in a process of its own, and the tests in another, which calls its functions and gets plain values
    back: numbers, texts, bytes, lists, tuples, dicts and sets. So a program that ends early, prints that it passed,
    changes ``assert`` or returns an object that equals everything is wrong. A program that hangs, crashes, takes all
    memory or starts processes is wrong too; ``faults`` counts the ``program late`` and the ``program ended``. The
    process has an empty environment, an empty folder that is deleted, no input, no output, and limits of time, memory,
    file size and open files. On Linux it opens no network connection; starts, signals and slows no process; writes,
    empties and removes no file elsewhere; and changes no file's mode, owner, times or attributes. A warning says what
    the system does not let it give up.

    Not protected are what this user can read, among it the list of processes, the processor during ``seconds``, and the
    disk under many small files. A program can hold read locks (``fcntl``) on files that it can read, while it runs. The
    tests themselves are trusted. An object of the program's own class has attributes and methods in the tests, but
    equals only itself, and an assertion does not take it for true.

    Args:
        seconds: > 0, wall time for the program with all its tests, without the start of its process.
        memory: > 0, MiB of address space of the program.
        name: label of the metric.

    Raises:
        ValueError: an argument is out of range; or no row of the first call has tests. Later a row without tests counts
            as ``error``, and its score is None. So do tests that do not compile, import what is not there, fail before
            they use the program, as ``test_setup_code`` may, or hand the program what is no plain value.
    """

    check = "unit_tests"
    checks_answer = True

    def __init__(self, seconds: float = 5.0, memory: int = 1024, name: str = "code_tests") -> None:
        if not 0 < seconds < float("inf") or memory <= 0:
            raise ValueError(
                f"CodeTests needs finite seconds > 0 and memory > 0 MiB, got seconds={seconds}, memory={memory}"
            )
        super().__init__(name, {"seconds": seconds, "memory": memory * 2**20}, timeout=2 * START_SECONDS + seconds)
        self._found_tests = False

    def describe(self, rollout: Rollout) -> dict[str, Any]:
        """Return the columns of the row's tests, or why there are none."""
        info = dict(rollout.info or {})
        kept = {column: info[column] for column in TEXTS if isinstance(info.get(column), str)}
        kept |= {column: info[column] for column in LISTS if is_code(info.get(column))}
        named = "test" in kept and kept.get("entry_point", "").isidentifier()
        if (kept.get("test_list") or named) and ("test_imports" in kept or not info.get("test_imports")):
            return kept
        return {
            "refusal": f"{rollout.uid}: CodeTests found no tests in this row; it reads the columns test (code that "
            "defines check(candidate)) and entry_point (a name), or test_list (a list of assertions), and if there are "
            "any test_imports (a list of lines)"
        }

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return 1.0, 0.0 or None per rollout."""
        if not self._found_tests and rollouts:
            infos = [self.describe(rollout) for rollout in rollouts]
            if all("refusal" in info for info in infos):
                raise ValueError(infos[0]["refusal"])
            self._found_tests = True
        warn_of_rights()
        return super().__call__(rollouts)


def is_code(value: Any) -> bool:
    """Return whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(line, str) for line in value)


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
        "processes": "start, signal and slow other processes, connect to sockets, leave shared memory behind and "
        "change the mode and times of this user's files (before Linux 6.2 also empty them)",
        "files": "write to every file that this user may write to",
    }
    rights = [left[right] for right in json.loads(said.splitlines()[0])["left"]]
    if rights:
        warnings.warn(
            f"CodeTests: on this system ({sys.platform}) the programs under test can {' and '.join(rights)}; run in a "
            "container where that matters",
            stacklevel=3,
        )
