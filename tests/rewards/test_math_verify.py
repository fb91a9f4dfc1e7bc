"""MathVerify: a table of right verdicts, and a child process that hangs, dies, is shared, forked or pickled."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
from programs import Program, server

from modules.rewards import MathVerify
from modules.rewards.workers.pool import close_pool, count_cores
from modules.types import Completion, Rollout

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "modules" / "rewards" / "workers" / "check_worker.py"
HANGS = (
    r"so $10^{10^{10}}$"  # computed in C with the interpreter locked: neither a thread nor a signal handler gets to run
)
SLOW = r"so $(10^8)!$"


def make_rollout(text: str, answer: str | None) -> Rollout:
    return Rollout("uid", "question", [1], answer, Completion([2], [0.0], text, "stop"), 0, {}, None)


RIGHT, WRONG, STUCK = make_rollout("72", "72"), make_rollout("71", "72"), make_rollout(HANGS, "72")


def worker_pids(parent: int) -> set[int]:
    """Return the live workers that a process started. A zombie has lost its arguments and does not count."""
    table = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(maxsplit=2) for line in table.splitlines()]
    return {int(row[0]) for row in rows if int(row[1]) == parent and WORKER.name in row[2]}


def wait_until_gone(pid: int, seconds: float) -> bool:
    """Return whether, after at most so many seconds, no worker with this process id is left."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = subprocess.run(
            ["ps", "-ww", "-p", str(pid), "-o", "args="], capture_output=True, text=True, check=False
        ).stdout
        if WORKER.name not in state:
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def reward() -> Iterator[MathVerify]:
    close_pool()
    yield MathVerify(timeout=20.0)
    close_pool()


@pytest.fixture(scope="module")
def shared() -> MathVerify:
    return MathVerify(timeout=20.0)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("1/2", "0.5", 1.0),
        ("0.5", "1/2", 1.0),
        (r"$\frac12$", "1/2", 1.0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        ("1/2", r"\frac12", 1.0),
        ("12", "1/2", 0.0),
        ("1/2", "12", 0.0),
        ("-3", "-3", 1.0),
        ("3", "-3", 0.0),
        ("1,234", "1234", 1.0),
        (r"$1{,}234$", "1,234", 1.0),
        ("The answer is 72.0.", "72", 1.0),
        (r"\boxed{72} and that is all, as on page 9", "72", 1.0),
        ("first 70, then 72", "#### 72", 1.0),
        (r"$(x+1)^2$", "x^2+2x+1", 1.0),
        (r"$(x+1)^2$", "x^2+1", 0.0),
        (r"$2\sqrt{3}$", r"2\sqrt{3}", 1.0),
        ("2", r"2\sqrt{3}", 0.0),
        (r"$\boxed{72}$", r"\boxed{72}", 1.0),
        ("$72$", "$72$", 1.0),
        ("nothing to see", "72", 0.0),
        (r"$\frac{1}{$", "72", 0.0),
        ("", "72", 0.0),
        ("72", r"\frac{1}{", None),
        ("72", "???", None),
        ("72", "", None),
        ("72", None, None),
        ("<think>\\boxed{72}</think> I do not know", "72", 0.0),
        ("<think>\\boxed{70}</think> 72", "72", 1.0),
        ("line\nbreaks \u2028 and \ud800 lone surrogates: 72", "72", 1.0),
    ],
)
def test_accuracy_table(shared: MathVerify, text: str, answer: str | None, expected: float | None) -> None:
    assert shared([make_rollout(text, answer)]) == [expected]
    assert not shared.failures


def test_no_process_before_the_first_gold_answer(reward: MathVerify) -> None:
    before = worker_pids(os.getpid())
    assert reward([make_rollout("72", None)]) == [None]
    assert worker_pids(os.getpid()) == before


@pytest.mark.filterwarnings("ignore:reward .math_verify. got no verdict")
@pytest.mark.parametrize("text", [HANGS, SLOW])
def test_a_hang_is_killed_from_a_thread_and_the_next_sample_scores(text: str) -> None:
    verifier = MathVerify(timeout=1.0)
    results: list[tuple[list[float | None], float]] = []

    def work() -> None:
        verifier([RIGHT])  # starts the child
        start = time.monotonic()
        scores = verifier([make_rollout(text, "72")])
        results.append((scores, time.monotonic() - start))
        results.append((verifier([RIGHT, WRONG]), 0.0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60.0)
    assert [scores for scores, _ in results] == [[None], [1.0, 0.0]]
    assert 1.0 <= results[0][1] < 6.0
    assert verifier.failures == {"timeout": 1}


def test_threads_share_the_children_and_get_their_own_verdicts(reward: MathVerify) -> None:
    before = worker_pids(os.getpid())
    results: dict[int, list[float | None]] = {}

    def work(number: int) -> None:
        results[number] = reward([make_rollout(str(value), str(number)) for value in range(6)] * 3)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [float(value == number) for value in range(6)] * 3 for number in range(6)}
    assert len(worker_pids(os.getpid()) - before) <= count_cores()


def test_equal_questions_are_asked_once_and_many_go_to_several_children() -> None:
    close_pool()
    verifier, before = MathVerify(timeout=1.0), worker_pids(os.getpid())
    sums = [make_rollout(str(value), str(value + value % 3)) for value in range(40)]
    right = [float(value % 3 == 0) for value in range(40)]
    assert verifier(sums + sums) == right + right
    assert len(worker_pids(os.getpid()) - before) == min(3, count_cores())
    start = time.monotonic()
    with pytest.warns(UserWarning, match="no verdict on 3 of 3 completions, .* by cause: timeout 3"):
        assert verifier([make_rollout(HANGS, "72")] * 3) == [None] * 3
    assert time.monotonic() - start < 2.0
    assert verifier.failures == {"timeout": 3}


def test_a_child_killed_between_calls_is_replaced(reward: MathVerify) -> None:
    before = worker_pids(os.getpid())
    assert reward([RIGHT]) == [1.0]
    (first,) = worker_pids(os.getpid()) - before
    os.kill(first, signal.SIGKILL)
    assert reward([RIGHT, WRONG]) == [1.0, 0.0]
    (second,) = worker_pids(os.getpid()) - before
    assert second != first
    assert not reward.failures


def test_an_interrupted_request_leaves_no_reply_behind(reward: MathVerify) -> None:
    assert reward([RIGHT]) == [1.0]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore Ctrl-C
    try:
        threading.Timer(0.5, os.kill, args=(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            reward([STUCK])
    finally:
        signal.signal(signal.SIGINT, before)
    assert reward([WRONG, RIGHT]) == [0.0, 1.0]


def score_in_child(verifier: MathVerify, results: "multiprocessing.Queue[object]") -> None:
    scores = verifier([RIGHT, WRONG])
    results.put((scores, len(worker_pids(os.getpid()))))
    close_pool()


@pytest.mark.parametrize(
    "make_context", [lambda: multiprocessing.get_context("fork"), server], ids=["fork", "forkserver"]
)
def test_inside_a_multiprocessing_child(reward: MathVerify, make_context: Callable[[], BaseContext]) -> None:
    context = make_context()
    before = worker_pids(os.getpid())
    assert reward([RIGHT]) == [1.0]
    mine = worker_pids(os.getpid()) - before
    results = context.Queue()
    child = context.Process(target=score_in_child, args=(reward, results), daemon=True)
    child.start()
    scores, workers = results.get(timeout=120.0)
    child.join(timeout=60.0)
    assert (child.exitcode, scores, workers) == (0, [1.0, 0.0], 1)
    assert worker_pids(os.getpid()) - before == mine
    assert reward([WRONG, RIGHT]) == [0.0, 1.0]
    assert not reward.failures


def test_a_pickled_copy_keeps_the_settings(reward: MathVerify) -> None:
    assert reward([RIGHT]) == [1.0]
    copy = pickle.loads(pickle.dumps(reward))
    assert (copy.name, copy.timeout, copy.failures) == ("math_verify", 20.0, {})
    assert copy([RIGHT, WRONG]) == [1.0, 0.0]
    assert reward([WRONG]) == [0.0]


def test_close_leaves_no_child_and_a_later_call_starts_one() -> None:
    close_pool()
    before = worker_pids(os.getpid())
    verifier = MathVerify()
    assert verifier([RIGHT]) == [1.0]
    assert len(worker_pids(os.getpid()) - before) == 1
    close_pool()
    close_pool()
    assert worker_pids(os.getpid()) == before
    assert verifier([RIGHT]) == [1.0]


PROGRAM = """
import sys, time
from pathlib import Path
from modules.rewards import MathVerify
from modules.types import Completion, Rollout
verifier = MathVerify(timeout=4.0)
score = lambda text: verifier([Rollout("uid", "question", [1], "72", Completion([2], [0.0], text, "stop"), 0, {}, None)])
print(score("72"), flush=True)
while not Path("go").exists():
    time.sleep(0.05)
score(sys.argv[1])
"""


def test_the_end_of_the_program_ends_the_child(tmp_path: Path) -> None:
    command, environment = [sys.executable, "-c", PROGRAM, "72"], os.environ | {"PYTHONPATH": str(ROOT)}
    program = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    assert program.stdout.readline() == "[1.0]\n"
    (worker,) = worker_pids(program.pid)
    (tmp_path / "go").touch()
    program.communicate(timeout=60.0)
    assert program.returncode == 0
    assert wait_until_gone(worker, 2.0)


def test_a_hung_child_does_not_outlive_a_killed_program(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with Program("program.py", HANGS, folder=tmp_path) as program:
        end = time.monotonic() + 60.0
        while program.said() != ("[1.0]\n", "") and time.monotonic() < end:
            time.sleep(0.05)
        (worker,) = worker_pids(program.process.pid)
        (tmp_path / "go").touch()
        assert not wait_until_gone(worker, 1.5)  # it hangs
        program.process.kill()
        program.process.join()
        assert wait_until_gone(worker, 15.0)


def test_the_worker_imports_nothing_of_the_trainer() -> None:
    item = ["72", "72", {}]
    request = json.dumps({"check": "mathematics", "settings": {}, "timeout": 9.0, "items": [item, item]}) + "\n"
    command = [sys.executable, "-P", "-X", "importtime", str(WORKER), str(os.getpid()), str(2**31)]
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == '"ready"\n1.0\n1.0\n'
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "sympy" in imported
    assert not imported & {"torch", "lightning", "transformers", "modules"}


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_timeout_is_checked_at_construction(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout must be a finite number"):
        MathVerify(timeout=timeout)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-align\[math\]'"):
        MathVerify()
