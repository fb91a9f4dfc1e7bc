"""Two real processes that run command lines together under a watchdog.

They are started once: what one run has loaded, the next one need not load.
"""

import json
import os
import select
import signal
import socket
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from programs import Program

TIMEOUT = 240.0  # seconds of a run, far above what one takes on a busy machine


class TwoRanks:
    """Runs ``python -m modules`` with given arguments as two ranks of one process group: ``run(folder, arguments)``."""

    def __init__(self) -> None:
        self.folder = TemporaryDirectory()
        self.ranks: list[Program] = []
        self.given: list[int] = []  # pipes from which each rank reads what to run
        self.answers: list[int] = []  # where each rank writes the exit status of a run

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        for rank in range(2):
            here = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", **place}
            pipes = [Path(self.folder.name) / f"{name}-{rank}" for name in ("given", "answer")]
            for pipe, ends in zip(pipes, (self.given, self.answers), strict=True):
                pipe.unlink(missing_ok=True)
                os.mkfifo(pipe)
                ends.append(os.open(pipe, os.O_RDWR))
            command = [str(Path(__file__).with_name("rank.py")), *map(str, pipes)]
            self.ranks.append(Program(*command, folder=pipes[0].parent, environment={**os.environ, **here}))

    def run(self, folder: Path, *arguments: str) -> None:
        """Run both ranks and fail the test, with the place of each rank, unless both end in time.

        Their exit status must be 0 or that of a claim that does not hold, because after so short a training none need
        to.
        """
        if not self.ranks:
            self.start()
        before = [len(rank.said()[1]) for rank in self.ranks]
        for pipe in self.given:
            os.write(pipe, (json.dumps([str(folder), arguments]) + "\n").encode())
        deadline, waiting = time.monotonic() + TIMEOUT, set(self.answers)
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], 1.0)
            for answer in ready:
                rank = self.answers.index(answer)
                said = self.ranks[rank].said()[1][before[rank] :]
                if os.read(answer, 1) != b"\0" and "claims did not hold: " not in said:
                    self.fail(f"rank {rank} failed", arguments)
            waiting -= set(ready)
            if waiting and not all(rank.process.is_alive() for rank in self.ranks):
                self.fail("a rank has ended", arguments)
            if waiting and time.monotonic() > deadline:
                self.fail(f"ranks {sorted(map(self.answers.index, waiting))} hang", arguments)

    def fail(self, what: str, arguments: tuple[str, ...]) -> None:
        for rank in self.ranks:
            if rank.process.is_alive():
                os.kill(rank.process.pid or 0, signal.SIGUSR1)
        time.sleep(0.5)
        said = [f"-- rank {number}\n{rank.said()[1][-4000:]}" for number, rank in enumerate(self.ranks)]
        self.end()
        pytest.fail("\n".join([f"{what}: {' '.join(arguments)}", *said]))

    def end(self) -> None:
        """End both processes; the next run starts them again."""
        for rank in self.ranks:
            with rank:
                pass
        for pipe in (*self.given, *self.answers):
            os.close(pipe)
        self.ranks, self.given, self.answers = [], [], []
