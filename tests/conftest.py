"""What tests of all packages share: a fresh run seed, and a real chat server whose answers a test decides."""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

LONG = ("contracts/test_two_ranks", "contracts/test_readme", "loop/test_resume", "methods/test_recorded_metrics")
LONG += ("callbacks/test_doctor", "callbacks/test_engine_mismatch", "rollout/test_conformance", "rollout/test_vllm")
Rule = Callable[[str], str]  # what the last message says -> what is answered
ANSWERS = re.compile(
    r"\[Answer A (\w{8})\]\n(.*)\n\[End of answer A \1\]\n\n\[Answer B \1\]\n(.*)\n\[End of answer B \1\]", re.DOTALL
)


def always_first(question: str) -> str:
    return "The first one.\nVerdict: A"


def longer_wins(question: str) -> str:
    found = ANSWERS.search(question)
    assert found is not None
    first, second = map(len, found.groups()[1:])
    return "Verdict: " + ("A" if first > second else "B" if second > first else "tie")


@dataclass
class ChatServer:
    """A chat server that first works off ``plan`` and then answers by ``rule``.

    Each entry of ``plan`` serves one request: an HTTP status, a raw body, seconds to wait, or headers with a status.
    """

    rule: Rule
    plan: list[Any] = field(default_factory=list)
    requests: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)  # headers, body
    url: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.requests.append((dict(handler.headers), body))
            step = self.plan.pop(0) if self.plan else None
        if isinstance(step, float):
            self.stop.wait(step)
        status, headers = step if isinstance(step, tuple) else (step if isinstance(step, int) else 200, {})
        content = (
            step
            if isinstance(step, bytes)
            else self.body(body["messages"][-1]["content"])
            if status == 200
            else b'{"error": {"message": "no"}}'
        )
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    def body(self, question: str) -> bytes:
        message = {"role": "assistant", "content": self.rule(question)}
        return json.dumps(
            {"choices": [{"message": message}], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
        ).encode()


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that does not wait for the answer is part of the test."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put long files at the beginning of each process's share of the tests, so that the processes end together."""
    count = getattr(config, "workerinput", {"workercount": 1})["workercount"]
    files = dict.fromkeys(item.path for item in items)
    long = [path for path in files if "learning" in path.parts or f"{path.parent.name}/{path.stem}" in LONG]
    rest, shares = [item for item in items if item.path not in long], []
    for number in range(count):
        share = [item for item in items if item.path in long[number::count]]
        missing = max(0, len(items) * (number + 1) // count - len(items) * number // count - len(share))
        shares += [*share, *rest[:missing]]
        rest = rest[missing:]
    items[:] = [*shares, *rest]


@pytest.fixture(autouse=True, scope="module")
def fresh_seed_of_a_module() -> None:
    """Forget the run seed of tests before, also for what a module's tests share, which is made before each of them."""
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture(autouse=True)
def no_seed_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the seed that an earlier test set by ``seed_everything``."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture
def chat_server() -> Iterator[Callable[..., ChatServer]]:
    """Give chat_server(rule, plan=[...]), which starts a server in a thread on its own port."""
    running: list[tuple[_Quiet, ChatServer]] = []

    def start(rule: Rule = always_first, plan: list[Any] | None = None) -> ChatServer:
        chat = ChatServer(rule, plan or [])

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                chat.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                """Silent."""

        server = _Quiet(("127.0.0.1", 0), Handler)
        chat.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        running.append((server, chat))
        return chat

    yield start
    for server, chat in running:
        chat.stop.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def rules() -> dict[str, Rule]:
    """Rules of judges by name."""
    return {"always first": always_first, "longer wins": longer_wins}
