"""HttpChat against a real server that answers well, late, wrongly or not at all; LocalChat with the tiny model."""

import asyncio
import logging
import socket
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from email.utils import formatdate
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from torch import nn

from modules.networks.policy import Policy
from modules.rewards.chat.clients import HttpChat, LocalChat
from modules.rewards.chat.replies import read_retry_after

KEY = "sk-secret-of-the-test"


def ask(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def echo(question: str) -> str:
    return f"You said {question}"


def in_a_process(url: str, cache: str, text: str) -> list[str | None]:
    return HttpChat(url, "m", cache=cache).complete(ask(text, "shared"))


def test_answers_in_order_with_what_they_cost(chat_server: Any) -> None:
    server = chat_server(lambda question: (time.sleep(0.1 if question == "a" else 0), echo(question))[1])
    client = HttpChat(server.url, "some-model", max_tokens=7, prices=(2.0, 30.0))
    assert client.complete(ask("a", "b", "c")) == ["You said a", "You said b", "You said c"]
    # 3 requests of 100 + 10 tokens: (2 x 300 + 30 x 30) / 1e6 = 0.0015
    expected = {
        "requests": 3,
        "cached": 0,
        "failed": 0,
        "prompt_tokens": 300,
        "completion_tokens": 30,
        "cost": pytest.approx(0.0015),
    }
    assert client.report() == expected
    bodies = [body for _, body in server.requests]
    assert {"model": "some-model", "temperature": 0.0, "max_tokens": 7, "messages": ask("b")[0]} in bodies
    assert all("Authorization" not in headers for headers, _ in server.requests)
    assert client.complete([]) == []


def test_no_more_requests_at_once_than_asked_for(chat_server: Any) -> None:
    under_way, most = [0], [0]

    def rule(question: str) -> str:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        time.sleep(0.05)
        under_way[0] -= 1
        return question

    client = HttpChat(chat_server(rule).url, "m", concurrency=3)
    assert client.complete(ask(*"abcdefghi")) == list("abcdefghi")
    assert most[0] == 3


def test_the_key_is_sent_and_kept_nowhere(
    chat_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", KEY)
    server = chat_server(echo)
    client = HttpChat(server.url, "m", api_key_env="MY_KEY", cache=str(tmp_path))
    client.complete(ask("a"))
    assert server.requests[0][0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in caplog.text + str(vars(client)) + "".join(file.read_text() for file in tmp_path.iterdir())
    monkeypatch.setenv("MY_KEY", "sk-\N{SNOWMAN}")
    with pytest.raises(ValueError, match="the environment variable MY_KEY holds characters that no key can have"):
        client.complete(ask("b"))


@pytest.mark.parametrize(
    "trouble", [500, 503, 429, b"{", b"[]", b'{"choices": [{"message": {"content": null}}]}', b"\xff"]
)
def test_what_may_pass_is_tried_again(chat_server: Any, trouble: int | bytes) -> None:
    client = HttpChat(chat_server(echo, plan=[trouble]).url, "m", retries=1)
    assert client.complete(ask("a")) == ["You said a"]
    assert (client.counts["requests"], client.counts["failed"]) == (2, 0)


def test_no_answer_after_all_tries_is_none(chat_server: Any) -> None:
    client = HttpChat(chat_server(echo, plan=[500, b"{"]).url, "m", retries=1, concurrency=1)
    assert client.complete(ask("a", "b")) == [None, "You said b"]
    assert client.report() == {"requests": 3, "cached": 0, "failed": 1, "prompt_tokens": 100, "completion_tokens": 10}


def test_the_server_says_how_long_to_wait(chat_server: Any) -> None:
    server = chat_server(echo, plan=[(429, {"Retry-After": "2"})])
    start = time.monotonic()
    assert HttpChat(server.url, "m", retries=1).complete(ask("a")) == ["You said a"]
    assert 2.0 <= time.monotonic() - start < 4.0  # by itself it would have waited 0.5 to 1 s
    assert read_retry_after(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert [read_retry_after(header) for header in (None, "soon", "-5", "1e9", "9999999")] == [0, 0, 0, 0, 600]


def test_a_late_server_costs_one_answer_not_the_run(chat_server: Any) -> None:
    client = HttpChat(chat_server(echo, plan=[30.0]).url, "m", timeout=0.3, retries=0, concurrency=1)
    start = time.monotonic()
    assert client.complete(ask("a", "b")) == [None, "You said b"]
    assert time.monotonic() - start < 5


def test_a_server_that_drips_is_late_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            try:
                for _ in range(1000):
                    connection.sendall(b" ")
                    time.sleep(0.1)
            except OSError:
                connection.close()

        Thread(target=drip, daemon=True).start()
        start = time.monotonic()
        client = HttpChat(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "m", timeout=0.5, retries=0)
        assert client.complete(ask("a")) == [None]
        assert time.monotonic() - start < 3


def test_a_server_that_is_not_there_ends_the_run() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(
        ValueError, match=rf"^HttpChat: cannot reach http://127.0.0.1:{port}/v1/chat/completions .*; start the server"
    ):
        HttpChat(f"http://127.0.0.1:{port}/v1/", "m", retries=0).complete(ask("a", "b"))


def test_a_refusal_ends_the_run_at_once(chat_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "no")  # the server says "no": a key that is echoed is not shown
    for status in (400, 401, 404, 301):
        server = chat_server(echo, plan=[status])
        with pytest.raises(
            ValueError,
            match=rf"^HttpChat: {server.url}/chat/completions refused the request with status {status}: \*\*\*$",
        ):
            HttpChat(server.url, "m").complete(ask("a"))
        assert len(server.requests) == 1


def test_the_cache_answers_for_the_same_question_only(chat_server: Any, tmp_path: Path) -> None:
    server, folder = chat_server(echo, plan=[500]), tmp_path / "new" / "cache"
    first = HttpChat(server.url, "m", cache=str(folder), retries=0, concurrency=1, prices=(1e6, 0.0))
    assert first.complete(ask("a", "b")) == [None, "You said b"]  # a failure is not kept
    again = HttpChat(server.url, "m", cache=str(folder), prices=(1e6, 0.0))
    assert again.complete(ask("a", "b")) == ["You said a", "You said b"]
    assert again.report() == {
        "requests": 1,
        "cached": 1,
        "failed": 0,
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "cost": 100,
    }
    for others in (
        {"model": "other"},
        {"temperature": 1.0},
        {"max_tokens": 3},
        {"base_url": server.url.replace("127.0.0.1", "localhost")},
    ):
        other = HttpChat(**{"base_url": server.url, "model": "m", "cache": str(folder), **others})
        other.complete(ask("b"))
        assert other.counts["cached"] == 0
    for file in folder.iterdir():
        file.write_text('{"text": ')  # damaged
    assert HttpChat(server.url, "m", cache=str(folder)).complete(ask("b")) == ["You said b"]
    assert all(file.name.endswith(".json") and not file.name.startswith(".") for file in folder.iterdir())


def test_several_processes_share_a_cache(chat_server: Any, tmp_path: Path) -> None:
    server = chat_server(echo)
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        found = list(pool.map(in_a_process, [server.url] * 4, [str(tmp_path)] * 4, "abcd"))
    assert found == [[f"You said {text}", "You said shared"] for text in "abcd"]
    assert len(list(tmp_path.iterdir())) == 5


def test_works_inside_a_running_event_loop(chat_server: Any) -> None:
    async def main() -> list[str | None]:
        return HttpChat(chat_server(echo).url, "m").complete(ask("a"))

    assert asyncio.run(main()) == ["You said a"]


def test_impossible_settings_in_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for url in ("localhost:8000/v1", "http://", "ftp://a/v1", "/v1", "http://a:port"):
        with pytest.raises(ValueError, match=f"HttpChat: base_url '{url}' must be a URL such as http"):
            HttpChat(url, "m")
    with pytest.raises(
        ValueError,
        match="temperature -1 must .*; timeout nan must .*; max_tokens 1 and concurrency 0 .*; retries -1 .*; cache '",
    ):
        HttpChat(
            "http://a/v1",
            "m",
            temperature=-1,
            timeout=float("nan"),
            max_tokens=1,
            concurrency=0,
            retries=-1,
            cache=str(file),
        )


@pytest.mark.parametrize("missing", ["httpx", "tenacity"])
def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"^{missing} is not installed: pip install 'lightning-align\[judge\]'$"):
        HttpChat("http://a/v1", "m")


def test_a_local_model_answers_and_does_not_learn() -> None:
    client = LocalChat("tiny", max_completion_length=5)
    answers = client.complete(ask("Hello", "x" * 2000, "Hello"))  # the tiny model has 1024 positions
    assert isinstance(answers[0], str) and answers[1] is None and answers[2] == answers[0]
    # the template: <|im_start|> "user\n" Hello <|im_end|> "\n" <|im_start|> "assistant\n" = 1 + 5 + 5 + 1 + 1 + 1 + 10
    # tokens
    assert client.report()["prompt_tokens"] == 2 * 24
    assert (client.counts["requests"], client.counts["failed"]) == (2, 1)
    assert not isinstance(client, nn.Module) and not client.policy.training
    assert not any(parameter.requires_grad for parameter in client.policy.parameters())
    warm = LocalChat("tiny", max_completion_length=5, temperature=1.0)
    assert warm.complete(ask("Hello")) == warm.complete(ask("Hi", "Hello"))[1:]
    assert warm.identity != client.identity


def test_a_base_model_cannot_be_asked(tmp_path: Path) -> None:
    policy = Policy("tiny")
    policy.tokenizer.chat_template = None
    policy.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat template .*; name a chat model"):
        LocalChat(str(tmp_path))
