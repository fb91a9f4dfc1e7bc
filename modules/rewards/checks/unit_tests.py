"""Tests the program in a completion by the unit tests of its row."""

import ast
import builtins
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

from .program_host import LONGEST, die_with_parent, pack, unpack

HOST = Path(__file__).parent / "program_host.py"
START_SECONDS = 60.0
LIBRARIES = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
PASSED, FAILED, BROKEN, ENDED, LATE = b"+", b"-", b"!", b"x", b"t"
READY = b"r"  # the tests are prepared, and the program begins
FAULTS = {ENDED: "program ended", LATE: "program late"}
_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def judge(
    text: str, answer: str | None, info: dict[str, Any], seconds: float, memory: int
) -> float | tuple[float, str]:
    """Return 1.0 if the program in a text passes all tests of its row, else 0.0; with it, a fault that is in
    ``FAULTS``.

    Args:
        text: the completion.
        answer: not used.
        info: the row's ``test`` and ``entry_point``, or ``test_list``; also its ``prompt``, ``test_imports`` and
            ``test_setup_code``. Or, of a row without tests, ``refusal``, a sentence.
        seconds: of wall time for the program and all tests.
        memory: bytes of address space of the program.

    Raises:
        ValueError: the row has no tests, or they do not compile, import what is not there, fail before they use the
            program, or hand it what is no plain value.
    """
    if "refusal" in info:
        raise ValueError(info["refusal"])
    stub, parts = find_stub(info), write_tests(info)
    tests = "\n".join(parts)
    try:
        names = find_free_names(tests)
        codes = [(compile_tests(part), find_free_names(part)) for part in parts]
    except SyntaxError as error:
        raise ValueError(f"the row's tests do not compile: {error}") from error
    if not info.get("test_list") and not defines(tests, "check"):
        raise ValueError("the row's column test does not define check(candidate)")
    program = write_program(text, info, stub)
    if program is None:
        return 0.0
    imports = "\n".join([*(info.get("test_imports") or []), *(f"import {name}" for name in find_modules(tests, names))])
    verdict = run_trial(TestRun(program, codes, names, stub, imports, info.get("entry_point")), seconds, memory)
    if verdict[:1] == BROKEN:
        raise ValueError(verdict[1:].decode())
    return (0.0, FAULTS[verdict]) if verdict in FAULTS else float(verdict == PASSED)


@dataclass(frozen=True)
class TestRun:
    """A program with its tests."""

    program: str
    # What prepares the tests, and the tests; each with the names that it reads and does not define.
    tests: list[tuple[CodeType, list[str]]]
    names: list[str]  # that the tests read and do not define
    stub: str  # code of the prompt, whose helpers the tests may call
    imports: str  # lines that give the tests modules of their own
    entry_point: str | None


def find_stub(info: dict[str, Any]) -> str:
    """Return the row's prompt with an empty body if it is the head of the function to write, else ""."""
    prompt, name = info.get("prompt"), info.get("entry_point")
    stub = f"{prompt}\n    pass\n"
    return stub if isinstance(prompt, str) and name and defines(stub, name) else ""


def defines(code: str, name: str) -> bool:
    """Return whether code compiles and defines a function, class or variable of this name on its top level."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(
        getattr(part, "name", None) == name
        or any(isinstance(target, ast.Name) and target.id == name for target in getattr(part, "targets", []))
        for part in body
    )


def write_tests(info: dict[str, Any]) -> list[str]:
    """Return the code of a row's tests: what prepares them, and then the tests."""
    imports = info.get("test_imports") or []
    if info.get("test_list"):
        return ["\n".join([*imports, info.get("test_setup_code") or ""]), "\n".join(info["test_list"])]
    return ["\n".join([*imports, info["test"]]), f"check({info['entry_point']})\n"]


def compile_tests(tests: str) -> CodeType:
    """Compile tests so that an assertion fails on an object of the program, which Python would take for true.

    Raises:
        SyntaxError: they are no Python.
    """
    tree = ast.parse(tests)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            node.test = demand_plain(node.test)
    return compile(ast.fix_missing_locations(tree), "tests", "exec", dont_inherit=True)


def demand_plain(test: ast.expr) -> ast.expr:
    """Return an expression that refuses the objects of the program whose truth is asked."""
    if isinstance(test, ast.BoolOp):
        test.values = [demand_plain(part) for part in test.values]
    elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test.operand = demand_plain(test.operand)
    elif not isinstance(test, ast.Compare):
        return ast.Call(ast.Name(refuse_object.__name__, ast.Load()), [test], [])
    return test


def find_free_names(tests: str) -> list[str]:
    """Return the names that tests read and neither they nor Python define.

    >>> find_free_names("import math\\nassert add(1, x := 2) == math.floor(3.5)")
    ['add']
    """
    used: dict[str, None] = {}
    bound = set(dir(builtins))
    for node in ast.walk(ast.parse(tests)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used[node.id] = None
        elif isinstance(node, ast.Name):
            bound.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return [name for name in used if name not in bound]


def find_modules(tests: str, names: list[str]) -> list[str]:
    """Return those names that are modules of Python's library, and of which the tests only read attributes.

    >>> find_modules("assert math.isclose(queue(1), copy.x) and copy", ["math", "queue", "copy"])
    ['math']
    """
    nodes = list(ast.walk(ast.parse(tests)))
    read = [node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    used = [node.id for node in nodes if isinstance(node, ast.Name)]
    return [name for name in names if name in sys.stdlib_module_names and read.count(name) == used.count(name)]


def write_program(text: str, info: dict[str, Any], stub: str) -> str | None:
    """Return the program of a completion: its last fenced block, else all of it; None if it does not compile.

    Where the prompt is the head of a function and the completion does not define it anew, the completion goes on with
    it, up to the first line that is not indented if the rest is no program.
    """
    blocks = _FENCED.findall(text)
    code = blocks[-1] if blocks else text
    if not stub:
        tries = [code]
    elif defines(code, info["entry_point"]):
        tries = [f"{stub}\n{code}"]
    else:
        head = re.match(r"\s*(?:.+\n?)(?:[ \t]+.*\n?|\s*\n)*", code)
        tries = [info["prompt"] + code, info["prompt"] + (head[0] if head else "")]
    for program in tries:
        with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            compile(program, "program", "exec", dont_inherit=True)
            return program
    return None


class ProgramFailed(BaseException):  # so that tests with ``except Exception`` end too
    """The program ended, or its answer is too long."""


class BrokenTest(BaseException):
    """The tests hand the program what cannot be handed over, or cannot start."""


# A UnicodeError takes more than a message; a StopIteration would end a loop of the tests as if all were well.
OTHERS = (UnicodeError, StopIteration)


class Line:
    """The connection to a program in its host, from the process that runs the tests."""

    def __init__(self, requests: int, answers: int) -> None:
        self.requests = requests
        self.answers = os.fdopen(answers, "rb", closefd=False)

    def ask(self, request: Any) -> dict[str, Any]:
        """Send a request and return the answer, or raise what the program raised."""
        rest = memoryview(json.dumps(request).encode() + b"\n")
        while rest:
            rest = rest[os.write(self.requests, rest) :]
        line = self.answers.readline(LONGEST)
        if not line.endswith(b"\n"):
            raise ProgramFailed
        answer: dict[str, Any] = json.loads(line)
        if "raised" in answer:
            kind = getattr(builtins, str(answer["raised"]), None)
            known = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, OTHERS)
            raise kind(answer["message"]) if known else RuntimeError(answer["message"])  # type: ignore[misc]
        return answer


class Remote:
    """A function or another object of the program, which the tests call; equal to itself only."""

    def __init__(self, line: Line, number: int) -> None:
        vars(self).update(_line=line, _number=number)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        """Call it in the program; lists, dicts and sets that it changes are changed here too."""
        request = {"object": self._number, "positional": pack(list(positional), tell_number)}
        request["named"] = pack(named, tell_number)
        answer = self._line.ask(request)
        find = partial(Remote, self._line)
        for mine, left in zip(positional, unpack(answer.get("positional", []), find), strict=False):
            if isinstance(mine, list):
                mine[:] = left
            elif isinstance(mine, dict | set):
                mine.clear()
                mine.update(left)
        return unpack(answer["value"], find)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that it has in the program."""
        if name.startswith("__"):
            raise AttributeError(name)
        answer = self._line.ask({"object": self._number, "attribute": name})
        return unpack(answer["value"], partial(Remote, self._line))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute in the program."""
        self._line.ask({"object": self._number, "set": name, "to": pack(value, tell_number)})


def refuse_object(value: Any) -> Any:
    """Return a value whose truth an assertion asks. Raises AssertionError for an object of the program."""
    if isinstance(value, Remote):
        raise AssertionError("the program gave an object of its own, which is no plain value")
    return value


def tell_number(value: Any) -> int:
    """Return the number that an object has in the program."""
    if isinstance(value, Remote):
        return value._number
    raise BrokenTest(f"the tests call the program with a {type(value).__name__}, which is no plain value")


def run_trial(trial: TestRun, seconds: float, memory: int) -> bytes:
    """Run a program in a host and its tests in a fork of this process; return the verdict."""
    folder = tempfile.mkdtemp(prefix="program-")
    host = start_host(folder, seconds, memory)
    try:
        assert host.stdin is not None and host.stdout is not None
        if not select.select([host.stdout], [], [], START_SECONDS)[0] or not host.stdout.readline():
            raise RuntimeError(f"the host of programs did not start in {START_SECONDS:g} s; run {HOST} by hand")
        return fork_tests(trial, Line(host.stdin.fileno(), host.stdout.fileno()), seconds)
    finally:
        stop_host(host)
        shutil.rmtree(folder, ignore_errors=True)


def start_host(folder: str, seconds: float, memory: int) -> "subprocess.Popen[bytes]":
    """Start the process for a program, with nothing of this process's environment."""
    environment = {
        "HOME": folder,
        "LANG": "C.UTF-8",
        "OPENBLAS_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": folder,
    }
    return subprocess.Popen(
        # Without site (-S) it starts in half the time; libraries are found all the same.
        [sys.executable, "-S", "-P", str(HOST), str(seconds), str(memory), *LIBRARIES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )


def stop_host(host: "subprocess.Popen[bytes]") -> None:
    """Kill a host with all processes of its session."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(host.pid, signal.SIGKILL)
    with host:
        host.kill()


def fork_tests(trial: TestRun, line: Line, seconds: float) -> bytes:
    """Run the tests in a fork of this process; return the verdict, ``FAILED`` if the fork ends without one.

    If it ends or is late before the program begins, the tests are broken.
    """
    reading, writing = os.pipe()
    deadline = time.monotonic() + seconds
    child = os.fork()
    if child == 0:
        try:
            die_with_parent()
            os.write(writing, find_verdict(trial, line, partial(os.write, writing, READY)))
        finally:
            os._exit(0)
    os.close(writing)
    said = b""
    try:
        while said in (b"", READY):
            ready = said == READY
            if not select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return LATE if ready else BROKEN + f"the row's tests do not begin in {seconds:g} s".encode()
            part = os.read(reading, 2**12)
            if not part:
                return FAILED if ready else BROKEN + b"the process of the row's tests ends before the program begins"
            said += part
        return said.removeprefix(READY)
    finally:
        os.close(reading)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def run_alone(code: CodeType, scope: dict[str, Any], what: str) -> None:
    """Run what the tests need before the program. Raises BrokenTest if it fails."""
    try:
        exec(code, scope)
    except BaseException as error:
        raise BrokenTest(f"the {what} of the row's tests fail: {type(error).__name__}: {str(error)[:500]}") from error


def find_verdict(trial: TestRun, line: Line, begin: Callable[[], Any]) -> bytes:
    """Run the program, then the tests with its functions; imports and helpers of the prompt are the tests' own.

    What prepares the tests runs before the program, if it reads no name of the program. Then its failure is the row's
    fault.
    """
    scope: dict[str, Any] = {"__name__": "tests", refuse_object.__name__: refuse_object}
    entry = {trial.entry_point} if trial.entry_point else set()
    ((prepare, needed), (tests, _)) = trial.tests
    try:
        exec(compile(trial.stub, "prompt", "exec", dont_inherit=True), scope)
        run_alone(compile(trial.imports, "imports", "exec", dont_inherit=True), scope, "imports")
        alone = not (set(needed) - set(scope) | set(needed) & entry)
        if alone:
            run_alone(prepare, scope, "preparations")
        begin()
        line.ask(trial.program)
        for name in {*trial.names, *entry} - (set(scope) - entry):
            scope.pop(name, None)
            with suppress(NameError):
                scope[name] = unpack(line.ask({"get": name})["value"], partial(Remote, line))
        if not alone:
            exec(prepare, scope)
        exec(tests, scope)
    except BrokenTest as error:
        return BROKEN + str(error).encode()
    except (ProgramFailed, BrokenPipeError):
        return ENDED
    except BaseException:
        return FAILED
    return PASSED
