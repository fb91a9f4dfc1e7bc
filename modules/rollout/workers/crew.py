"""A crew of worker processes that do tasks; one that ends, hangs or answers nonsense is replaced."""

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from modules.rewards.workers.pool import count_cores, start_child
from modules.trainer.ranks import leave_ranks
from modules.types import EngineError

START_SECONDS = 300.0  # for a worker to import its libraries: enough for a cold disk and a busy machine
TRIES = 3  # how many workers one task may lose
CHUNK = 2**20  # bytes that are read at once


class LostWorker(Exception):
    """Tells why a worker is of no use any more."""


@dataclass(frozen=True, eq=False)
class Assignment:
    """What a worker is to do."""

    name: str  # a method of ``Servant``
    arguments: Mapping[str, Any]
    take: Callable[[dict[str, Any]], None]  # reads the answer; an error other than RuntimeError = it is nonsense
    what: str  # in words, behind "while it"


class SamplingProcess:
    """A worker process and the tasks that it has been given, oldest first.

    Args:
        command: what to run.
        threads: that it may use.
        memory: file descriptor of the weights.
    """

    def __init__(self, command: Sequence[str], threads: int, memory: int) -> None:
        self.tasks: deque[Assignment] = deque()
        self.deadline = time.monotonic() + START_SECONDS
        self.is_ready = False  # whether it has answered
        self._unsent, self._received = memoryview(b""), bytearray()
        count = str(threads)
        own = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUTF8": "1"}
        own |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        # In a session of its own it misses Ctrl-C, upon which the trainer may still want its answers.
        self.child = start_child(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=(memory,),
            start_new_session=True,
            env=leave_ranks() | own,
        )
        assert self.child.stdin is not None and self.child.stdout is not None
        self.input, self.output = self.child.stdin.fileno(), self.child.stdout.fileno()
        os.set_blocking(self.input, False)
        os.set_blocking(self.output, False)

    @property
    def is_sending(self) -> bool:
        """Whether the pipe has not taken all yet."""
        return bool(self._unsent)

    def send(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Send a request; ``write`` sends what the pipe does not take at once."""
        data = pickle.dumps(dict(arguments))
        self._unsent = memoryview(bytes(self._unsent) + f"{name} {len(data)}\n".encode() + data)
        self.write()

    def write(self) -> None:
        """Send what the pipe takes."""
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self.input, self._unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # reading tells that the child is gone
            self._unsent = memoryview(b"")

    def read(self) -> list[dict[str, Any]]:
        """Return the answers that have come.

        Raises:
            LostWorker: the process is gone, or what it sent is no answer.
        """
        try:
            data = os.read(self.output, CHUNK)
        except BlockingIOError:
            return []
        if not data:
            raise LostWorker(self.stop())
        self._received += data
        if b"\n" not in data:
            return []
        *lines, rest = bytes(self._received).split(b"\n")
        self._received = bytearray(rest)
        try:
            answers = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise LostWorker("it sent bytes that are no answer") from error
        if not all(isinstance(answer, dict) for answer in answers):
            raise LostWorker("it sent an answer of another form")
        return answers

    def kill(self) -> None:
        """Kill the process with all that it started, and leave its pipes to whoever reads them."""
        if self.child.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.child.pid, signal.SIGKILL)

    def stop(self) -> str:
        """Kill the process, wait for its end, and return how it ended."""
        self.kill()
        with self.child as child:  # closes the pipes
            child.kill()
        code = child.returncode
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class Crew:
    """Worker processes, which start when they have something to do.

    Args:
        size: how many.
        timeout: seconds that a worker may show no sign of work before it counts as hung.
        command: what they run; the numbers of this process, of the weights' file, and of the worker follow.

    Attributes:
        prelude: what a new worker does before everything else.
        replaced: workers that were lost and replaced so far.
    """

    def __init__(self, size: int, timeout: float, command: Sequence[str]) -> None:
        self.timeout, self.command = timeout, command
        self.prelude: list[Assignment] = []
        self.replaced = 0
        self.processes: list[SamplingProcess | None] = [None] * size
        self._memory = -1
        self._owner = os.getpid()
        self._is_stopped = False

    @property
    def threads(self) -> int:
        """How many threads a worker may use: all workers of all ranks share the cores."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or (torch.distributed.get_world_size() if distributed else 1))
        return max(1, count_cores() // (len(self.processes) * ranks))

    def start(self, memory: int, prelude: Sequence[Assignment]) -> None:
        """Start all workers, and let them do the prelude without waiting for it.

        Args:
            memory: file descriptor of the weights.
            prelude: what they, and all that replace them, do first.
        """
        self._memory, self.prelude, self._owner, self._is_stopped = memory, list(prelude), os.getpid(), False
        for number in range(len(self.processes)):
            self._renew(number, [])

    def run(self, tasks: Mapping[int, Assignment]) -> list[float]:
        """Have tasks done, and return the times at which they were, in order.

        Args:
            tasks: by the number of the worker.

        Raises:
            ValueError: a worker refuses its task, with its reason.
            RuntimeError: a task has cost too many workers, or what took its answer raises it, or the crew is stopped by
                another thread.
        """
        losses: Counter[int] = Counter()
        times: list[float] = []
        try:
            for number, task in tasks.items():
                process = self.processes[number]
                if process is None:
                    self._renew(number, [task])
                else:
                    self._give(process, task)
            while busy := [
                (number, process) for number, process in enumerate(self.processes) if process and process.tasks
            ]:
                wait_for([process for _, process in busy])
                for number, process in busy:
                    if self._is_stopped:
                        raise EngineError("WorkerEngine: it was closed while its workers were busy")
                    try:
                        done = self._follow(process)
                    except LostWorker as error:
                        losses[number] += 1
                        if losses[number] >= TRIES:
                            raise self._give_up(process.tasks[-1], error) from error
                        lost = process.tasks[-1].what
                        warnings.warn(
                            f"WorkerEngine: a worker was lost while it {lost}: {error}; a new one does so again",
                            stacklevel=2,
                        )
                        self.replaced += 1
                        kept = [task for task in process.tasks if task not in self.prelude]
                        process.stop()
                        self._renew(number, kept)
                    else:
                        times += [time.monotonic()] * sum(task in tasks.values() for task in done)
        except BaseException:
            for number, running in enumerate(self.processes):
                if running is not None and running.tasks:  # the next call must not read the answers to this one
                    running.stop()
                    self.processes[number] = None
            raise
        return times

    def tell(self, name: str) -> None:
        """Send a request without arguments and answer to all workers."""
        for process in filter(None, self.processes):
            process.send(name, {})

    def kill(self) -> None:
        """Kill all workers, from any thread; one that waits for them in ``run`` then raises RuntimeError."""
        self._is_stopped = True
        for process in filter(None, self.processes) if os.getpid() == self._owner else ():
            process.kill()

    def stop(self) -> None:
        """Kill all workers and wait for their end. In a process that was forked from theirs, let go of them."""
        self.kill()
        for process in filter(None, self.processes) if os.getpid() == self._owner else ():
            process.stop()
        self.processes = [None] * len(self.processes)

    def _renew(self, number: int, tasks: Sequence[Assignment]) -> None:
        """Start a worker with the prelude and these tasks before it."""
        command = [*self.command, str(os.getpid()), str(self._memory), str(number)]
        process = self.processes[number] = SamplingProcess(command, self.threads, self._memory)
        for task in [*self.prelude, *tasks]:
            self._give(process, task)

    def _give(self, process: SamplingProcess, task: Assignment) -> None:
        if process.is_ready and not process.tasks:
            process.deadline = time.monotonic() + self.timeout
        process.tasks.append(task)
        process.send(task.name, task.arguments)

    def _follow(self, process: SamplingProcess) -> list[Assignment]:
        """Send and read what can be; return the tasks that are done.

        Raises:
            LostWorker: the process is gone, late, or answers nonsense.
        """
        process.write()
        done, answers = [], process.read()
        for answer in answers:
            process.deadline = time.monotonic() + self.timeout
            if "alive" in answer:
                continue
            if not process.tasks or answer.get("done") != process.tasks[0].name:
                raise LostWorker("it answered what it was not asked")
            if "failed" in answer:
                raise LostWorker(str(answer["failed"]))
            if "refused" in answer:
                process.tasks.popleft()
                raise ValueError(answer["refused"])
            try:
                process.tasks[0].take(answer)
            except RuntimeError:
                process.tasks.popleft()
                raise
            except Exception as error:
                raise LostWorker(f"its answer is nonsense: {error}") from error
            process.is_ready = True
            done.append(process.tasks.popleft())
        if not answers and time.monotonic() >= process.deadline:
            raise LostWorker(
                f"it did nothing for {self.timeout if process.is_ready else START_SECONDS:g} s; where that may be work, "
                "raise model.engine.timeout"
            )
        return done

    @staticmethod
    def _give_up(task: Assignment, error: LostWorker) -> RuntimeError:
        return EngineError(
            f"WorkerEngine: {TRIES} workers in a row were lost while the last of them {task.what}: {error}; if "
            "the machine is short of memory, lower model.engine.workers"
        )


def wait_for(processes: Sequence[SamplingProcess]) -> None:
    """Wait until one of the processes can be read or written, or is late."""
    poll = select.poll()
    for process in processes:
        poll.register(process.output, select.POLLIN)
        if process.is_sending:
            poll.register(process.input, select.POLLOUT)
    seconds = min(process.deadline for process in processes) - time.monotonic()
    poll.poll(max(0, int(seconds * 1000) + 1))
