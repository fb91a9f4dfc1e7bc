"""An engine that samples with a vLLM server, which has an environment of its own: no module of vLLM is imported here."""

import os
import threading
import time
import warnings
import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from math import isfinite
from typing import Any, Literal

import torch

from modules.rollout.engine import RolloutEngine, check_request, watch_thoughts
from modules.rollout.sampling import NOT_FINITE, SampledPolicy, Sampling, cut_stop, silent_tokens, special_stops
from modules.rollout.syncing import (
    GAP_16,
    check_probe,
    checksum,
    find_bound,
    merged_weights,
    probe_logprobs,
    probe_rows,
)
from modules.rollout.vllm.vllm_client import ServerLost, ServerRefused, VLLMClient
from modules.rollout.vllm.vllm_server import (
    ServerSettings,
    VLLMServer,
    check_arguments,
    clean_environment,
    end_watcher,
    find_environment,
    start_watcher,
)
from modules.rollout.vllm.vllm_thoughts import sample_thoughts
from modules.rollout.vllm.weight_folder import WeightFolder
from modules.trainer.seeds import derive_seed
from modules.types import Completion, EngineError

REQUESTS = 256  # most requests that wait for the server at a time; each may ask for several completions
BEAT = 1.0  # seconds between two looks at a server that has not answered
RESTARTS = 2  # most restarts of the server within one call
RESETS = 50  # tries to clear the prefix cache, 0.1 s apart
LEAST_TEMPERATURE = 0.01  # vLLM raises lower ones to it


class VLLMEngine(RolloutEngine):
    """Samples with a vLLM server on this machine, which gets new weights through files in memory.

    The server is a child process in an environment of its own (``make vllm-env``), or one that runs already. It starts
    with random weights. A sync pauses it, sends the weights (adapters merged), gives them a version, clears the prefix
    cache and resumes. Then the log-probs of fixed sequences must agree with the policy's: within 1e-4 nats in float32,
    within 0.1 in bfloat16 or if the policy has 16 bits. Otherwise the run ends, and nothing is sampled.

    A server that dies, or that makes no progress for ``timeout`` seconds, is started again with the same weights. Prompts
    without an answer are then sampled again with their seeds. Seeds belong to vLLM's own random numbers: they repeat its
    samples, and give others than ``InProcessEngine``. A completion that goes on from a beginning of t tokens has the
    seed made from its own and t, so it is not what an unbroken one would be.

    Only the transfer of weights by files is built: vLLM's ``nccl`` and ``ipc`` need GPUs, and were not run. Several
    ranks each start a server of their own. What was run here was vLLM 0.32 on CPUs; nothing of it on a GPU.

    Args:
        python: interpreter of an environment with vLLM; a relative path starts in this folder, or else in that of the
            program.
        url: of a server that runs already, such as ``http://127.0.0.1:8000``; None = start one. It needs the options and
            the variables that the first line of an own server's log shows, and must see the same files.
        dtype: of the server's weights and computation.
        max_model_len: tokens of prompt and completion together; None = the model's positions.
        cache_gb: > 0, GiB that the server keeps for keys and values.
        teardown: what happens behind the sampling of a phase. ``each_phase`` ends the server and starts it again for the
            next one, as Kimi k1.5 does; ``sleep`` frees a GPU's memory and needs one; ``at_end`` leaves the server alone.
        max_staleness: >= 0, see ``RolloutEngine``.
        timeout: > 0, seconds without progress after which the server counts as hung.
        arguments: further options of ``vllm serve``, such as ``--tensor-parallel-size 2`` as two items.

    Attributes:
        last_stats: of the last ``generate``: ``requests``, ``tokens``, ``restarts`` of the server, and
            ``sync_seconds``, what the last sync took, the start of a server included.

    Raises:
        ValueError: a setting is impossible, or there is no such interpreter, or it has no vLLM.
        RuntimeError: later: the server does not start, cannot be reached, refuses an update, or computes other log-probs
            than the policy.
    """

    copies_weights = limits_segments = limits_thoughts = True

    def __init__(
        self,
        python: str = ".venv-vllm/bin/python",
        url: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        max_model_len: int | None = None,
        cache_gb: float = 1.0,
        teardown: Literal["at_end", "each_phase", "sleep"] = "at_end",
        max_staleness: int = 0,
        timeout: float = 300.0,
        arguments: tuple[str, ...] = (),
    ) -> None:
        checks = {
            f"max_model_len {max_model_len} must be >= 2": max_model_len is None or max_model_len >= 2,
            f"cache_gb {cache_gb} must be > 0": (cache_gb or 0) > 0,
            f"max_staleness {max_staleness} must be >= 0": isinstance(max_staleness, int) and max_staleness >= 0,
            f"timeout {timeout} must be > 0 seconds": (timeout or 0) > 0,
            f"teardown {teardown} must be at_end where url names a server of yours": url is None
            or teardown == "at_end",
            "arguments are those of a server that the engine starts; leave them or url out": not (url and arguments),
        }
        problems = [problem for problem, fine in checks.items() if not fine]
        if problems:
            raise ValueError("VLLMEngine: " + "; ".join(problems))
        check_arguments(arguments)
        self.max_staleness, self.timeout, self.teardown = max_staleness, timeout, teardown
        self.max_model_len, self.last_stats = max_model_len, {}
        self._settings = ServerSettings(python, dtype, max_model_len, cache_gb, teardown == "sleep", tuple(arguments))
        self._attached = VLLMClient(url) if url is not None else None
        self._environment = find_environment(python) if url is None else None
        if self._environment is not None and self._environment.on_cpu and teardown == "sleep":
            raise ValueError("VLLMEngine: teardown sleep needs a GPU, and vLLM is built for CPUs; use each_phase")
        self._weights = WeightFolder(getattr(torch, dtype))
        self._server: VLLMServer | None = None
        self._policy: SampledPolicy | None = None
        self._synced: tuple[int, dict[str, str]] | None = None  # version and checksums of the weights in the files
        self._probe: tuple[list[list[int]], list[list[float]], float] | None = None
        self._ready = False  # whether the server has these weights
        self._asleep = False
        self._dead = ""  # why nothing may be sampled any more
        self._closing = False
        self._updates = 0
        self._end_watcher: Callable[[], object] | None = None  # of what removes the files for a server of the user's
        self._lock = threading.Lock()  # held by a sync and by a sampling call; other threads may sample

    def __deepcopy__(self, memo: dict[int, Any]) -> "VLLMEngine":
        """Return the engine itself: a copy of a module shares the server."""
        return self

    def sync_weights(self, policy: SampledPolicy, version: int) -> None:
        """Give the server the policy's weights, unless it has them; it waits for a ``generate`` that runs.

        Raises:
            RuntimeError: see the class.
        """
        with self._lock:
            self._closing = False
            self._refuse_dead()
            start = time.perf_counter()
            found = (version, {name: checksum(weight) for name, weight in merged_weights(policy)})
            if self._ready and found == self._synced and self._alive:
                self._policy = policy
                return
            self._ready = False
            limit = policy.max_positions if self.max_model_len is None else self.max_model_len
            rows = probe_rows(policy.model.config.vocab_size, None if limit is None else limit - 1)
            bound = find_bound(policy.model) if self._settings.dtype == "float32" else GAP_16
            expected = probe_logprobs(policy.model, rows)
            if not all(isfinite(value) for row in expected for value in row):
                raise ValueError(NOT_FINITE)
            self._weights.write(policy)
            self._policy, self._synced, self._probe = policy, found, (rows, expected, bound)
            self._update()
            self.last_stats["sync_seconds"] = time.perf_counter() - start

    def generate(
        self,
        prompts: list[list[int]],
        num_generations: int,
        sampling: Sampling,
        seeds: list[int],
        started: Sequence[Completion] | None = None,
    ) -> list[list[Completion]]:
        """Sample completions; see ``RolloutEngine.generate``. Any thread may call it.

        Args:
            prompts: token ids of each prompt.
            num_generations: completions per prompt.
            sampling: how tokens are drawn, and how many of a completion in this call (``partial``).
            seeds: one per prompt.
            started: one per completion, prompt by prompt: its beginning, which may be empty; see the class.

        Raises:
            ValueError: the request is impossible.
            RuntimeError: the server is lost for good.
        """
        with self._lock:
            if self._policy is None or self._synced is None:
                raise ValueError("VLLMEngine: call sync_weights(policy, version) before generate")
            self._refuse_dead()
            if not self._ready:
                raise ValueError("VLLMEngine: it has given its memory back; call sync_weights before generate")
            check_request(self._policy, prompts, num_generations, sampling, seeds, started)
            self._check_sampling(prompts, sampling)
            self.last_stats |= {"requests": 0, "tokens": 0, "restarts": 0}
            thoughts = watch_thoughts(self._policy, prompts, num_generations, sampling, seeds, torch.device("cpu"))
            if thoughts is None:
                completions = self._sample(prompts, num_generations, sampling, seeds, started)
            else:
                length, number = sampling.max_completion_length, num_generations * len(prompts)
                rows = [prompt for prompt in prompts for _ in range(num_generations)]
                own = [seed + g for seed in seeds for g in range(num_generations)]

                def ask(
                    requests: Sequence[int], begun: Sequence[Completion], limits: Sequence[int]
                ) -> list[Completion]:
                    asked = [rows[each] for each in requests], 1, sampling, [own[each] for each in requests]
                    return self._sample(*asked, begun, limits)

                completions = sample_thoughts(thoughts, number, length, ask)
        return [completions[at : at + num_generations] for at in range(0, len(completions), num_generations)]

    def release(self) -> None:
        """End the server, or let it sleep, until the next sync, as ``teardown`` says."""
        if self.teardown == "at_end":
            return
        with self._lock:
            if self.teardown == "each_phase":
                self._stop()
                self._weights.close()
            elif self._ready and self._server is not None:
                self._call("/sleep?level=2")
                self._asleep = True
            self._ready = False

    def close(self) -> None:
        """End the server that the engine started; a ``generate`` in another thread breaks off. A sync starts it again."""
        self._closing = True
        if self._server is not None:
            self._server.stop()
        if self._attached is not None:
            self._attached.abandon()
        with self._lock:
            self._stop()
            if self._end_watcher is not None:
                self._end_watcher()
                self._end_watcher = None
            self._ready = False
            self._weights.close()

    @property
    def _client(self) -> VLLMClient:
        client = self._attached or (self._server.client if self._server is not None else None)
        assert client is not None
        return client

    def _call(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        return self._client.call(path, body, method, seconds=self.timeout)

    @property
    def _alive(self) -> bool:
        return self._attached is not None or (self._server is not None and self._server.alive)

    @property
    def _tag(self) -> str:
        """What the server calls its weights: their version, and the number of the update, as two may share a version."""
        return f"{self._synced[0] if self._synced is not None else 0}.{self._updates}"

    def _refuse_dead(self) -> None:
        if self._dead:
            raise EngineError(f"VLLMEngine: nothing can be sampled any more: {self._dead}")

    def _stop(self, keep_log: bool = False) -> None:
        if self._server is not None:
            self._server.stop(keep_log)
            self._server = None
        self._asleep = False

    def _update(self) -> None:
        """Give the weights in the files to the server, which is started first if there is none.

        A server that dies meanwhile is started once more. After any other failure the engine is dead.
        """
        self._updates += 1
        for last in (False, True):
            try:
                self._connect()
                self._send()
                self._ready = True
                return
            except ServerLost as error:
                if last or error.answered or self._attached is not None:
                    self._give_up(f"the update of its weights failed ({error})", error)
                self._stop(keep_log=True)
            except ServerRefused as error:
                self._give_up(f"it refused the update of its weights ({error})", error)
            except RuntimeError as error:
                self._give_up(str(error).removeprefix("VLLMEngine: "), error)

    def _give_up(self, reason: str, error: Exception) -> None:
        """End the server, whose weights are unknown, and sample no more.

        Raises:
            RuntimeError: always.
        """
        said = f"; {self._server.tell_log()}" if self._server is not None and isinstance(error, ServerLost) else ""
        self._dead, self._ready = reason, False
        self._stop(keep_log=True)
        raise EngineError(f"VLLMEngine: {reason}{said}") from error

    def _connect(self) -> None:
        """Start a server, or greet the one that is there, unless that was done."""
        if self._attached is not None:
            if self._end_watcher is None:
                self._attached.model = greet(self._attached)
                watcher = start_watcher(None, self._weights.path, [], clean_environment(), None)
                self._end_watcher = weakref.finalize(self, end_watcher, watcher, os.getpid())
        elif self._server is None or not self._server.alive:
            self._stop(keep_log=True)
            assert self._environment is not None and self._policy is not None
            self._server = VLLMServer(self._settings, self._environment, self._policy, self._weights.path)
            self._call("/init_weight_transfer_engine", {"init_info": {}})

    def _send(self) -> None:
        """Send the weights in four phases, while the server is paused, and compare what it computes with them."""
        if self._asleep:
            self._call("/wake_up?tags=weights")
        self._call("/pause?mode=wait")
        self._call("/start_weight_update")
        for file in self._weights.files:
            self._call("/update_weights", {"update_info": {"path": str(file)}})
        self._call("/finish_weight_update", {"weight_version": self._tag})
        if self._asleep:
            self._call("/wake_up?tags=kv_cache")
            self._asleep = False
        for attempt in range(RESETS):
            if self._call("/reset_prefix_cache")["success"]:
                break
            if attempt == RESETS - 1:
                raise ServerLost("its prefix cache is still in use, so it holds keys of older weights", answered=True)
            time.sleep(0.1)
        self._call("/resume")
        self._check_version()
        assert self._probe is not None
        rows, expected, bound = self._probe
        check_probe(expected, [self._score(row) for row in rows], bound, "VLLMEngine: the server")

    def _check_version(self) -> None:
        """Check that the server's weights are those of the last update.

        Raises:
            RuntimeError: they are others.
        """
        version = self._call("/weight_info", method="GET")["weight_version"]
        if version != self._tag:
            raise EngineError(
                f"VLLMEngine: the server has weights of version {version}, not {self._tag}: something else updates it; "
                "use a server that belongs to this run alone"
            )

    def _score(self, row: list[int]) -> list[float]:
        """Return the server's log-prob of each token of a sequence but the first."""
        asked = {"model": self._client.model, "prompt": row, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        answer = self._call("/v1/completions", asked | {"add_special_tokens": False})
        scores = answer["choices"][0]["prompt_logprobs"][1:]
        return [float(score[str(token)]["logprob"]) for score, token in zip(scores, row[1:], strict=True)]

    def _check_sampling(self, prompts: list[list[int]], sampling: Sampling) -> None:
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"VLLMEngine: vLLM samples no temperature between 0 and {LEAST_TEMPERATURE}, got {sampling.temperature}"
            )
        longest = max(map(len, prompts), default=0) + sampling.max_completion_length
        if self.max_model_len is not None and longest > self.max_model_len:
            raise ValueError(
                f"VLLMEngine: the longest prompt and max_completion_length make {longest} tokens, max_model_len is "
                f"{self.max_model_len}; raise it or shorten either"
            )

    def _sample(
        self,
        prompts: list[list[int]],
        num_generations: int,
        sampling: Sampling,
        seeds: list[int],
        started: Sequence[Completion] | None,
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Return the completions of all prompts; ``limits`` bounds the tokens that each gets behind its beginning."""
        bodies = self._bodies(prompts, num_generations, sampling, seeds, started)
        for body, limit in zip(bodies, limits or (), strict=False):
            body["max_tokens"] = min(body["max_tokens"], limit)
        answers, restarts = self._answer_all(bodies)
        sampled = sum(len(choice["token_ids"]) for answer in answers for choice in answer)
        if started is None:
            answers = [answer * (num_generations // len(answer)) for answer in answers]
        for name, value in {"requests": len(bodies), "tokens": sampled, "restarts": restarts}.items():
            self.last_stats[name] += value
        return [
            self._read(choice, sampling, None if started is None else started[place])
            for place, choice in enumerate(choice for answer in answers for choice in answer)
        ]

    def _bodies(
        self,
        prompts: list[list[int]],
        num_generations: int,
        sampling: Sampling,
        seeds: list[int],
        started: Sequence[Completion] | None,
    ) -> list[dict[str, Any]]:
        """Return the requests: one per prompt, or one per completion where they go on from beginnings."""
        assert self._policy is not None
        special = special_stops(self._policy, sampling)
        texts = {self._policy.tokenizer.convert_ids_to_tokens(token) for token in special}
        common = {
            "model": self._client.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop": [stop for stop in sampling.stop if stop not in texts],
            # The end tokens are the policy's, not those of the server's own config.
            "ignore_eos": True,
            "stop_token_ids": sorted(special | self._policy.stop_token_ids),
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "add_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }
        length = sampling.max_completion_length
        budget = length if sampling.partial is None else sampling.partial.tokens_per_phase
        if started is None:
            alike = 1 if sampling.temperature == 0 else num_generations  # vLLM gives one greedy completion a request
            return [
                common | {"prompt": prompt, "n": alike, "seed": fold_seed(seed), "max_tokens": min(budget, length)}
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
        bodies = []
        for place, beginning in enumerate(started):
            row, number = divmod(place, num_generations)
            count, seed = len(beginning.token_ids), seeds[row] + number
            seed = fold_seed(derive_seed(seed, "started", str(count)) if count else seed)
            prompt = prompts[row] + beginning.token_ids
            bodies.append(common | {"prompt": prompt, "n": 1, "seed": seed, "max_tokens": min(budget, length - count)})
        return bodies

    def _answer_all(self, bodies: list[dict[str, Any]]) -> tuple[list[list[dict[str, Any]]], int]:
        """Return the choices of every request, and how often the server was started again for them.

        Raises:
            ValueError: the server refuses a request, or its logits are not finite.
            RuntimeError: the server is lost for good.
        """
        answers: dict[int, list[dict[str, Any]]] = {}
        for restarts in range(RESTARTS + 1):
            try:
                self._ask({place: body for place, body in enumerate(bodies) if place not in answers}, answers)
                self._check_version()
                return [answers[place] for place in range(len(bodies))], restarts
            except ServerRefused as error:
                raise ValueError(f"VLLMEngine: the server refused a request: {error}") from error
            except ServerLost as error:
                if self._closing:
                    raise EngineError("VLLMEngine: it was closed while it sampled") from error
                if restarts == RESTARTS or self._attached is not None:
                    self._give_up(f"the server is lost ({error})", error)
                log = self._server.log if self._server is not None else None
                warnings.warn(
                    f"VLLMEngine: the server is lost ({error}); it is started again, and {len(bodies) - len(answers)} "
                    f"of {len(bodies)} requests are sampled again with the same seeds; the log of the lost one is {log}",
                    stacklevel=3,
                )
                self._stop(keep_log=True)
                self._update()
        raise AssertionError

    def _ask(self, bodies: dict[int, dict[str, Any]], answers: dict[int, list[dict[str, Any]]]) -> None:
        """Send requests side by side, and put the choices of each into ``answers``.

        Raises:
            ServerLost: the server dies, hangs or answers garbage; ``answers`` has what came before.
            ServerRefused: it refuses a request.
        """
        client, pool = self._client, ThreadPoolExecutor(max(1, min(REQUESTS, len(bodies))))
        futures: dict[Future[Any], int] = {
            # The watch below limits the time, by progress, and breaks the connections off.
            pool.submit(client.call, "/v1/completions", body, seconds=1e6): place
            for place, body in bodies.items()
        }
        waiting, moved, seen = set(futures), time.monotonic(), -1.0
        try:
            while waiting:
                done, waiting = wait(waiting, BEAT, FIRST_EXCEPTION)
                for future in done:
                    place = futures[future]
                    answers[place] = read_choices(future.result(), bodies[place])
                tokens = self._count_tokens(client) if waiting and not done else -1.0
                if done or tokens > seen:
                    moved, seen = time.monotonic(), max(tokens, seen)
                elif time.monotonic() - moved > self.timeout:
                    raise ServerLost(f"it has made no progress for {self.timeout:g} s")
        finally:
            if waiting:
                client.abandon()
            pool.shutdown(wait=True, cancel_futures=True)

    def _count_tokens(self, client: VLLMClient) -> float:
        """Return the server's count of tokens; -1 if it does not tell."""
        try:
            return client.count_tokens(min(10.0, self.timeout))
        except ServerLost:
            return -1.0

    def _read(self, choice: dict[str, Any], sampling: Sampling, beginning: Completion | None) -> Completion:
        """Return a completion as the in-process engine would record these tokens."""
        assert self._policy is not None and self._synced is not None
        policy, version = self._policy, self._synced[0]
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        before = beginning.token_ids if beginning is not None else []
        special = special_stops(policy, sampling)
        silent = silent_tokens(policy) | (set() if sampling.keep_stop else special)

        def decode(ids: list[int]) -> str:
            return str(policy.tokenizer.decode([token for token in ids if token not in silent]))

        tokens = before + tokens
        stopped = choice["finish_reason"] == "stop"
        if any(stop in decode(tokens) for stop in sampling.stop):
            # The server may not have seen a stop string that the beginning begins, and so went on behind it.
            count = 1 + bisect_left(
                range(1, len(tokens) + 1), True, key=lambda n: any(stop in decode(tokens[:n]) for stop in sampling.stop)
            )
            tokens, stopped = tokens[:count], True
        scores = [*(beginning.logprobs if beginning is not None else []), *logprobs][: len(tokens)]
        found = Completion(tokens, scores, cut_stop(decode(tokens), sampling), "stop" if stopped else "length", version)
        if beginning is None:
            return found
        return replace(found, versions=[*beginning.token_versions, *[version] * (len(tokens) - len(before))])


def greet(client: VLLMClient) -> str:
    """Prepare a server that runs already, and return the name of its model.

    Raises:
        RuntimeError: it cannot be reached, is not set up for updates, belongs to several ranks, or samples otherwise than
            it says.
    """
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise EngineError(
            "VLLMEngine: url names one server, and each of several ranks would give it weights; leave url out, so that "
            "each rank starts its own"
        )
    try:
        name = client.call("/v1/models", method="GET")["data"][0]["id"]
        config = client.call("/server_info?config_format=json", method="GET")["vllm_config"]["model_config"]
        client.call("/init_weight_transfer_engine", {"init_info": {}})
        client.call("/collective_rpc", {"method": "tell_device"})
    except (ServerLost, ServerRefused, KeyError, TypeError) as error:
        raise EngineError(
            f"VLLMEngine: the server at {client.url} is not there, or not set up for updates of its weights ({error}); "
            "leave url out, or start the server as the class VLLMEngine says"
        ) from error
    wanted = {"logprobs_mode": "processed_logprobs", "max_logprobs": -1, "generation_config": "vllm"}
    wrong = [
        f"{option} {config.get(option)}, not {value}" for option, value in wanted.items() if config.get(option) != value
    ]
    if wrong:
        raise EngineError(f"VLLMEngine: the server at {client.url} has {'; '.join(wrong)}; start it with these options")
    return str(name)


def fold_seed(seed: int) -> int:
    """Return a seed of 32 bits, as many as torch's generator reads on CPU, in which all bits of ``seed`` count.

    Seeds that follow each other still do, so that completion g has the seed of ``seed + g``.

    >>> fold_seed(5), fold_seed(2**40 + 6) - fold_seed(2**40 + 5)
    (5, 1)
    """
    high = seed >> 32
    return (seed + (derive_seed(high, "high bits", "") if high else 0)) % 2**32


def read_choices(answer: Any, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the choices of an answer to a request in the order of their seeds.

    Raises:
        ServerLost: it is no answer to this request.
        ValueError: the logits were not finite.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        fine = [choice["index"] for choice in choices] == list(range(body["n"]))
        for choice in choices:
            tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            fine = (
                fine and choice["prompt_token_ids"] == body["prompt"] and choice["finish_reason"] in ("stop", "length")
            )
            fine = fine and 1 <= len(tokens) == len(logprobs) <= body["max_tokens"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ServerLost(f"the answer lacks {error}") from error
    if not fine:
        raise ServerLost("the answer belongs to another request")
    values = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
    if not all(value is not None and -9999.0 < value <= 1e-3 for value in values):
        raise ValueError(NOT_FINITE)
    return choices
