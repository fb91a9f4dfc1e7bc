"""Runs a program, and ends all that it started when the program ends or the process that asked for it is gone.

    python watch_program.py PARENT OWN SHARED [PROGRAM [ARGUMENT ...]]

PARENT is the number of the process that asks. The folder OWN is removed at the end, the folder SHARED when the parent is
gone. SIGTERM ends the program too. Its processes get SIGTERM first, so that they remove their shared memory, and SIGKILL
ten seconds later. Without a program, only the parent is watched. Standard library only.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time

GRACE = 10.0  # seconds
PARENT_DIED, ADOPT_ORPHANS = 1, 36  # of prctl


def prctl(option: int, value: int) -> None:
    """Set a property of this process, where the system has it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def watch(parent: int, own: str, shared: str, command: list[str]) -> None:
    """Run the program until it ends, the parent is gone or SIGTERM comes."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl(ADOPT_ORPHANS, 1)
    program = subprocess.Popen(command, preexec_fn=lambda: prctl(PARENT_DIED, signal.SIGKILL)) if command else None
    while os.getppid() == parent and not asked and (program is None or program.poll() is None):
        time.sleep(0.1)
    if program is not None and program.returncode is not None:
        print(f"the server has ended with status {program.returncode}", flush=True)
    end_group()
    shutil.rmtree(own, ignore_errors=True)
    if os.getppid() != parent:
        shutil.rmtree(shared, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def end_group() -> None:
    """Ask every process of this group to end, and wait until all have or the grace is over."""
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return
        time.sleep(0.05)


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
