"""A pool of child processes that judge completions; one that hangs, crashes or eats the memory costs that one."""

import atexit
import glob
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "check_worker.py"
START_SECONDS = 120.0  # for a worker to load a check: enough for a cold import on a busy machine
MEMORY = 2 * 2**30  # bytes of address space per worker
ITEMS_PER_WORKER = 16  # fewer are not worth another worker
CHUNK_ITEMS, CHUNK_BYTES = 64, 2**18  # of a request


@dataclass(frozen=True)
class Verdict:
    """What became of one completion."""

    score: float | None
    # Why there is no score: timeout, crash, memory or error. With a score: the completion's fault. None = neither.
    cause: str | None = None
    detail: str = ""


# A child may end with the thread that started it, so one that lasts as long as the process starts them all.
_STARTER = [ThreadPoolExecutor(1)]


class WorkerRefused(RuntimeError):
    """A check cannot be loaded, or no worker starts."""


@dataclass
class Worker:
    """A child process, which is started when it is needed and again after it is lost.

    A request is with it from ``send`` until ``items`` is empty.
    """

    child: "subprocess.Popen[bytes] | None" = None
    folder: str = ""  # for its temporary files
    used: bool = False  # whether the child has answered a request
    ready: bool = False  # whether it has loaded the check of the request
    deadline: float = 0.0
    items: deque[int] = field(default_factory=deque)  # numbers of the items without an answer, in order
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    received: bytes = b""

    def send(self, request: bytes, items: Sequence[int]) -> None:
        """Start to send a request."""
        if self.child is None:
            # -P keeps the script's folder off the import path, so that no file in it hides a library. In a session of
            # its own the child misses signals to the whole run, which may still need it.
            self.folder = tempfile.mkdtemp(prefix=f"{name_owner()}{os.getpid()}-")
            self.child = (
                _STARTER[0]
                .submit(
                    subprocess.Popen,
                    [sys.executable, "-P", str(SCRIPT), str(os.getpid()), str(MEMORY)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    bufsize=0,
                    start_new_session=True,
                    env=os.environ
                    | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1", "TMPDIR": self.folder},
                )
                .result()
            )
            os.set_blocking(self.input, False)
            os.set_blocking(self.output, False)
            self.used = False
        self.ready, self.deadline = False, time.monotonic() + START_SECONDS
        self.items, self.unsent, self.received = deque(items), memoryview(request), b""

    @property
    def input(self) -> int:
        """The pipe that requests go into."""
        assert self.child is not None and self.child.stdin is not None
        return self.child.stdin.fileno()

    @property
    def output(self) -> int:
        """The pipe that answers come from."""
        assert self.child is not None and self.child.stdout is not None
        return self.child.stdout.fileno()

    def write(self) -> None:
        """Send what the pipe takes."""
        try:
            self.unsent = self.unsent[os.write(self.input, self.unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # reading tells that the child is gone
            self.unsent = memoryview(b"")

    def read(self) -> list[Any] | None:
        """Return the answers that have come; None = the child is gone."""
        try:
            data = os.read(self.output, 2**16)
        except BlockingIOError:
            return []
        if not data:
            return None
        *lines, self.received = (self.received + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def stop(self) -> str:
        """Kill the child with all that it started in its session; return how it ended."""
        if self.child is None:
            return ""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child.pid, signal.SIGKILL)
        with self.child as child:  # closes the pipes
            child.kill()
        self.child = None
        shutil.rmtree(self.folder, ignore_errors=True)
        self.items.clear()
        self.unsent = memoryview(b"")
        code = child.returncode
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def forget(self) -> None:
        """Let go of a child that belongs to the process from which this one was forked."""
        if self.child is not None:
            self.child.returncode = 0  # nothing to wait for
            with self.child:  # closes the pipes
                self.child = None


class Pool:
    """Workers that all verifiers of a process share, one for each core that it may use; any thread may ask.

    Args:
        size: number of workers; they start when they are needed.
    """

    def __init__(self, size: int) -> None:
        self._workers = [Worker() for _ in range(size)]
        self._swept = False
        self._free = list(self._workers)
        self._changed = threading.Condition()

    def judge(self, check: str, settings: dict[str, Any], items: Sequence[str], timeout: float) -> list[Verdict]:
        """Judge completions.

        A completion whose worker is late is lost. So is one that takes all memory or crashes its worker twice; the
        first time the worker may have been to blame. The others of the request are sent again.

        Args:
            check: a name in ``modules.rewards.checks``, or the path of a file.
            settings: what ``judge`` gets by name; JSON must have it.
            items: [text, answer, info] of each completion, as JSON.
            timeout: seconds per completion.

        Raises:
            WorkerRefused: the check cannot be loaded, or no worker starts.
        """
        if not self._swept:
            self._swept = True
            remove_old_folders()
        workers = self._borrow(1 + len(items) // ITEMS_PER_WORKER)
        try:
            return _Call(check, settings, items, timeout, workers).run()
        finally:
            for worker in workers:
                if worker.items:  # after an interrupt: the next call must not read this call's answers
                    worker.stop()
            with self._changed:
                self._free += reversed(workers)
                self._changed.notify()

    def close(self) -> None:
        """End the workers that nobody uses; a later call starts others."""
        with self._changed:
            for worker in self._free:
                worker.stop()

    def forget(self) -> None:
        """Let go of the workers, in a process that was forked from theirs."""
        for worker in self._workers:
            worker.forget()

    def _borrow(self, wanted: int) -> list[Worker]:
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            taken = [self._free.pop() for _ in range(min(wanted, len(self._free)))]
            if self._free:
                self._changed.notify()
            return taken


class _Call:
    """One call of ``Pool.judge``: hands items to workers and watches them, all from the thread that asks."""

    def __init__(
        self, check: str, settings: dict[str, Any], items: Sequence[str], timeout: float, workers: list[Worker]
    ) -> None:
        self.head = json.dumps({"check": check, "settings": settings, "timeout": timeout})[:-1] + ', "items": ['
        self.check, self.items, self.timeout, self.workers = check, items, timeout, workers
        self.verdicts: list[Verdict | None] = [None] * len(items)
        self.waiting = deque(range(len(items)))
        self.losses: Counter[int] = Counter()  # how often an item has taken a worker with it
        self.chunk = max(1, min(CHUNK_ITEMS, len(items) // (4 * len(workers))))

    def run(self) -> list[Verdict]:
        """Return the verdicts, in order."""
        while True:
            for worker in self.workers:
                if self.waiting and not worker.items:
                    self._send(worker)
            busy = {worker.output: worker for worker in self.workers if worker.items}
            if not busy:
                return [verdict for verdict in self.verdicts if verdict is not None]
            woken = self._wait(busy)
            now = time.monotonic()
            for output, worker in busy.items():
                if worker.unsent:
                    worker.write()
                if output not in woken and now < worker.deadline:
                    continue
                answers = worker.read()
                if answers is None:
                    self._lose(worker, "crash")
                elif answers:
                    self._take(worker, answers)
                elif now >= worker.deadline:
                    self._lose(worker, "timeout")

    def _send(self, worker: Worker) -> None:
        numbers, size = [self.waiting.popleft()], 0
        while self.waiting and len(numbers) < self.chunk and size < CHUNK_BYTES:
            size += len(self.items[numbers[-1]])
            numbers.append(self.waiting.popleft())
        request = self.head + ",".join(self.items[number] for number in numbers) + "]}\n"
        worker.send(request.encode(), numbers)
        worker.write()

    @staticmethod
    def _wait(busy: dict[int, Worker]) -> set[int]:
        """Wait until a worker can be read or written, or is late; return the pipes on which something happened."""
        poll = select.poll()
        for output, worker in busy.items():
            poll.register(output, select.POLLIN)
            if worker.unsent:
                poll.register(worker.input, select.POLLOUT)
        seconds = min(worker.deadline for worker in busy.values()) - time.monotonic()
        return {pipe for pipe, _ in poll.poll(max(0, int(seconds * 1000) + 1))}

    def _take(self, worker: Worker, answers: list[Any]) -> None:
        for answer in answers:
            if isinstance(answer, dict) and "refused" in answer:
                raise WorkerRefused(f"check '{self.check}' cannot be loaded in a worker: {answer['refused']}")
            if not worker.ready:
                worker.ready = worker.used = True
            elif isinstance(answer, dict) and answer["score"] is None and answer["cause"] == "memory":
                self._lose(worker, "memory")
                return
            else:
                verdict = Verdict(**answer) if isinstance(answer, dict) else Verdict(answer)
                self.verdicts[worker.items.popleft()] = verdict
        worker.deadline = time.monotonic() + self.timeout

    def _lose(self, worker: Worker, cause: str) -> None:
        """Give up a worker: the item that it was at has one more try, or none if it was late; the others are kept."""
        first, *others = worker.items
        ready, used = worker.ready, worker.used
        end = worker.stop()
        self.waiting.extendleft(reversed(others))
        if not ready:  # it had not come to an item
            if not used:
                self.waiting.clear()
                raise WorkerRefused(
                    f"no worker starts for check '{self.check}' ({end}); run it by hand to see why: {sys.executable} "
                    f"-P {SCRIPT} {os.getpid()} {MEMORY}"
                )
            self.waiting.appendleft(first)
            return
        self.losses[first] += 1
        if cause != "timeout" and self.losses[first] < 2:
            self.waiting.appendleft(first)
        else:
            detail = end if cause == "crash" else ""
            self.verdicts[first] = Verdict(None, "timeout" if detail == "SIGALRM" else cause, detail)


def start_child(command: Sequence[str], **settings: Any) -> "subprocess.Popen[bytes]":
    """Start a process that does not end with the thread that asks for it; see ``subprocess.Popen`` for the settings."""
    return _STARTER[0].submit(lambda: subprocess.Popen(list(command), **settings)).result()


def name_owner() -> str:
    """Return how names of workers' folders start; a process's number follows.

    A number means a process only on one machine and in one container, so these are in it.
    """
    numbers = Path("/proc/self/ns/pid")
    return f"worker-{os.uname().nodename}-{numbers.stat().st_ino if numbers.exists() else 0}-"


def remove_old_folders() -> None:
    """Remove the workers' folders that killed processes of this machine have left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{glob.escape(name_owner())}*"):
        number = folder.name.removeprefix(name_owner()).partition("-")[0]
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            continue


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_POOLS = [Pool(count_cores())]


def get_pool() -> Pool:
    """Return the pool of this process."""
    return _POOLS[0]


def close_pool() -> None:
    """End the workers of this process that nobody uses; a later call starts others."""
    get_pool().close()


def _renew() -> None:
    """Give a forked process a pool of its own."""
    _STARTER[0] = ThreadPoolExecutor(1)
    _POOLS[0].forget()
    _POOLS[0] = Pool(count_cores())


atexit.register(close_pool)
os.register_at_fork(after_in_child=_renew)
