"""Speaks HTTP with a vLLM server, with the standard library alone."""

import json
import re
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

PROGRESS = re.compile(r"^vllm:(?:generation|prompt)_tokens_total(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
PATIENCE = 600.0  # seconds for an answer other than completions


class ServerLost(Exception):
    """Raised when a server does not answer, breaks off, fails inside, or answers what nobody asked for.

    Attributes:
        answered: whether it did answer, with an error.
    """

    def __init__(self, message: str, answered: bool = False) -> None:
        super().__init__(message)
        self.answered = answered


class ServerRefused(Exception):
    """Raised when a server understands a request and refuses it."""


class VLLMClient:
    """Asks one server; any number of threads may ask at the same time.

    Args:
        url: such as ``http://127.0.0.1:8000``.
        model: the name of the model on the server; "" = ask for it.

    Raises:
        ValueError: ``url`` is none.
    """

    def __init__(self, url: str, model: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.username:
            raise ValueError(f"VLLMEngine: url '{url}' must be such as http://127.0.0.1:8000")
        self.url, self.host, self.port, self.model = url, parts.hostname, parts.port or 80, model
        self._open: set[HTTPConnection] = set()
        self._abandoned = 0  # how often requests were broken off
        self._lock = threading.Lock()

    def call(
        self, path: str, body: Mapping[str, Any] | None = None, method: str = "POST", seconds: float = PATIENCE
    ) -> Any:
        """Send a request and return its answer, read as JSON where it is JSON.

        Args:
            path: with the query.
            body: sent as JSON.
            method: POST or GET.
            seconds: without a byte from the server before it counts as lost.

        Raises:
            ServerLost: see the class.
            ServerRefused: the status is 4xx; the message is the server's.
        """
        connection = HTTPConnection(self.host, self.port, timeout=seconds)
        with self._lock:
            self._open.add(connection)
            before = self._abandoned
        try:
            connection.connect()
            if before != self._abandoned:
                raise ServerLost(f"{path}: broken off")
            connection.request(
                method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            said = response.read()
            status = response.status
        except (OSError, HTTPException) as error:
            raise ServerLost(f"{path}: {str(error) or type(error).__name__}") from error
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        if status >= 400:
            reason = f"{path} has status {status}: {read_reason(said)}"
            raise ServerRefused(reason) if status < 500 else ServerLost(reason, answered=True)
        return read_body(path, response, said)

    def count_tokens(self, seconds: float) -> float:
        """Return how many tokens the server has read and sampled since it started."""
        text = self.call("/metrics", method="GET", seconds=seconds)
        return sum(map(float, PROGRESS.findall(str(text))))

    def abandon(self) -> None:
        """Break off every request that waits for its answer, so that its thread goes on with ``ServerLost``."""
        with self._lock:
            self._abandoned += 1
            waiting = list(self._open)
        for connection in waiting:
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)


def read_body(path: str, response: HTTPResponse, said: bytes) -> Any:
    """Return what a server answered.

    Raises:
        ServerLost: it says that it is JSON, and is not.
    """
    text = said.decode(errors="replace")
    if not text or "json" not in (response.getheader("Content-Type") or ""):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ServerLost(f"{path}: the answer is not JSON") from error


def read_reason(said: bytes) -> str:
    """Return the message inside an answer that refuses a request."""
    try:
        found = json.loads(said)
        found = found.get("error", found) if isinstance(found, dict) else found
        message = found.get("message", found) if isinstance(found, dict) else found
    except ValueError:
        message = said.decode(errors="replace")
    return str(message)[:600]
