"""Worker processes that answer as a test asks, and what becomes of their tasks."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modules.rollout.workers import crew as crew_module
from modules.rollout.workers.crew import Assignment, Crew

# Does what the name of a request says. ``once`` does so in the first process that comes to it, and echoes in others.
SERVANT = """
import json, os, pickle, sys, time
number = sys.argv[3]
def answer(**fields):
    os.write(1, json.dumps(fields).encode() + b"\\n")
while line := sys.stdin.buffer.readline():
    name, size = line.decode().split()
    given = pickle.loads(sys.stdin.buffer.read(int(size)))
    fault = given.get("fault")
    if fault and given.get("once"):
        fault = None if os.path.exists(given["once"]) else fault
        open(given["once"], "a").close()
    if fault == "exit":
        os._exit(3)
    if fault == "kill":
        os.kill(os.getpid(), 9)
    if fault == "hang":
        time.sleep(100)
    if fault == "bytes":
        os.write(1, b"\\x80\\x04no json\\n")
    if fault == "list":
        os.write(1, b"[1]\\n")
    if fault == "half":
        os.write(1, b'{"done": "ech')
        time.sleep(100)
    if fault == "slow":
        for count in range(12):
            time.sleep(0.25)
            answer(alive=count)
    if fault in ("refused", "failed"):
        answer(**{"done": name, fault: "because"})
    elif fault == "other":
        answer(done="other")
    elif name != "silent":
        answer(done=name, value=given.get("value"), pid=os.getpid(), variables=dict(os.environ), number=number)
"""
FAULTS = ["exit", "kill", "bytes", "list", "other", "failed"]


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Crew]:
    (tmp_path / "servant.py").write_text(SERVANT)
    found = Crew(2, 2.0, [sys.executable, "-S", str(tmp_path / "servant.py")])
    found.start(0, [])
    found.run({0: echo([], 0), 1: echo([], 0)})  # from now on they are given the timeout, and no more for their start
    yield found
    found.stop()


def echo(found: list[Any], value: Any, **given: Any) -> Assignment:
    return Assignment("echo", {"value": value, **given}, lambda answer: found.append(answer["value"]), "echoed")


@pytest.mark.parametrize("fault", [*FAULTS, "hang", "half"])
def test_the_task_of_a_lost_worker_is_done_again_and_once(crew: Crew, tmp_path: Path, fault: str) -> None:
    found: list[int] = []
    before = list(crew.processes)
    once = {"fault": fault, "once": str(tmp_path / "mark")}
    with pytest.warns(UserWarning, match="a worker was lost while it echoed: .*; a new one does so again"):
        times = crew.run({0: echo(found, 10, **once), 1: echo(found, 11)})
    assert sorted(found) == [10, 11] and len(times) == 2 and crew.replaced == 1
    assert [new is old for new, old in zip(crew.processes, before, strict=True)] == [False, True]
    crew.run({0: echo(found, 20)})
    assert found[-1] == 20 and crew.replaced == 1


def test_an_answer_that_its_task_cannot_read_costs_the_worker(crew: Crew) -> None:
    seen: list[int] = []

    def take(answer: dict[str, Any]) -> None:
        seen.append(answer["pid"])
        if len(seen) == 1:
            raise ValueError("a completion has 3 tokens")

    crew.run({0: Assignment("echo", {}, take, "echoed")})
    assert len(set(seen)) == 2 and crew.replaced == 1


def test_a_new_worker_begins_with_the_prelude(crew: Crew, tmp_path: Path) -> None:
    found: list[str] = []
    crew.prelude = [echo(found, "build", fault="kill", once=str(tmp_path / "other")), echo(found, "sync")]
    crew.run({0: echo(found, "work", fault="kill", once=str(tmp_path / "mark"))})
    assert found == ["build", "sync", "work"]


@pytest.mark.parametrize(("fault", "reason"), [("kill", "ended by SIGKILL"), ("failed", "because"), ("exit", "code 3")])
def test_a_task_that_costs_every_worker_ends_the_run(crew: Crew, fault: str, reason: str) -> None:
    with pytest.raises(RuntimeError, match=f"3 workers in a row were lost while the last of them echoed: .*{reason}"):
        crew.run({0: echo([], 1, fault=fault), 1: echo([], 2)})
    found: list[int] = []
    crew.run({0: echo(found, 3), 1: echo(found, 4)})  # nothing of the failed call is left
    assert sorted(found) == [3, 4]


def test_work_that_goes_on_is_no_hang(crew: Crew) -> None:
    found: list[int] = []
    crew.run({0: echo(found, 1, fault="slow")})  # 3 s, the timeout is 2 s
    assert found == [1] and crew.replaced == 0


def test_a_refusal_is_the_users_error(crew: Crew) -> None:
    with pytest.raises(ValueError, match="^because$"):
        crew.run({0: echo([], 1, fault="refused"), 1: echo([], 2, fault="hang")})
    found: list[int] = []
    crew.run({1: echo(found, 3)})
    assert found == [3] and crew.replaced == 0


def test_killed_by_another_thread(crew: Crew) -> None:
    timer = threading.Timer(0.5, crew.kill)
    timer.start()
    with pytest.raises(RuntimeError, match="closed while its workers were busy"):
        crew.run({0: echo([], 1, fault="half"), 1: echo([], 1, fault="half")})
    timer.join()


def test_a_worker_that_ended_between_two_calls_is_replaced(crew: Crew) -> None:
    found: list[int] = []
    crew.run({0: echo(found, 1)})
    process = crew.processes[0]
    assert process is not None
    os.kill(process.child.pid, signal.SIGKILL)
    crew.tell("silent")
    crew.run({0: echo(found, 2)})
    assert found == [1, 2] and crew.replaced == 1


def test_large_requests_and_answers_come_whole(crew: Crew) -> None:
    found: list[str] = []
    values = ["a" * 3_000_000, "b" * 3_000_001]
    crew.run({0: echo(found, values[0]), 1: echo(found, values[1])})
    assert sorted(found) == values


def test_workers_are_no_ranks_and_share_the_cores(tmp_path: Path, crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(crew_module, "count_cores", lambda: 8)
    assert crew.threads == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert crew.threads == 2
    crew.start(0, [])
    seen: list[dict[str, str]] = []
    crew.run({0: Assignment("echo", {}, lambda answer: seen.append(answer["variables"]), "echoed")})
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(seen[0])
    assert seen[0]["OMP_NUM_THREADS"] == "2" and seen[0]["OMP_WAIT_POLICY"] == "PASSIVE"


def test_stopped_workers_are_gone(crew: Crew) -> None:
    pids = [process.child.pid for process in crew.processes if process is not None]
    crew.stop()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert crew.processes == [None, None]
