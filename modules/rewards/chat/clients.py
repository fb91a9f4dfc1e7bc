"""Clients of chat models: an OpenAI-compatible server over HTTP, or a local model through the rollout engine."""

import hashlib
import json
import math
import os
import re
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from modules.networks.policy import Policy
from modules.rewards.chat.protocol import ChatClient, Conversation
from modules.rewards.chat.replies import (
    Answer,
    TryAgain,
    read_answer,
    read_cached,
    read_refusal,
    read_retry_after,
    write_cached,
)
from modules.rollout.engine import InProcessEngine
from modules.rollout.sampling import Sampling

# Seconds before the second try, doubled for each later one, and their bound; up to FIRST_WAIT is added at random.
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0


class HttpChat(ChatClient):
    """Asks a server: ``POST {base_url}/chat/completions``, several requests at a time.

    Requests run in threads, so the client also works inside a running event loop. Status 429 and 5xx, timeouts, broken
    connections and malformed answers are tried again, with growing waits that respect ``Retry-After``. A conversation
    that gets no answer in the end is None.

    Args:
        base_url: up to and including the version, such as ``http://127.0.0.1:8000/v1``.
        model: name of the model on the server.
        api_key_env: NAME of the environment variable that holds the key. Without such a variable no key is sent, as for
            local servers.
        temperature: >= 0; 0 = the most likely answer.
        max_tokens: >= 1, of an answer.
        timeout: > 0, seconds for one try.
        retries: >= 0, tries after the first.
        concurrency: >= 1, requests at a time.
        cache: folder of answers, which several processes may share. A cached conversation is never asked again, at any
            temperature.
        prices: of a million prompt tokens and of a million completion tokens, for ``cost``.

    Raises:
        ImportError: httpx or tenacity is not installed.
        ValueError: a setting is impossible. When called: the server cannot be reached, or refuses the request (4xx
            other than 429).
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str = "OPENAI_API_KEY",
        temperature: float = 0.0,
        max_tokens: int = 512,
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
        cache: str | None = None,
        prices: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self._httpx, self._tenacity = (require_package(name) for name in ("httpx", "tenacity"))
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        shown = re.sub(r"//[^/]*@", "//***@", base_url)
        checks = {
            f"base_url '{shown}' must not hold a password; put the key into the environment variable {api_key_env}": (
                shown == base_url
            ),
            f"base_url '{shown}' must be a URL such as http://127.0.0.1:8000/v1": self._is_url(),
            f"temperature {temperature} must be a finite number >= 0": 0 <= temperature < math.inf,
            f"timeout {timeout} must be a finite number of seconds > 0": 0 < timeout < math.inf,
            f"max_tokens {max_tokens} and concurrency {concurrency} must be >= 1": min(max_tokens, concurrency) >= 1,
            f"retries {retries} must be >= 0": retries >= 0,
            f"cache '{cache}' must be a folder, not a file": cache is None or not Path(cache).is_file(),
        }
        problems = [problem for problem, fine in checks.items() if not fine]
        if problems:
            raise ValueError("HttpChat: " + "; ".join(problems))
        self.settings = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self.identity = f"{self.url} {json.dumps(self.settings)}"
        self.api_key_env, self.timeout, self.retries, self.concurrency = api_key_env, timeout, retries, concurrency
        self.cache, self.prices = Path(cache) if cache is not None else None, prices

    def complete(self, conversations: Sequence[Conversation]) -> list[str | None]:
        """Ask the server for the answers that the cache does not hold.

        Raises:
            ValueError: see the class.
        """
        stop = threading.Event()
        limits = self._httpx.Limits(max_connections=self.concurrency)
        with self._httpx.Client(headers=self._headers(), timeout=self.timeout, limits=limits) as client:
            pool = ThreadPoolExecutor(self.concurrency)
            try:
                answers = list(pool.map(lambda conversation: self._answer(client, conversation, stop), conversations))
            finally:
                stop.set()  # when interrupted
                pool.shutdown(cancel_futures=True)
        for answer in answers:
            self.counts["requests"] += answer.requests
            self.counts["cached"] += answer.requests == 0
            self.counts["failed"] += answer.text is None
            if answer.requests:
                self.counts["prompt_tokens"] += answer.prompt_tokens
                self.counts["completion_tokens"] += answer.completion_tokens
        return [answer.text for answer in answers]

    def report(self) -> dict[str, float]:
        """Return the counts, and with prices the ``cost`` in their currency; cached answers cost nothing."""
        if self.prices is None:
            return super().report()
        prompt, completion = self.prices
        cost = (prompt * self.counts["prompt_tokens"] + completion * self.counts["completion_tokens"]) / 1e6
        return super().report() | {"cost": cost}

    def _answer(self, client: Any, conversation: Conversation, stop: threading.Event) -> Answer:
        """Get one answer from the cache or the server. An error sets ``stop``, after which nothing more is sent."""
        body = {**self.settings, "messages": conversation}
        file = None
        if self.cache is not None:
            file = (
                self.cache / f"{hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()}.json"
            )
            if (cached := read_cached(file)) is not None:
                return cached
        if stop.is_set():
            return Answer(None)
        try:
            answer = self._ask(client, body, stop)
        except BaseException:
            stop.set()
            raise
        if file is not None and answer.text is not None:
            write_cached(file, answer)
        return answer

    def _ask(self, client: Any, body: dict[str, Any], stop: threading.Event) -> Answer:
        """Send one conversation until it is answered, refused, or given up."""
        tries = self._tenacity.Retrying(
            stop=self._tenacity.stop_after_attempt(self.retries + 1) | self._tenacity.stop_when_event_set(stop),
            wait=self._wait,
            sleep=self._tenacity.sleep_using_event(stop),
            retry=self._tenacity.retry_if_exception_type(TryAgain),
            reraise=True,
        )
        try:
            answer: Answer = tries(self._post, client, body)
        except TryAgain as error:
            if error.unreachable:
                raise ValueError(
                    f"HttpChat: cannot reach {self.url} ({error}); start the server or correct base_url"
                ) from error
            answer = Answer(None)
        return replace(answer, requests=tries.statistics["attempt_number"])

    def _wait(self, state: Any) -> float:
        """Return the seconds to wait before the next try."""
        usual = self._tenacity.wait_exponential_jitter(initial=FIRST_WAIT, max=LONGEST_WAIT, jitter=FIRST_WAIT)(state)
        return max(usual, state.outcome.exception().wait)

    def _post(self, client: Any, body: dict[str, Any]) -> Answer:
        """Send the request once.

        Raises:
            TryAgain: the request failed and may succeed later.
            ValueError: the server refuses it.
        """
        deadline, content = time.monotonic() + self.timeout, b""
        try:
            with client.stream("POST", self.url, json=body) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > deadline:  # httpx limits only the silence between two chunks
                        raise TryAgain(f"no whole answer in {self.timeout} s")
        except self._httpx.RequestError as error:
            lost = isinstance(error, self._httpx.ConnectError | self._httpx.ConnectTimeout | self._httpx.ProxyError)
            raise TryAgain(str(error) or type(error).__name__, unreachable=lost) from error
        if response.status_code == 429 or response.status_code >= 500:
            raise TryAgain(f"status {response.status_code}", wait=read_retry_after(response.headers.get("Retry-After")))
        if response.status_code != 200:
            key = self._key()
            said = read_refusal(content).replace(key, "***") if key else read_refusal(content)
            raise ValueError(f"HttpChat: {self.url} refused the request with status {response.status_code}: {said}")
        return read_answer(content)

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"HttpChat: the environment variable {self.api_key_env} holds characters that no key can have; set it "
                "again"
            )
        return key

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"} if (key := self._key()) else {}

    def _is_url(self) -> bool:
        try:
            url = self._httpx.URL(self.url)
        except self._httpx.InvalidURL:
            return False
        return url.scheme in ("http", "https") and bool(url.host)


class LocalChat(ChatClient):
    """Asks a local model with a chat template, in this process, on the current CUDA device if there is one.

    The model never learns.

    Args:
        policy: ``tiny``, ``tiny-addition``, a Hugging Face folder, a GGUF file or a hub id.
        max_completion_length: tokens of an answer. A conversation that leaves no room for that many gets None.
        temperature: 0 = greedy. Above 0 the answer is sampled with a seed made from the conversation, so it repeats.

    Raises:
        ValueError: there is no such model, or it has no chat template.
    """

    def __init__(self, policy: str, max_completion_length: int = 512, temperature: float = 0.0) -> None:
        super().__init__()
        self.sampling = Sampling(temperature=temperature, max_completion_length=max_completion_length)
        self.policy = Policy(policy, dropout=False).requires_grad_(False).eval()
        if self.policy.tokenizer.chat_template is None:
            raise ValueError(
                f"LocalChat: '{policy}' has no chat template (a base model?), so it cannot be asked; name a chat model"
            )
        self.engine = InProcessEngine()
        self.identity = f"{policy} {json.dumps(self.sampling.identity())}"

    def complete(self, conversations: Sequence[Conversation]) -> list[str | None]:
        """Sample one answer to each conversation."""
        if torch.cuda.is_available():
            self.policy.to(torch.device("cuda"))
        tokenizer, positions = self.policy.tokenizer, self.policy.max_positions
        texts = [
            str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            for messages in conversations
        ]
        prompts = [list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in texts]
        room = math.inf if positions is None else positions - self.sampling.max_completion_length
        fitting = [index for index, prompt in enumerate(prompts) if len(prompt) <= room]
        self.engine.sync_weights(self.policy, 0)
        seeds = [zlib.crc32(texts[index].encode()) for index in fitting]
        groups = self.engine.generate([prompts[index] for index in fitting], 1, self.sampling, seeds)
        answers: list[str | None] = [None] * len(prompts)
        for index, (completion,) in zip(fitting, groups, strict=True):
            answers[index] = completion.text
            self.counts["prompt_tokens"] += len(prompts[index])
            self.counts["completion_tokens"] += len(completion.token_ids)
        self.counts["requests"] += len(fitting)
        self.counts["failed"] += len(prompts) - len(fitting)
        return answers


def require_package(module: str) -> ModuleType:
    """Import an optional library only when it is needed.

    Raises:
        ImportError: the library is not installed; the message names the extra that brings it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{module} is not installed: pip install 'lightning-align[judge]'") from error
