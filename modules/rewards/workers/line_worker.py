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

_START_SECONDS = 120.0  # enough for a cold import on a busy machine


@dataclass
class _Link:
    """The connection of one process to its child; ``lock`` is held during a request."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    child: "subprocess.Popen[bytes] | None" = None


class LineWorker:
    """Runs ``script`` as a child process, which the first request starts and which is started again after it is lost.

    The script is run by path, with the timeout as its only argument, so it imports nothing of this package. It prints
    one line when it is ready, then one JSON line per JSON line that it reads, and must end when its input ends. Any
    thread may ask, one request at a time. A forked process or a pickled copy gets its own child.

    Args:
        script: path of the program.
        timeout: > 0, seconds per request, without the start of the child.

    Raises:
        ValueError: ``timeout`` is not a finite number > 0.
    """

    def __init__(self, script: Path, timeout: float) -> None:
        self._links: dict[int, _Link] = {}  # by process id: a forked process must not use its parent's child or lock
        if not 0.0 < timeout < math.inf:
            raise ValueError(f"timeout must be a finite number of seconds > 0, got {timeout}")
        self.script = script
        self.timeout = timeout
        self.failures = 0  # requests without an answer, because the child was late or crashed
        _WORKERS.add(self)

    def __reduce__(self) -> tuple[type["LineWorker"], tuple[Path, float]]:
        return LineWorker, (self.script, self.timeout)

    def __del__(self) -> None:
        self.close()

    def ask(self, request: dict[str, str]) -> Any:
        """Return the child's answer; None when the child was late or crashed, which is counted in ``failures``.

        Raises:
            RuntimeError: the child does not start.
        """
        line = json.dumps(request).encode() + b"\n"
        link = self._links.setdefault(os.getpid(), _Link())
        with link.lock:
            # Ask twice: a child may have died between two requests, which says nothing about this one.
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
        """End the child of this process, if there is one."""
        link = self._links.get(os.getpid())
        if link is not None:
            with link.lock:
                _stop(link)

    def _start(self) -> "subprocess.Popen[bytes]":
        # -P keeps the script's folder off the import path, so that no file in it hides a library.
        command = [sys.executable, "-P", str(self.script), str(self.timeout)]
        # In a session of its own the child misses signals to the whole run, which may still need it.
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
        """Return the reply and whether it was late. The child is gone afterwards unless it replied in time."""
        assert link.child is not None
        reply = None
        late = False
        try:
            reply, late = _converse(link.child, line, self.timeout)
        finally:  # also after an interrupt: the next request must not read this request's reply
            if reply is None:
                _stop(link)
        return reply, late


_WORKERS: "weakref.WeakSet[LineWorker]" = weakref.WeakSet()


def _converse(child: "subprocess.Popen[bytes]", line: bytes, seconds: float) -> tuple[bytes | None, bool]:
    """Send a line (empty = none) and read one.

    Returns:
        the reply or None, and whether the child was killed because it was late.
    """
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
        timer.join()  # after this, ``late`` no longer changes
    whole = reply.endswith(b"\n") and not late.is_set()
    return (reply if whole else None), late.is_set()


def _write(pipe: IO[bytes], line: bytes) -> None:
    """Write all of a line to an unbuffered pipe."""
    rest = memoryview(line)
    while rest:
        rest = rest[pipe.write(rest) :]


def _stop(link: _Link) -> None:
    """Kill the child and wait until it has ended."""
    if link.child is not None:
        with link.child as child:
            child.kill()
        link.child = None


def _close_all() -> None:
    for worker in list(_WORKERS):
        worker.close()


atexit.register(_close_all)
