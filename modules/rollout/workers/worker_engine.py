"""Samples in worker processes, which read one copy of the weights from memory that they share."""

import math
import os
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modules.rollout.engine import InProcessEngine, RolloutEngine, check_request
from modules.rollout.sampling import SampledPolicy, Sampling
from modules.rollout.syncing import (
    check_checksums,
    check_probe,
    find_bound,
    merged_weights,
    name_weights,
    probe_logprobs,
    probe_rows,
    transient_buffers,
)
from modules.rollout.workers.crew import Assignment, Crew
from modules.rollout.workers.sampling_worker import Blueprint
from modules.rollout.workers.shared_weights import SharedWeights
from modules.types import Completion

SCRIPT = Path(__file__).with_name("start_worker.py")


class WorkerEngine(RolloutEngine):
    """Samples in worker processes, each with an ``InProcessEngine``, from one copy of the weights that they share.

    A worker builds the model from its config and reads no checkpoint. The weights, with adapters merged, are written one
    after another into memory that all workers map, so that they are there once for all of them. After each
    ``sync_weights`` every worker answers with the checksum of each of its weights and the log-probs of a few fixed
    sequences, which must be those of the policy. Kimi's engine starts and ends likewise (2501.12599, 2.6.3).

    All completions of a prompt are sampled by the same worker. Which one depends on lengths alone. A worker that ends,
    hangs or answers nonsense is replaced, and the new one samples its prompts again with the same seeds.

    On a machine without a GPU workers bring isolation, and sampling beside the training, but no speed: they share the
    cores.

    Args:
        workers: >= 1, processes.
        engine: samples in each worker; default with the settings of ``InProcessEngine``.
        teardown: ``at_end`` keeps the workers; ``each_phase`` ends them when a phase or an evaluation is sampled, which
            gives all their memory back and costs their start in the next one.
        timeout: >= 1, seconds that a worker may go on without a token or a checked weight before it counts as hung.
        max_staleness: see ``RolloutEngine``.

    Attributes:
        last_stats: sums of the workers' numbers of the last ``generate`` (of ``decode_steps`` the largest, of
            ``occupancy`` the mean); ``sync_seconds`` of the last ``sync_weights``; ``tail_seconds`` from the first worker
            that was done to the last; ``replaced``, workers since the ``generate`` before.
        command: what a worker runs.

    Raises:
        ValueError: a value is out of range, or settings contradict each other.
    """

    limits_thoughts = limits_segments = True
    copies_weights = True
    command: Sequence[str] = (sys.executable, "-P", str(SCRIPT))

    def __init__(
        self,
        workers: int = 2,
        engine: InProcessEngine | None = None,
        teardown: Literal["at_end", "each_phase"] = "at_end",
        timeout: float = 300.0,
        max_staleness: int = 0,
    ) -> None:
        checks = {
            f"workers {workers} must be a whole number >= 1": isinstance(workers, int) and workers >= 1,
            f"teardown {teardown!r} must be at_end or each_phase": teardown in ("at_end", "each_phase"),
            f"timeout {timeout} must be a finite number of seconds >= 1": isinstance(timeout, int | float)
            and 1 <= timeout < math.inf,
            f"max_staleness {max_staleness} must be >= 0": isinstance(max_staleness, int) and max_staleness >= 0,
            "teardown each_phase ends the workers that max_staleness lets sample beside the training: set one of them": (
                teardown == "at_end" or (max_staleness or 0) <= 0
            ),
            "it needs Linux or macOS": os.name == "posix",
        }
        problems = [problem for problem, fine in checks.items() if not fine]
        if problems:
            raise ValueError("WorkerEngine: " + "; ".join(problems))
        self.workers, self.teardown, self.timeout, self.max_staleness = workers, teardown, timeout, max_staleness
        self.engine = engine or InProcessEngine()
        self.last_stats = {}
        self._lock = threading.RLock()
        self._crew = Crew(workers, timeout, self.command)
        self._policy: SampledPolicy | None = None
        self._anatomy: list[Any] = []  # of the policy's model, as the workers know it
        self._weights: SharedWeights | None = None
        self._version: int | None = None  # that the workers have proved to have
        self._sync_seconds = 0.0
        self._replaced = 0  # before the last ``generate``
        weakref.finalize(self, self._crew.kill)  # also when this process ends

    def __reduce__(self) -> Any:
        """Copy and pickle the settings alone."""
        return type(self), (self.workers, self.engine, self.teardown, self.timeout, self.max_staleness)

    def sync_weights(self, policy: SampledPolicy, version: int) -> None:
        """Write the weights into the shared memory, and have every worker prove that it has them.

        It waits for a ``generate`` of another thread. Workers are started if there are none. Nothing else is done if no
        weight and no version has changed.

        Raises:
            RuntimeError: a worker has another weight than the policy, which is named, or computes other log-probs; or
                workers are lost again and again; or there is no memory for the weights.
            ValueError: a worker cannot sample from the model.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            start = time.perf_counter()
            anatomy = [
                (name, *map(str, (each.shape, each.dtype, each.device))) for name, each in name_weights(policy.model)
            ]
            if self._weights is None or policy is not self._policy or anatomy != self._anatomy:
                self._end()
                self._policy, self._anatomy = policy, anatomy
                self._weights = SharedWeights(list_weights(policy))
                blueprint = self._draw(policy, self._weights)
                self._crew.start(self._weights.file, [Assignment("build", {"blueprint": blueprint}, ignore, "started")])
            before, self._version = self._version, None
            changed = self._weights.write(list_weights(policy))
            if changed or version != before:
                expected = self._weights.checksums, probe_logprobs(policy.model, find_probe(policy))
                take = partial(check_copy, version, *expected, find_bound(policy.model))
                sync = Assignment("sync", {"version": version}, take, "took the weights")
                self._crew.prelude = self._crew.prelude[:1]
                self._crew.run(dict.fromkeys(range(self.workers), sync))
                self._crew.prelude.append(sync)
            self._version = version
            self._sync_seconds = time.perf_counter() - start

    def generate(
        self,
        prompts: list[list[int]],
        num_generations: int,
        sampling: Sampling,
        seeds: list[int],
        started: Sequence[Completion] | None = None,
    ) -> list[list[Completion]]:
        """Sample completions; see ``RolloutEngine.generate``, and ``InProcessEngine.generate`` for ``started``.

        It may run in another thread while the policy trains.

        Raises:
            RuntimeError: workers are lost again and again, or the engine is closed meanwhile.
        """
        with self._lock:
            if self._policy is None or self._version is None:
                raise ValueError("WorkerEngine: call sync_weights(policy, version) before generate")
            check_request(self._policy, prompts, num_generations, sampling, seeds, started)
            budget = num_generations * sampling.max_completion_length
            costs = [len(prompt) + budget for prompt in prompts]
            beginnings: list[list[Completion] | None] = [None] * len(prompts)
            if started is not None:
                groups = [started[i * num_generations : (i + 1) * num_generations] for i in range(len(prompts))]
                beginnings = [list(group) for group in groups]
                costs = [c - sum(len(each.token_ids) for each in group) for c, group in zip(costs, groups, strict=True)]
            found: dict[int, list[Completion]] = {}
            stats: list[dict[str, float]] = []
            tasks = {}
            for number, share in enumerate(share_out(costs, self.workers)):
                arguments = {
                    "prompts": [prompts[i] for i in share],
                    "num_generations": num_generations,
                    "sampling": sampling,
                    "seeds": [seeds[i] for i in share],
                    "started": None
                    if started is None
                    else list(chain.from_iterable(beginnings[i] or () for i in share)),
                }
                take = partial(
                    read_groups, share, arguments, self._version, self._policy.model.config.vocab_size, found, stats
                )
                if share:
                    listed = f"{', '.join(map(str, share[:8]))}{', ...' if len(share) > 8 else ''}"
                    tasks[number] = Assignment(
                        "generate", arguments, take, f"sampled prompts {listed} of {len(prompts)}"
                    )
            times = self._crew.run(tasks)
            self.last_stats = join_stats(stats) | {
                "sync_seconds": self._sync_seconds,
                "tail_seconds": max(times, default=0.0) - min(times, default=0.0),
                "replaced": float(self._crew.replaced - self._replaced),
            }
            self._replaced = self._crew.replaced
            return [found[index] for index in range(len(prompts))]

    def release(self) -> None:
        """End the workers, or let them give back what only sampling needs, as ``teardown`` says."""
        with self._lock:
            if self.teardown == "each_phase":
                self._end()
            else:
                self._crew.tell("release")

    def close(self) -> None:
        """End the workers, also while ``generate`` waits for them in another thread, which then raises RuntimeError."""
        self._crew.kill()
        with self._lock:
            self._end()

    def _draw(self, policy: SampledPolicy, weights: SharedWeights) -> Blueprint:
        """Describe the policy without its weights.

        Raises:
            ValueError: a part of it cannot be sent to another process.
        """
        blueprint = Blueprint(
            config=policy.model.config,
            attention=policy.model.config._attn_implementation,
            tokenizer=policy.tokenizer,
            stop_token_ids=policy.stop_token_ids,
            max_positions=policy.max_positions,
            engine=self.engine,
            places=weights.places,
            device=policy.model.device,
            probe=find_probe(policy),
            threads=self._crew.threads,
            matmul_precision=torch.get_float32_matmul_precision(),
        )
        for name, part in vars(blueprint).items():
            try:
                pickle.dumps(part)
            except Exception as error:
                raise ValueError(
                    f"WorkerEngine cannot send the {name} of the policy ({type(part).__name__}) to a worker: {error}; leave "
                    "model.engine out"
                ) from error
        return blueprint

    def _end(self) -> None:
        """End the workers and give the memory of the weights back."""
        self._crew.stop()
        if self._weights is not None:
            self._weights.close()
        self._weights = self._version = None


def list_weights(policy: SampledPolicy) -> Iterator[tuple[str, Tensor]]:
    """Return everything that a copy of the policy's model is made of, by name, one after another."""
    return chain(merged_weights(policy), transient_buffers(policy.model))


def find_probe(policy: SampledPolicy) -> list[list[int]]:
    """Return the sequences that policy and workers are probed with."""
    return probe_rows(policy.model.config.vocab_size, policy.max_positions)


def ignore(answer: dict[str, Any]) -> None:
    """Take an answer that says nothing."""


def check_copy(
    version: int, checksums: Mapping[str, str], probe: list[list[float]], bound: float, answer: dict[str, Any]
) -> None:
    """Check that a worker has the weights of the policy.

    Raises:
        RuntimeError: it has others.
        ValueError: it has those of another version.
    """
    if answer["version"] != version:
        raise ValueError(f"version {answer['version']} of the weights, not {version}")
    check_checksums(checksums, answer["checksums"], "WorkerEngine: a worker")
    check_probe(probe, answer["probe"], bound, "WorkerEngine: a worker")


def share_out(costs: Sequence[int], workers: int) -> list[list[int]]:
    """Give every prompt to a worker, the dearest first, each to the worker that has least (the same for equal costs).

    Args:
        costs: of each prompt, such as tokens.
        workers: how many.

    Returns:
        the prompts of each worker, in order.

    >>> share_out([1, 5, 3, 3], 2)
    [[0, 1], [2, 3]]
    """
    loads, shares = [0] * workers, [[] for _ in range(workers)]  # type: tuple[list[int], list[list[int]]]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        worker = loads.index(min(loads))
        loads[worker] += costs[index]
        shares[worker].append(index)
    return [sorted(share) for share in shares]


def read_groups(
    share: Sequence[int],
    arguments: Mapping[str, Any],
    version: int,
    vocab_size: int,
    found: dict[int, list[Completion]],
    stats: list[dict[str, float]],
    answer: dict[str, Any],
) -> None:
    """Read the completions of a worker into ``found``, by prompt, and its numbers into ``stats``.

    Args:
        share: numbers of its prompts.
        arguments: what it was asked.
        version: of the weights.
        vocab_size: tokens of the model.
        found: the completions of each prompt.
        stats: the numbers of the workers.
        answer: what it said.

    Raises:
        ValueError: these are no completions of what it was asked.
    """
    groups = [[Completion(**each) for each in group] for group in answer["groups"]]
    count, started = arguments["num_generations"], arguments["started"]
    if [len(group) for group in groups] != [count] * len(share):
        raise ValueError(f"{sum(map(len, groups))} completions for {len(share)} x {count}")
    for index, each in enumerate(chain.from_iterable(groups)):
        beginning = started[index].token_ids if started is not None else []
        check_completion(each, beginning, arguments["sampling"].max_completion_length, version, vocab_size)
    numbers = {str(name): float(value) for name, value in answer["stats"].items()}
    found |= dict(zip(share, groups, strict=True))
    stats.append(numbers)


def check_completion(each: Completion, beginning: list[int], longest: int, version: int, vocab_size: int) -> None:
    """Refuse what no engine samples.

    Args:
        each: the completion.
        beginning: tokens that it goes on from.
        longest: most tokens that it may have.
        version: of the weights.
        vocab_size: tokens of the model.

    Raises:
        ValueError: with the first fault.
    """
    ids, size = each.token_ids, len(each.token_ids)
    faults = {
        f"{size} tokens, of at most {longest}": not len(beginning) < size <= longest,
        f"{len(each.logprobs)} log-probs for {size} tokens": len(each.logprobs) != size,
        "tokens that are no numbers": not set(map(type, ids)) <= {int},
        f"tokens outside the vocabulary of {vocab_size}": not all(0 <= token < vocab_size for token in ids),
        "another beginning than it was to go on from": ids[: len(beginning)] != beginning,
        "log-probs that are not finite": not all(map(math.isfinite, each.logprobs)),
        f"tokens of version {each.policy_version}, not {version}": each.policy_version != version
        or set(each.token_versions[len(beginning) :]) != {version}
        or len(each.token_versions) != size,
        f"a marking of {len(each.sampled or ())} tokens for {size}": len(each.sampled or ids) != size,
        f"the finish {each.finish!r}": each.finish not in ("stop", "length"),
        "a text that is none": not isinstance(each.text, str),
    }
    fault = next((fault for fault, wrong in faults.items() if wrong), None)
    if fault is not None:
        raise ValueError(f"a completion has {fault}")


def join_stats(stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Join the numbers of the workers: the largest of ``decode_steps``, the mean of ``occupancy``, sums of the others."""
    names = dict.fromkeys(name for each in stats for name in each)
    columns = {name: [each[name] for each in stats if name in each] for name in names}
    joined = {name: sum(values) for name, values in columns.items()}
    if "decode_steps" in columns:
        joined["decode_steps"] = max(columns["decode_steps"])
    if "occupancy" in columns:
        joined["occupancy"] /= len(columns["occupancy"])
    return joined
