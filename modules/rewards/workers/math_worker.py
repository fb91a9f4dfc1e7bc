"""Compares answers by math-verify in a child process: one JSON request per line in, one verdict per line out.

``LineWorker`` runs this file by path, so it imports nothing of this package. A request is {"gold": str, "completion":
str}. A verdict is 1.0, 0.0 or null (the gold answer cannot be parsed). The argument is the timeout in seconds per
request.
"""

import json
import logging
import os
import signal
import sys
import warnings
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=256)
def parse_gold(gold: str) -> tuple[Any, ...]:
    """Parse a gold answer as LaTeX; empty if nothing is found.

    The dollar signs matter: without them the library reads only the 2 in 2\\sqrt{3}.
    """
    from math_verify import parse

    return tuple(parse(f"${gold.strip('$')}$", fallback_mode="no_fallback", parsing_timeout=None))


def judge_answer(gold: str, completion: str) -> float | None:
    """Return 1.0 if the answers are equal, 0.0 if not or if none is found, None if the gold answer cannot be parsed."""
    from math_verify import parse, verify

    expected = list(parse_gold(gold))
    if not expected:
        return None
    found = parse(completion, parsing_timeout=None)
    return float(verify(expected, found, timeout_seconds=None))


def serve() -> None:
    """Answer requests until the input ends."""
    # What libraries print must not be read as a verdict, so it goes to standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    limit = float(sys.argv[1]) + 1.0
    judge_answer("1", "1")  # load the library before the first request is timed
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        # The parent kills this process at the timeout. If the parent is gone, the system's alarm ends a hang that no
        # Python code can end.
        if os.name == "posix":
            signal.setitimer(signal.ITIMER_REAL, limit)
        request = json.loads(line)
        print(json.dumps(judge_answer(request["gold"], request["completion"])), file=replies, flush=True)
        if os.name == "posix":
            signal.setitimer(signal.ITIMER_REAL, 0.0)


if __name__ == "__main__":
    serve()
