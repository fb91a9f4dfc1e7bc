"""A child Python process that answers one JSON line per request and is killed when it is late."""

import atexit
import json
import math
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

_START_SECONDS = 120.0  # a cold import on a loaded machine


@dataclass
class _Link:
    """One process's connection to its child; ``lock`` is held during a request."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    child: "subprocess.Popen[bytes] | None" = None


class LineWorker:
    """Runs ``script`` as a child process, started by the first request and restarted after it was lost.

    The script is run by path, with the timeout as its only argument, so it loads nothing of this package. It prints one
    line when it is ready, then one JSON line per JSON line read, and must end at the end of its input. Usable from any
    thread (one request at a time) and after a fork or in a pickled copy, which get a child of their own.

    Args:
        script: path of the program.
        timeout: seconds per request, start of the child not counted.

    Raises:
        ValueError: ``timeout`` is not a finite number > 0.
    """

    def __init__(self, script: Path, timeout: float) -> None:
        self._links: dict[int, _Link] = {}  # by process id: a forked process must not use its parent's child or lock
        if not 0.0 < timeout < math.inf:
            raise ValueError(f"timeout must be a finite number of seconds > 0; got {timeout}")
        self.script = script
        self.timeout = timeout
        self.failures = 0  # requests without an answer: late, or the child crashed
        _WORKERS.add(self)

    def __reduce__(self) -> tuple[type["LineWorker"], tuple[Path, float]]:
        return LineWorker, (self.script, self.timeout)

    def __del__(self) -> None:
        self.close()

    def ask(self, request: dict[str, str]) -> Any:
        """The child's answer, or None (counted in ``failures``) when it was late or crashed.

        Raises:
            RuntimeError: the child does not start.
        """
        line = json.dumps(request).encode() + b"\n"
        link = self._links.setdefault(os.getpid(), _Link())
        with link.lock:
            # Twice, because a child that died between two requests says nothing about this one.
            for _ in range(2):
                link.child = link.child or self._start()
                reply, late = self._exchange(link, line)
                if reply is not None:
                    return json.loads(reply)
                if late:
                    break
            self.failures += 1
            return None

    def close(self) -> None:
        """End this process's child, if there is one."""
        link = self._links.get(os.getpid())
        if link is not None:
            with link.lock:
                _stop(link)

    def _start(self) -> "subprocess.Popen[bytes]":
        # -P keeps the script's folder off the import path: its math.py would hide the standard library's.
        command = [sys.executable, "-P", str(self.script), str(self.timeout)]
        # A session of its own: a signal to all of the run is not for the child, which the run may still need.
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        ready, _ = _converse(child, b"", _START_SECONDS)
        if ready is None:
            with child:
                child.kill()
            raise RuntimeError(f"worker did not start; run it by hand to see why: {' '.join(command)}")
        return child

    def _exchange(self, link: _Link, line: bytes) -> tuple[bytes | None, bool]:
        """Reply and whether it was late; the child is gone afterwards unless it replied in time."""
        assert link.child is not None
        reply = None
        late = False
        try:
            reply, late = _converse(link.child, line, self.timeout)
        finally:  # also when interrupted: the next request must not read this one's reply
            if reply is None:
                _stop(link)
        return reply, late


_WORKERS: "weakref.WeakSet[LineWorker]" = weakref.WeakSet()


def _converse(child: "subprocess.Popen[bytes]", line: bytes, seconds: float) -> tuple[bytes | None, bool]:
    """Send a line (empty = none) and read one; (reply or None, whether the child was killed for lateness)."""
    assert child.stdin is not None
    assert child.stdout is not None
    late = threading.Event()

    def expire() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        _write(child.stdin, line)
        reply = child.stdout.readline()
    except BrokenPipeError:
        reply = b""
    finally:
        timer.cancel()
        timer.join()  # after this, `late` is final
    whole = reply.endswith(b"\n") and not late.is_set()
    return (reply if whole else None), late.is_set()


def _write(pipe: IO[bytes], line: bytes) -> None:
    """Write all of a line to an unbuffered pipe."""
    rest = memoryview(line)
    while rest:
        rest = rest[pipe.write(rest) :]


def _stop(link: _Link) -> None:
    """Kill the child and wait for its end."""
    if link.child is not None:
        with link.child as child:
            child.kill()
        link.child = None


def _close_all() -> None:
    for worker in list(_WORKERS):
        worker.close()


atexit.register(_close_all)
