"""Two real processes that run command lines together under a watchdog.

They are started once, because a start costs more than a run.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT = 240.0  # seconds of a run, far above what one takes on a busy machine


class TwoRanks:
    """Runs ``python -m modules`` with given arguments as two ranks of one process group: ``run(folder, arguments)``."""

    def __init__(self) -> None:
        self.ranks: list[subprocess.Popen[str]] = []
        self.answers: list[int] = []  # where each rank writes the exit status of a run
        self.logs: list[IO[str]] = []

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(2):
            here = {
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            environment = {**os.environ, **here, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            answer, end = os.pipe()
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115
            command = [sys.executable, str(Path(__file__).with_name("rank.py")), str(end)]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                pass_fds=[end],
            )
            os.close(end)
            self.ranks.append(process)
            self.answers.append(answer)
            self.logs.append(log)

    def run(self, folder: Path, *arguments: str) -> None:
        """Run both ranks and fail the test, with the place of each rank, unless both end in time.

        Their exit status must be 0 or that of a claim that does not hold, because after so short a training none need
        to.
        """
        if not self.ranks:
            self.start()
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps([str(folder), arguments]) + "\n")
            rank.stdin.flush()
        deadline, waiting = time.monotonic() + TIMEOUT, set(self.answers)
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
            for answer in ready:
                if os.read(answer, 1) != b"\0" and "claims did not hold: " not in self.said(answer):
                    self.fail(f"rank {self.answers.index(answer)} failed", arguments)
            if not ready:
                self.fail(f"ranks {sorted(map(self.answers.index, waiting))} hang", arguments)
            waiting -= set(ready)

    def said(self, answer: int) -> str:
        """Return the end of what a rank has printed."""
        log = self.logs[self.answers.index(answer)]
        log.seek(0)
        return log.read()[-4000:]

    def fail(self, what: str, arguments: tuple[str, ...]) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        said = [f"-- rank {number}\n{self.said(answer)}" for number, answer in enumerate(self.answers)]
        self.end()
        pytest.fail("\n".join([f"{what}: {' '.join(arguments)}", *said]))

    def end(self) -> None:
        """End both processes; the next run starts them again."""
        for rank, answer, log in zip(self.ranks, self.answers, self.logs, strict=True):
            rank.kill()
            rank.communicate()
            os.close(answer)
            log.close()
        self.ranks, self.answers, self.logs = [], [], []
