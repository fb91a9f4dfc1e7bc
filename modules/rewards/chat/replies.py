"""Reads the replies of a chat server, answers and refusals, and keeps answers on disk."""

import json
import time
from dataclasses import asdict, dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from modules.trainer.saving import naming, replacing

LONGEST_WAIT = 600.0  # seconds; a longer Retry-After is cut to this


@dataclass(frozen=True)
class Answer:
    """The answer to one conversation, and its cost in tokens."""

    text: str | None  # None = no answer
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0  # 0 = from the cache


class TryAgain(Exception):
    """Raised for a request that failed and may succeed later."""

    def __init__(self, reason: str, wait: float = 0.0, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds that the server asks the client to wait
        self.unreachable = unreachable  # True = there was no connection, so the request is not at fault


def read_answer(content: bytes) -> Answer:
    """Read the body of a reply with status 200; tokens that the server does not count are 0.

    Raises:
        TryAgain: the body holds no answer as text.
    """
    try:
        reply = json.loads(content)
        text = reply["choices"][0]["message"]["content"]
        usage: Any = reply.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise TryAgain("malformed answer") from error
    if not isinstance(text, str):
        raise TryAgain("answer without text")
    return Answer(text, *tokens)


def read_refusal(content: bytes) -> str:
    """Return what the body of an error says, in one line of at most 300 characters."""
    said: Any = content.decode("utf-8", errors="replace")
    try:
        body = json.loads(said)
    except ValueError:
        body = None
    if isinstance(body, dict):
        said = body.get("error") or body.get("detail") or body.get("message") or said
        said = said.get("message", said) if isinstance(said, dict) else said
    return " ".join(str(said).split())[:300] or "no reason given"


def read_retry_after(header: str | None) -> float:
    """Return the seconds that a Retry-After header asks for, as a number or as a date; 0 if it cannot be read."""
    if header is None:
        return 0.0
    try:
        seconds = (
            float(header) if header.strip().isdecimal() else parsedate_to_datetime(header).timestamp() - time.time()
        )
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT)


def read_cached(file: Path) -> Answer | None:
    """Return the answer that a file keeps; None if there is no file or it is damaged."""
    try:
        return Answer(**json.loads(file.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_cached(file: Path, answer: Answer) -> None:
    """Write an answer to its cache file. The file is renamed into place, so no process ever reads half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with naming(file), replacing(file) as part:
        part.write_text(json.dumps(asdict(replace(answer, requests=0))), encoding="utf-8")
