"""LineWorker with a small real program: answers, crashes, lateness, programs that never start."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.rewards.workers.line_worker import LineWorker

PROGRAM = """
import json, os, sys, time
from pathlib import Path
with Path(__file__).with_name("starts").open("a") as starts:
    print(sys.argv[1], file=starts)
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "exit":
        os._exit(1)
    if request["do"] == "half a line":
        sys.stdout.write("1")
        sys.stdout.flush()
        os._exit(1)
    if request["do"] == "sleep":
        time.sleep(60)
    print(json.dumps({"length": len(request["text"])}), flush=True)
    if request["do"] == "go deaf":
        time.sleep(60)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[LineWorker]:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    made = LineWorker(script, timeout=3.0)
    yield made
    made.close()


def starts(worker: LineWorker) -> int:
    return len(worker.script.with_name("starts").read_text().split())


def test_answers_come_from_one_program(worker: LineWorker) -> None:
    for length in (0, 1, 1_000_000):
        assert worker.ask({"do": "measure", "text": "\u00e9" * length}) == {"length": length}
    assert (starts(worker), worker.failures) == (1, 0)
    assert worker.script.with_name("starts").read_text() == "3.0\n"  # its argument


@pytest.mark.parametrize("crash", ["exit", "half a line"])
def test_a_crash_is_tried_once_more_then_counted(worker: LineWorker, crash: str) -> None:
    assert worker.ask({"do": crash, "text": ""}) is None
    assert (starts(worker), worker.failures) == (2, 1)
    assert worker.ask({"do": "measure", "text": "abc"}) == {"length": 3}
    assert (starts(worker), worker.failures) == (3, 1)


def test_lateness_is_not_tried_again(worker: LineWorker) -> None:
    assert worker.ask({"do": "measure", "text": ""}) == {"length": 0}
    start = time.monotonic()
    assert worker.ask({"do": "sleep", "text": ""}) is None
    assert 3.0 <= time.monotonic() - start < 20.0
    assert (starts(worker), worker.failures) == (1, 1)


def test_a_program_that_stops_reading_cannot_block_the_writer(worker: LineWorker) -> None:
    assert worker.ask({"do": "go deaf", "text": ""}) == {"length": 0}
    assert worker.ask({"do": "measure", "text": "a" * 10**6}) is None  # more than a pipe holds
    assert worker.ask({"do": "measure", "text": "a" * 10**6}) == {"length": 10**6}
    assert worker.failures == 1


def test_a_program_that_does_not_start(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit(3)")
    worker = LineWorker(script, timeout=3.0)
    with pytest.raises(RuntimeError, match="did not start; run it by hand to see why: .*broken.py 3.0"):
        worker.ask({})
    assert worker.failures == 0
