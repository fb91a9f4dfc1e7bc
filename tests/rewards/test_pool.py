"""The pool of workers with a hostile check: each kind of harm costs the one completion, and nothing stays behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modules.rewards.verifier import Verifier
from modules.rewards.workers.pool import MEMORY, Pool, WorkerRefused, close_pool, get_pool
from modules.types import Completion, Rollout

ROOT = Path(__file__).parents[2]
CHECK = """
import ctypes, os, signal, sys, time

def judge(text, answer, info, scale=1.0):
    if text == "hang":
        sum(range(10**12))
    if text == "hang without alarm":
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        sum(range(10**12))
    if text == "exit":
        os._exit(0)
    if text == "crash":
        ctypes.string_at(0)
    if text == "memory":
        bytearray(2**40)
    if text == "many pieces":
        kept = [bytes(2**20) for _ in range(10**9)]
    if text == "fork bomb":
        for _ in range(6):
            os.fork()
        time.sleep(60)
    if text == "recursion":
        return judge("recursion", answer, info)
    if text == "bytes":
        os.write(1, b"\\xff\\xfe\\n1.0\\n")
        print("2.0", flush=True)
    if text == "raise":
        raise KeyError("gone")
    if text == "exit code":
        sys.exit(3)
    if text == "nan":
        return float("nan")
    if text == "late":
        time.sleep(2.0)
    if text == "log":
        with open(info["log"], "a") as file:
            print(os.getpid(), file=file)
    return scale * len(text)
"""
HARMS = {
    "hang": "timeout",
    "exit": "crash",
    "crash": "crash",
    "memory": "memory",
    "many pieces": "memory",
    "fork bomb": "timeout",
    "recursion": "error",
    "raise": "error",
    "exit code": "error",
    "nan": "error",
}


class Hostile(Verifier):
    """Judges by the check above."""

    reads = "text"

    def __init__(self, path: Path, timeout: float = 1.0) -> None:
        super().__init__("hostile", {"scale": 2.0}, timeout)
        self.path = self.check = str(path)

    def describe(self, rollout: Rollout) -> dict[str, str]:
        return {"log": self.path + ".log"}


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Hostile]:
    (tmp_path / "check.py").write_text(CHECK)
    yield Hostile(tmp_path / "check.py")
    close_pool()


def roll(texts: list[str]) -> list[Rollout]:
    return [Rollout("u", "q", [1], None, Completion([2], [0.0], text, "stop"), 0, {}, None) for text in texts]


def in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def processes(arguments: str) -> list[str]:
    """Return the live processes that have these arguments."""
    table = subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True, check=True).stdout
    return [line for line in table.splitlines() if arguments in line]


def zombies() -> list[str]:
    """Return the children of this process that have ended and were not waited for."""
    table = subprocess.run(["ps", "-A", "-o", "ppid=,stat=,pid="], capture_output=True, text=True, check=True).stdout
    return [line for line in table.splitlines() if line.split()[:2] == [str(os.getpid()), "Z"]]


@pytest.mark.filterwarnings("ignore:reward 'hostile'")
@pytest.mark.parametrize("run", [lambda work: work(), in_a_thread], ids=["main thread", "other thread"])
def test_each_harm_costs_its_own_sample_and_is_counted_by_cause(
    hostile: Hostile, run: Callable[[Callable[[], None]], None]
) -> None:
    texts = ["a" * (number % 9 + 1) for number in range(60)]
    for number, harm in enumerate(HARMS):
        texts[5 * number + 3] = harm
    right = [None if text in HARMS else 2.0 * len(text) for text in texts]
    results: list[list[float | None]] = []
    start = time.monotonic()
    run(lambda: results.append(hostile(roll(texts))))
    assert time.monotonic() - start < 20.0
    assert results == [right]
    assert hostile.failures == {"timeout": 2, "crash": 2, "memory": 2, "error": 4}
    run(lambda: results.append(hostile(roll(["bytes", "ok"]))))
    assert results[1] == [10.0, 4.0]
    close_pool()
    assert processes(f"check_worker.py {os.getpid()} ") == []  # of the fork bomb neither
    assert zombies() == []


def test_a_warning_tells_of_each_cause_once_until_its_count_doubles(hostile: Hostile) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(4):
            hostile(roll(["raise", "ok"]))
    assert [str(warning.message) for warning in told] == [
        "reward 'hostile' got no verdict on 1 of 2 completions, which have no score; so far by cause: error "
        f"{count} (the last: KeyError: 'gone')"
        for count in (1, 2, 4)
    ]


def test_the_timeout_counts_for_each_item_and_neighbours_are_judged_once(hostile: Hostile) -> None:
    start = time.monotonic()
    pool = Pool(1)
    items = [
        json.dumps([text, None, {"log": hostile.path + ".log", "n": n}])
        for n, text in enumerate(["late", "late", "log", "exit", "log"])
    ]
    verdicts = pool.judge(hostile.path, hostile.settings, items, 3.0)
    pool.close()
    assert time.monotonic() - start > 4.0
    assert [(verdict.score, verdict.cause) for verdict in verdicts] == [
        (8.0, None),
        (8.0, None),
        (6.0, None),
        (None, "crash"),
        (6.0, None),
    ]
    assert len(Path(hostile.path + ".log").read_text().split()) == 2


def test_a_worker_killed_from_outside_costs_nothing(hostile: Hostile) -> None:
    assert hostile(roll(["log"])) == [6.0]
    os.kill(int(Path(hostile.path + ".log").read_text()), signal.SIGKILL)
    assert hostile(roll(["ok", "log"])) == [4.0, 6.0]
    threading.Timer(
        1.0, lambda: os.kill(int(Path(hostile.path + ".log").read_text().split()[-1]), signal.SIGKILL)
    ).start()
    hostile.timeout = 5.0
    assert hostile(roll(["late", "ok"])) == [8.0, 4.0]  # in the middle of an item: it is asked again
    assert not hostile.failures


def test_many_large_items_and_many_threads(hostile: Hostile) -> None:
    results: dict[int, list[float | None]] = {}

    def work(number: int) -> None:
        results[number] = hostile(roll(["x" * (100_000 + number), *(f"{number} {i}" for i in range(200)), "\ud800"]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {
        number: [2.0 * (100_000 + number), *(2.0 * len(f"{number} {i}") for i in range(200)), 2.0]
        for number in range(5)
    }


def test_a_check_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_library")
    with pytest.raises(WorkerRefused, match="broken.py' cannot be loaded in a worker: .*No module named 'no_such_lib"):
        Hostile(tmp_path / "broken.py")(roll(["a"]))
    (tmp_path / "exits.py").write_text("import os; os._exit(7)")
    with pytest.raises(WorkerRefused, match=r"no worker starts for check .*\(exit code 7\); run it by hand"):
        Hostile(tmp_path / "exits.py")(roll(["a"]))
    (tmp_path / "check.py").write_text(CHECK)
    assert Hostile(tmp_path / "check.py")(roll(["a"])) == [2.0]  # the worker is not lost


def test_a_forked_process_gets_workers_of_its_own(hostile: Hostile) -> None:
    assert hostile(roll(["log"])) == [6.0]
    pool = get_pool()
    child = os.fork()
    if child == 0:
        try:
            fine = get_pool() is not pool and hostile(roll(["log", "ok"])) == [6.0, 4.0]
            close_pool()
        finally:
            os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert hostile(roll(["ok", "log"])) == [4.0, 6.0]
    first, other, again = Path(hostile.path + ".log").read_text().split()
    assert first == again != other


PROGRAM = """
import json, sys, threading
sys.path.insert(0, sys.argv[1])
from pool import Pool
pool = Pool(2)
def judge(texts):
    return pool.judge(sys.argv[2], {}, [json.dumps([text, None, {}]) for text in texts], 3.0)
threading.Thread(target=judge, args=[list(map(str, range(16)))]).start()
print(judge(["ok"])[0].score, flush=True)
judge(["hang without alarm"])
"""


def test_a_killed_program_leaves_no_worker(tmp_path: Path) -> None:
    (tmp_path / "check.py").write_text(CHECK)
    workers = ROOT / "modules" / "rewards" / "workers"
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(workers), str(tmp_path / "check.py")], stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None and program.stdout.readline() == "2.0\n"
    time.sleep(0.5)
    left = f"check_worker.py {program.pid} {MEMORY}"
    assert len(processes(left)) == 2  # one hangs, one waits for a request
    program.kill()
    program.communicate()
    end = time.monotonic() + 10.0
    while processes(left) and time.monotonic() < end:
        time.sleep(0.1)
    assert processes(left) == []
