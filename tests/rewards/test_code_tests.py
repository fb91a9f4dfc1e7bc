"""CodeTests with real programs: right ones in every form, wrong ones, and ones that cheat or do harm."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modules.rewards import CodeTests
from modules.rewards.checks import program_host, unit_tests
from modules.rewards.workers.pool import close_pool
from modules.types import Completion, Rollout

ADD = {
    "prompt": 'import math\n\ndef add(a: int, b: int) -> int:\n    """Add."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-5, 5) == 0\n",
}
RIGHT = "    return a + b\n"


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeTests]:
    yield CodeTests(seconds=2.0, memory=256)
    close_pool()


def roll(text: str, row: dict[str, Any]) -> Rollout:
    return Rollout("row 7", "q", [1], None, Completion([2], [0.0], text, "stop"), 0, {}, None, row)


def listed(*tests: str, **more: str) -> dict[str, Any]:
    return {"prompt": "Write a function.", "test_list": list(tests), **more}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RIGHT, 1.0),
        ("    return a - b\n", 0.0),
        ("    return math.floor(a + b)\n", 1.0),  # what the prompt imports is there
        (f"{RIGHT}\nprint('an example is cut off", 1.0),
        (f"So:\n```python\n{ADD['prompt']}{RIGHT}```\nDone.", 1.0),
        (f"```\n{RIGHT}```", 1.0),
        ("```python\ndef add(a, b):\n    return 0\n```\nNo:\n```python\nadd = lambda a, b: a + b\n```", 1.0),
        ("```python\ndef add(a, b):\n    return a + b\n```\nNo:\n```python\ndef add(a, b):\n    return 0\n```", 0.0),
        ("<think>\n```python\ndef add(a, b):\n    return a + b\n```\n</think>I do not know", 0.0),
        ("def add(a, b):\n    return helper(a, b)\n\ndef helper(a, b):\n    return a + b", 1.0),
        ("    return (a + \n", 0.0),
        ("It is the sum.", 0.0),
        ("", 0.0),
    ],
)
def test_forms_of_a_program(reward: CodeTests, text: str, expected: float) -> None:
    assert reward([roll(text, ADD)]) == [expected]


ODD = "class Odd:\n    def __eq__(self, other): return True\n    def __hash__(self): return 3\n    def __bool__(self): return True"
NODE = "class Node:\n    def __init__(self, value): self.value, self.left = value, None"


@pytest.mark.parametrize(
    ("program", "tests", "expected"),
    [
        ("def f(x): return (x, [x], {x}, {'k': (x, None)}, frozenset([x]), b'\\xff', 1j, 10**40, 0.1, True)",
         "r = f(1)\nassert r == (1, [1], {1}, {'k': (1, None)}, frozenset([1]), b'\\xff', 1j, 10**40, 0.1, True)\n"
         "assert [type(part) for part in r[:2]] == [int, list] and type(r[-1]) is bool", 1.0),
        ("def f(x): return float(x)", "assert f('inf') > 1e308 and f('nan') != f('nan')", 1.0),
        ("def f(n): yield from range(n)", "assert list(f(3)) == [0, 1, 2]\nassert f(3) != [0, 1, 2]", 1.0),
        ("def f(x): return (1, 2)", "assert f(0) == [1, 2]", 0.0),
        ("def f(x): x.sort(); x.append(9)", "y = [2, 1]\nassert f(y) is None\nassert y == [1, 2, 9]", 1.0),
        ("def f(x): raise ValueError('no')", "try:\n    f(1)\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert 0", 1.0),
        ("class Stack:\n    def __init__(self): self.held = []\n    def push(self, x): self.held.append(x)\n    def pop(self): return self.held.pop()",
         "s = Stack()\ns.push(4)\ns.push('\\ud800')\nassert s.held == [4, '\\ud800']\nassert s.pop() == '\\ud800'", 1.0),
        ("import numpy\ndef f(): return numpy.float64(0.5), numpy.arange(2)", "assert f() == (0.5, [0, 1])", 1.0),
        ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}", 1.0),
        ("def f(x): return x\nprint(f(1))\nif __name__ == '__main__':\n    raise SystemExit", "assert f(x=[1]) == [1]", 1.0),
        ("LIMIT = 3", "assert LIMIT == 3", 1.0),
        ("def g(x): return x", "assert f(1) == 1", 0.0),
        (f"{ODD}\ndef f(x): return Odd()", "assert f(1)", 0.0),
        (f"{ODD}\ndef f(x): return Odd()", "assert not f(1)", 0.0),
        (f"{ODD}\ndef f(x): return Odd()", "assert f(1) == 3 or f(1)", 0.0),
        (f"{ODD}\ndef f(x): return Odd()", "assert f(1) == 3", 0.0),
        (f"{ODD}\ndef f(x): return Odd()", "assert 3 == f(1)", 0.0),
        (f"{ODD}\ndef f(x): return [Odd()]", "assert f(1) == [3]", 0.0),
        (f"{ODD}\ndef f(x): return {{Odd(): 3}}", "assert f(1) == {3: 3}", 0.0),
        (f"{ODD}\ndef f(x): return Odd()", "x = f(1)\nassert x is not None and x == x", 1.0),
        (f"{NODE}\ndef f(x): return Node(x)", "node, seen = f(3), []\nwhile node:\n    seen.append(node.value)\n    node = node.left\nassert seen == [3]", 1.0),
        ("def f(x):\n    import os; os._exit(0)", "try:\n    f(1)\nexcept Exception:\n    pass", 0.0),
    ],
)  # fmt: skip
def test_what_tests_see_of_a_program(reward: CodeTests, program: str, tests: str, expected: float) -> None:
    assert reward([roll(f"```python\n{program}\n```", listed(*tests.split("\n\n")))]) == [expected]


def test_setup_code_and_helpers_of_the_prompt_are_the_tests_own(reward: CodeTests) -> None:
    row = listed("assert near(half(3), 1.5)", test_setup_code="def near(a, b): return abs(a - b) < 1e-9")
    assert reward([roll("def near(a, b): return True\ndef half(x): return 7", row)]) == [0.0]
    assert reward([roll("def half(x): return x / 2", row)]) == [1.0]
    row = {
        "prompt": "def twice(x):\n    return 2 * x\n\ndef half(x):\n    '''Undo.'''\n",
        "entry_point": "half",
        "test": "def check(candidate):\n    assert candidate(twice(3)) == 3",
    }
    assert reward([roll("    return x / 2\n", row), roll("    return 3\n\ndef twice(x): return 9", row)]) == [1.0, 1.0]
    row["test"] = "def check(candidate):\n    assert twice(candidate(4)) == 4"
    assert reward([roll("    return 0\n\ndef twice(x):\n    return 4", row)]) == [0.0]


def test_a_row_may_prepare_its_tests_with_the_program(reward: CodeTests) -> None:
    row = listed("assert height(root) == 2", test_setup_code="root = Node(1)\nroot.left = Node(2)")
    height = "def height(node): return 0 if node is None else 1 + height(node.left)"
    assert reward([roll(f"{NODE}\n{height}", row)]) == [1.0]
    # a program without Node, or one that fails in the preparation, is itself to blame
    assert reward([roll(height, row), roll(f"def Node(value): raise ValueError\n{height}", row)]) == [0.0, 0.0]


CHEATS = {
    "ends early": "import sys; sys.exit(0)",
    "ends hard": "import os; os._exit(0)",
    "ends in the call": "import os\ndef add(a, b): os._exit(0)",
    "raises SystemExit in the call": "def add(a, b): raise SystemExit(0)",
    "equals everything": "class Any(int):\n    def __eq__(self, other): return True\ndef add(a, b): return Any(77)",
    "equals everything, no number": "class Any:\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
    "other assertion": "import builtins\nbuiltins.AssertionError = type('Fine', (), {})\ndef add(a, b): return 0",
    "says so": "print('passed'); print('+')\ndef add(a, b): print('passed')",
    "own check": "def check(candidate): pass\ndef add(a, b): return 0",
    "writes to every pipe": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'+\\n{\"value\": null}\\n' * 9)\n"
    "    except OSError: pass\ndef add(a, b): return 0",
    "looks into frames": "import sys\ndef add(a, b):\n    frame = sys._getframe()\n    while frame:\n"
    "        for value in frame.f_locals.values():\n            if value == 3: return value\n        frame = frame.f_back",
    "changes json": "import json\njson.loads = lambda line: {'get': 'add'}\njson.dumps = lambda x: '{\"value\": 3}'",
}


@pytest.mark.parametrize("program", CHEATS.values(), ids=CHEATS.keys())
def test_a_cheat_is_wrong(reward: CodeTests, program: str) -> None:
    assert reward([roll(f"```\n{program}\n```", ADD)]) == [0.0]


HARMS = {
    "hang": "while True: pass",
    "hang in C": "10 ** 10 ** 10",
    "hang in the call": "def add(a, b):\n    while True: pass",
    "crash": "import ctypes; ctypes.string_at(0)",
    "memory bomb": "x = bytearray(2 ** 40)",
    "memory bomb of pieces": "x = [bytearray(2 ** 20) for _ in range(10 ** 9)]",
    "fork bomb": "import os, time\nfor _ in range(7): os.fork()\ntime.sleep(99)",
    "fork bomb that goes on": "import os, time\nfor _ in range(7):\n    try: os.fork()\n    except OSError: pass\ntime.sleep(99)",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "deep recursion": "def add(a, b): return add(a, b)",
    "deep recursion in C": "import sys; sys.setrecursionlimit(10 ** 9)\ndef add(a, b): return add(a, b)",
    "no UTF-8": "import os, sys\nos.write(1, b'\\xff\\xfe'); sys.stdout.buffer.write(b'\\xff')\ndef add(a, b): return '\\udcff'",
    "endless output": "while True: print('x' * 10 ** 6)",
    "endless answer": "def add(a, b):\n    return 'x' * 10 ** 8",
    "endless iterator": "import itertools\ndef add(a, b): return itertools.repeat(1)",
    "deep answer": "def add(a, b):\n    x = []\n    for _ in range(10 ** 5): x = [x]\n    return x",
    "large file": "file = open('large', 'wb')\nwhile True: file.write(bytes(10 ** 6))",
    "reads input": "def add(a, b): return int(input())",
}  # fmt: skip


@pytest.mark.parametrize("where", ["main thread", "other thread"])
def test_harm_is_wrong_and_leaves_nothing(reward: CodeTests, where: str) -> None:
    reward([roll(RIGHT, ADD)])
    before = hosts()
    reward.faults.clear()
    programs = list(HARMS.values()) if where == "main thread" else [HARMS["hang"], HARMS["fork bomb"], HARMS["crash"]]
    rolls = [roll(f"```\n{program}\n```", ADD) for program in programs]
    found: list[list[float | None]] = []
    work = threading.Thread(target=lambda: found.append(reward([*rolls, roll(RIGHT, ADD)])))
    if where == "main thread":
        work.run()
    else:
        work.start()
        work.join()
    assert found == [[0.0] * len(rolls) + [1.0]]
    assert {"program late", "program ended"} <= set(reward.faults)
    assert not reward.failures
    assert not list(Path(tempfile.gettempdir()).glob("worker-*/program-*"))
    assert hosts() <= before


def hosts() -> set[int]:
    """Return the processes that run the programs, those that have lost their parent and zombies too."""
    table = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = {int(row[0]): (int(row[1]), row[2]) for line in table.splitlines() for row in [line.split(maxsplit=2)]}

    def is_mine(pid: int) -> bool:
        return pid == os.getpid() or (pid in rows and is_mine(rows[pid][0]))

    return {
        pid
        for pid, (parent, arguments) in rows.items()
        if (str(unit_tests.HOST) in arguments and (parent == 1 or is_mine(pid)))
        or ("defunct" in arguments and is_mine(pid))
    }


def state(pid: int) -> list[str]:
    """Return the state and the parent of a process; Z = it has ended."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    return ["Z", ""]


def test_a_program_has_no_rights(reward: CodeTests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "42")
    (tmp_path / "kept").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"""
import os, signal, socket, pathlib
def tell(*actions):
    said = []
    for action in actions:
        try:
            said.append(repr(action()))
        except OSError as error:
            said.append("refused")
    return said
def explore():
    here = pathlib.Path.cwd()
    inside = here / "mine"
    return tell(
        lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=1),
        lambda: os.kill(os.getppid(), 0),
        lambda: os.execv("/bin/true", ["true"]),
        lambda: pathlib.Path("{tmp_path}/new").write_text("x"),
        lambda: os.remove("{tmp_path}/kept"),
        lambda: sorted(os.listdir(here)),
        lambda: inside.write_text("mine"),
        lambda: inside.write_bytes(bytes(2 ** 24 + 1)),
        lambda: "SECRET_TOKEN" in os.environ,
        lambda: open(f"/proc/{{os.getppid()}}/environ").read(1)[:0],
    )
"""
        refused = ["refused"] * 5 + ["[]", "4", "refused", "False", "refused"]
        assert reward([roll(f"```\n{program}\n```", listed(f"assert explore() == {refused}"))]) == [1.0]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


# What a program tries with another process, with files elsewhere, and with what outlives it. libc = the C library.
REACHES = """
    lambda: fcntl.fcntl(reading, fcntl.F_SETOWN, victim)
    lambda: c("syscall", {"x86_64": 72, "aarch64": 25}[machine], reading, fcntl.F_SETOWN | 1 << 40, victim)
    lambda: fcntl.fcntl(reading, 15, struct.pack("ii", 1, victim))
    lambda: fcntl.fcntl(reading, 10, 9)
    lambda: fcntl.ioctl(pair[0].fileno(), 0x8901, struct.pack("i", victim))
    lambda: fcntl.ioctl(pair[0].fileno(), 0x8902, struct.pack("i", victim))
    lambda: resource.prlimit(victim, resource.RLIMIT_FSIZE, (0, 0))
    lambda: os.setpriority(os.PRIO_PROCESS, victim, 19)
    lambda: os.sched_setaffinity(victim, {0})
    lambda: os.sched_setscheduler(victim, os.SCHED_BATCH, os.sched_param(0))
    lambda: os.sched_setparam(victim, os.sched_param(0))
    lambda: c("syscall", {"x86_64": 251, "aarch64": 30}[machine], 1, victim, 3 << 13)
    lambda: c("syscall", {"x86_64": 256, "aarch64": 238}[machine], victim, 0, 0, 0)
    lambda: c("syscall", {"x86_64": 279, "aarch64": 239}[machine], victim, 0, 0, 0, 0, 0)
    lambda: c("syscall", {"x86_64": 312, "aarch64": 272}[machine], victim, victim, 0, 0, 0)
    lambda: c("syscall", 425, 8, bytes(120))
    lambda: os.pidfd_open(victim)
    lambda: c("prctl", 1, 0, 0, 0, 0)
    lambda: os.truncate(folder + "/kept", 0)
    lambda: os.open(folder + "/kept", os.O_RDONLY | os.O_TRUNC)
    lambda: os.open(folder + "/kept", 3 | os.O_TRUNC)
    lambda: os.chmod(folder + "/kept", 0o777)
    lambda: os.fchmod(os.open(folder + "/kept", os.O_RDONLY), 0o777)
    lambda: c("syscall", 452, -100, folder.encode() + b"/kept", 0o777, 0)
    lambda: os.chown(folder + "/kept", -1, -1)
    lambda: os.fchown(os.open(folder + "/kept", os.O_RDONLY), -1, -1)
    lambda: os.utime(folder + "/kept", (1, 1))
    lambda: os.setxattr(folder + "/kept", "user.x", b"x")
    lambda: os.removexattr(folder + "/kept", "user.x")
    lambda: fcntl.flock(os.open(folder + "/kept", os.O_RDONLY), fcntl.LOCK_EX)
    lambda: fcntl.ioctl(os.open(folder + "/kept", os.O_RDONLY), 0x40086602, struct.pack("q", 0x80))
    lambda: c("shmget", 0, 1 << 20, 0o1600)
    lambda: c("semget", 0, 1, 0o1600)
    lambda: c("msgget", 0, 0o1600)
    lambda: c("mq_open", b"/code-tests", os.O_CREAT | os.O_RDWR, 0o600, 0)
    lambda: c("mq_unlink", b"/code-tests")
    lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    lambda: fcntl.fcntl(os.open(folder + "/kept", os.O_RDONLY), 1024, 0)
"""


def test_a_program_reaches_no_process_and_no_file_of_the_user(reward: CodeTests, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    kept.chmod(0o600)
    before = kept.stat()
    victim = subprocess.Popen(["sleep", "99"])
    program = f"""
import ctypes, errno, fcntl, os, resource, socket, struct
victim, folder, machine = {victim.pid}, "{tmp_path}", os.uname().machine
reading, writing = os.pipe()
pair = socket.socketpair()
libc = ctypes.CDLL(None, use_errno=True)
def c(name, *values):
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in values]
    if libc[name](*values) == -1:
        raise OSError(ctypes.get_errno(), name)
def explore():
    done = []
    for number, action in enumerate([{",".join(REACHES.strip().splitlines())}]):
        try:
            action()
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                continue
        done.append(number)
    fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)
    os.write(writing, b"x")
    return done
"""
    try:
        assert reward([roll(f"```\n{program}\n```", listed("assert explore() == []"))]) == [1.0]
        assert victim.poll() is None
        assert os.getpriority(os.PRIO_PROCESS, victim.pid) == os.getpriority(os.PRIO_PROCESS, 0)
    finally:
        victim.kill()
        victim.wait()
    after = kept.stat()
    assert (after.st_size, after.st_mode, after.st_mtime) == (4, before.st_mode, before.st_mtime)


def filter_call(machine: str, number: int, *values: int, audit: int | None = None) -> int:
    """Return what the filter of an architecture says to a call, by the meaning of BPF's operations."""
    words = {0: number, 4: {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine] if audit is None else audit}
    words |= {16 + 8 * i: value & 0xFFFFFFFF for i, value in enumerate([*values, *[0] * (6 - len(values))])}
    steps, at, held = program_host.write_filter(machine), 0, 0
    while True:
        operation, yes, no, operand = steps[at]
        at += 1
        if operation == 0x06:
            return operand
        if operation == 0x20:
            held = words[operand]
        elif operation == 0x54:
            held &= operand
        else:
            at += yes if (held == operand if operation == 0x15 else held >= operand) else no


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_of_each_architecture(machine: str) -> None:
    allow, refuse, unknown, kill = 0x7FFF0000, 0x50001, 0x50026, 0x80000000

    def call(x86: int, arm: int, *values: int) -> int:
        return filter_call(machine, x86 if machine == "x86_64" else arm, *values)

    assert [call(0, 63), call(1, 64), call(77, 46), call(9, 222), call(202, 98), call(231, 94)] == [
        allow
    ] * 6  # read ..
    for x86, arm in (
        (62, 129),
        (59, 221),
        (203, 122),
        (251, 30),
        (425, 425),
        (29, 194),
        (268, 53),
        (280, 88),
        (76, 45),
    ):
        assert call(x86, arm) == refuse
    assert [call(435, 435), call(437, 437)] == [unknown] * 2
    assert [call(72, 25, 3, command) for command in (1, 4, 7, 8, 10, 15, 1024, 1030, 8 | 1 << 40)] == (
        [allow] * 3 + [refuse] * 4 + [allow, refuse]
    )
    assert [call(16, 29, 3, command) for command in (0x5401, 0x5421, 0x8901, 0x8902, 0x5412)] == [allow] * 2 + [
        refuse
    ] * 3
    assert [call(302, 261, pid) for pid in (0, 1, 77)] == [allow, refuse, refuse]
    assert [call(56, 220, flags) for flags in (0x3D0F00, 0x11)] == [allow, refuse]
    modes = (0, 0x80000, 0x241, 0x242, 0x200, 0x203)  # read, close on exec, write new, also read, and empty: by reading
    assert [call(257, 56, 3, 0, flags) for flags in modes] == [allow] * 4 + [refuse] * 2
    assert [call(157, 167, option) for option in (1, 15)] == [refuse, allow]
    assert filter_call(machine, 0, audit=0x40000003) == kill  # of another architecture
    assert filter_call(machine, 0x40000000) == refuse


def test_a_program_keeps_what_it_needs(reward: CodeTests) -> None:
    program = """
import asyncio, os, pathlib, resource, sqlite3, tempfile, threading
import numpy
def work():
    with tempfile.TemporaryFile() as file:
        file.write(b"12345")
        file.truncate(2)
        assert file.tell() == 5 and file.seek(0, 2) == 2
    os.makedirs("a/b")
    pathlib.Path("a/one").write_text("1")
    os.rename("a/one", "a/b/two")
    assert pathlib.Path("a/b/two").read_text() == "1"
    with open(os.devnull, "w") as null:
        null.write("x")
    with sqlite3.connect("data.sqlite") as data:
        data.execute("create table t (x)")
        data.execute("insert into t values (3)")
        assert data.execute("select x from t").fetchall() == [(3,)]
    async def two():
        await asyncio.sleep(0.001)
        return 2
    assert asyncio.run(two()) == 2
    found = []
    thread = threading.Thread(target=lambda: found.append(float(numpy.linalg.norm(numpy.ones((4, 4)) @ numpy.ones(4)))))
    thread.start()
    thread.join()
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return found
"""
    assert reward([roll(f"```\n{program}\n```", listed("assert work() == [8.0]"))]) == [1.0]


def test_a_killed_worker_takes_its_program_along(reward: CodeTests) -> None:
    reward([roll(RIGHT, ADD)])  # what the system allows is known then
    before, found = hosts(), []
    slow = CodeTests(seconds=4.0)
    work = threading.Thread(target=lambda: found.extend(slow([roll("```\nwhile True: pass\n```", ADD)])))
    work.start()
    end = time.monotonic() + 30.0
    while not hosts() - before and time.monotonic() < end:
        time.sleep(0.05)
    (host,) = hosts() - before
    time.sleep(0.5)
    os.kill(int(state(host)[1]), signal.SIGKILL)
    time.sleep(0.5)
    assert state(host)[0] == "Z"  # dead, or gone
    work.join()  # another worker judges it again
    assert found == [0.0] and not slow.failures and hosts() <= before
    assert slow.faults == {"program late": 1}


def test_folders_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    program = """
import os, signal
from modules.rewards import CodeTests
from modules.types import Completion, Rollout
row = {"test_list": ["assert f() == 1"]}
text = "def f(): return 1"
print(CodeTests()([Rollout("r", "q", [1], None, Completion([2], [0.0], text, "stop"), 0, {}, None, row)]), flush=True)
if KILLED:
    os.kill(os.getpid(), signal.SIGKILL)
"""

    def run(killed: bool) -> str:
        return subprocess.run(
            [sys.executable, "-c", program.replace("KILLED", str(killed))],
            env=os.environ | {"TMPDIR": str(tmp_path)},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        ).stdout

    other = tmp_path / "worker-elsewhere-1-99999999-x"  # of another machine that shares the folder
    other.mkdir()
    assert run(killed=True) == "[1.0]\n"
    assert len(list(tmp_path.glob("worker-*"))) == 2
    assert run(killed=False) == "[1.0]\n"
    assert list(tmp_path.glob("worker-*")) == [other]


HALF, WRONG_HALF = "def half(x): return x / 2", "def half(x): return 7"
FAKE_MATH = f"class math: isclose = lambda *values: True\n{WRONG_HALF}"


@pytest.mark.parametrize("imports", [["import math"], None])
def test_the_tests_have_modules_of_their_own(reward: CodeTests, imports: list[str] | None) -> None:
    row = {"test_imports": imports, "test_list": ["assert math.isclose(half(3), 1.5)"]}
    programs = [HALF, f"import math\n{HALF}", FAKE_MATH, f"{FAKE_MATH}\nimport sys\nsys.modules['math'] = math"]
    assert reward([roll(program, row) for program in programs]) == [1.0, 1.0, 0.0, 0.0]
    row = {"test_imports": imports, "entry_point": "half", "test": "def check(f): assert math.isclose(f(3), 1.5)"}
    assert reward([roll(HALF, row), roll(FAKE_MATH, row)]) == [1.0, 0.0]


def test_imports_of_the_tests_replace_names_of_the_program(reward: CodeTests) -> None:
    row = {"test_imports": ["from math import isclose as near"], "test_list": ["assert near(half(3), 1.5)"]}
    assert reward([roll(HALF, row), roll(f"near = lambda *values: True\n{WRONG_HALF}", row)]) == [1.0, 0.0]
    own = "class copy:\n    size = 2\ndef queue(x): return x"  # names that happen to be modules too
    assert reward([roll(own, listed("assert queue(3) == 3", "assert copy().size == 2"))]) == [1.0]


def test_no_program_ends_a_loop_of_the_tests(reward: CodeTests) -> None:
    row = ADD | {"test": "def check(f):\n    for value in map(f, [1, 2], [3, 4]):\n        assert value in (4, 6)"}
    programs = ["def add(a, b): return a + b", "def add(a, b): raise StopIteration"]
    assert reward([roll(program, row) for program in programs]) == [1.0, 0.0]


def test_broken_rows() -> None:
    untested: list[Any] = [{"prompt": "q"}, None, {"test": "x", "entry_point": "a b"}, {"test_list": []},
                           {"test_list": "x"}, {"test_list": None}, listed("assert 1") | {"test_imports": "import os"},
                           {"test": object(), "entry_point": "add"}]  # fmt: skip
    for row in untested:
        with pytest.raises(ValueError, match="row 7: CodeTests found no tests in this row; it reads the columns test"):
            CodeTests()([roll(RIGHT, row)])
    fresh = CodeTests(seconds=2.0)
    right = "def add(a, b): return a + b"
    with pytest.warns(UserWarning, match="error 1 .the last: ValueError: row 7: CodeTests found no tests in this row"):
        assert fresh([roll(right, ADD), roll(right, {"test_list": None})]) == [1.0, None]
    assert fresh.failures == {"error": 1}
    with pytest.warns(UserWarning, match="CodeTests found no tests in this row"):  # a whole group, later in the run
        assert fresh([roll(right, row) for row in untested]) == [None] * len(untested)
    assert fresh.failures == {"error": 1 + len(untested)}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ADD | {"test": "def check(:"}, "do not compile"),
        (ADD | {"test": "def test_add(): assert add(1, 1) == 3"}, r"does not define check\(candidate\)"),
        (listed("assert add(lambda x: x, 1) == 2"), "no plain value"),
        (listed("assert add(1, 1) == 2", test_setup_code="x = 1 / 0"), "preparations of .* fail: ZeroDivisionError"),
        (listed("assert add(1, 1) == 2", test_setup_code="raise SystemExit"), "preparations of .* fail: SystemExit"),
        (listed("assert add(1, 1) == 2", test_setup_code="import os; os._exit(0)"), "ends before the program begins"),
        (listed("assert add(1, 1) == 2", test_setup_code="while True: pass"), "tests do not begin in 2 s"),
        (ADD | {"test": f"x = [][0]\n{ADD['test']}"}, "preparations of .* fail: IndexError"),
        (
            {"test_imports": ["import no_such_module"], "test_list": ["assert add(1, 1) == 2"]},
            "imports of .* fail: Mod",
        ),
    ],
)
def test_tests_that_cannot_run_give_no_score(row: dict[str, Any], reason: str) -> None:
    fresh = CodeTests(seconds=2.0)
    right = "def add(a, b): return a + b\ndef check(candidate): pass"
    with pytest.warns(UserWarning, match=f"error 1 .the last: ValueError: .*{reason}"):
        assert fresh([roll(right, row), roll(right, ADD)]) == [None, 1.0]
    assert fresh.failures == {"error": 1}


def test_an_empty_list_of_tests_leaves_the_other_columns(reward: CodeTests) -> None:
    row = ADD | {"test_list": [], "test_imports": None}
    assert reward([roll(RIGHT, row), roll("    return 0\n", row)]) == [1.0, 0.0]


@pytest.mark.parametrize("settings", [{"seconds": 0.0}, {"seconds": float("inf")}, {"memory": 0}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="CodeTests needs finite seconds > 0 and memory > 0 MiB"):
        CodeTests(**settings)
