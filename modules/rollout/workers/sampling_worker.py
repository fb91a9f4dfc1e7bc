"""Samples in a process of its own, for ``WorkerEngine``, from weights in memory that it shares with the trainer.

A request is a line with the name of a method of ``Servant`` and a number of bytes, and as many bytes: a pickle of its
arguments. Answers are lines of JSON: {"done": name, ...} for each request but ``release``, with "refused" and why where
the request is at fault, with "failed" and why where the process is; and {"alive": count} whenever work has gone on.
"""

import json
import mmap
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modules.rollout.engine import InProcessEngine
from modules.rollout.sampling import Ledger, Sampling
from modules.rollout.syncing import checksum, name_weights, probe_logprobs
from modules.rollout.workers.shared_weights import MemoryPlace, view_weight
from modules.types import Completion

PULSE = 0.5  # seconds between two looks at whether work goes on and the parent lives


@dataclass(frozen=True)
class Blueprint:
    """What a worker needs to build the model that it samples from, without any weight."""

    config: PreTrainedConfig
    attention: str | None  # implementation, which the config does not hold when it is pickled
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: frozenset[int]
    max_positions: int | None
    engine: InProcessEngine  # not synced
    places: dict[str, MemoryPlace]  # of each weight, by name
    device: torch.device
    probe: list[list[int]]
    threads: int
    matmul_precision: str  # torch.get_float32_matmul_precision() of the trainer


@dataclass(frozen=True)
class PolicyCopy:
    """The part of a policy that an engine reads."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: frozenset[int]
    max_positions: int | None


def build_model(blueprint: Blueprint, weights: dict[str, Tensor]) -> PreTrainedModel:
    """Build the model around these weights, which it does not copy.

    Raises:
        ValueError: they are not the weights of the model that the config describes.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            blueprint.config, dtype=torch.float32, attn_implementation=blueprint.attention
        )
    found = model.load_state_dict(weights, strict=False, assign=True)
    for name in found.unexpected_keys:  # buffers that no checkpoint holds
        module, _, own = name.rpartition(".")
        model.get_submodule(module).register_buffer(own, weights[name], persistent=False)
    model.tie_weights()
    lost = [name for name, weight in name_weights(model) if weight.is_meta]
    if lost:
        raise ValueError(f"the policy has no weight {lost[0]}, which a {type(model).__name__} of its config needs")
    model.requires_grad_(False)
    return model.eval()


class Servant:
    """Does what the trainer asks for.

    Args:
        memory: file descriptor of the shared memory.
    """

    def __init__(self, memory: int) -> None:
        self.memory = mmap.mmap(memory, 0, access=mmap.ACCESS_READ)
        self.work = 0  # weights that were checked

    def build(self, blueprint: Blueprint) -> dict[str, Any]:
        """Build the model."""
        torch.set_num_threads(blueprint.threads)
        torch.set_float32_matmul_precision(blueprint.matmul_precision)
        self.blueprint, self.engine = blueprint, blueprint.engine
        self.weights = {name: view_weight(self.memory, place) for name, place in blueprint.places.items()}
        device = blueprint.device
        model = build_model(blueprint, {name: weight.to(device) for name, weight in self.weights.items()})
        self.policy = PolicyCopy(model, blueprint.tokenizer, blueprint.stop_token_ids, blueprint.max_positions)
        return {}

    def sync(self, version: int) -> dict[str, Any]:
        """Take the weights that now lie in the shared memory, and tell what the model is made of and computes."""
        model, found = self.policy.model, {}
        for name, weight in name_weights(model):
            if weight.device.type != "cpu":
                weight.data.copy_(self.weights[name])
            found[name] = checksum(weight)
            self.work += 1
        self.engine.sync_weights(self.policy, version)
        self.version, self.is_released = version, False
        return {"version": version, "checksums": found, "probe": probe_logprobs(model, self.blueprint.probe)}

    def generate(
        self,
        prompts: list[list[int]],
        num_generations: int,
        sampling: Sampling,
        seeds: list[int],
        started: list[Completion] | None,
    ) -> dict[str, Any]:
        """Sample completions, see ``InProcessEngine.generate``."""
        if self.is_released:
            self.engine.sync_weights(self.policy, self.version)
            self.is_released = False
        groups = self.engine.generate(prompts, num_generations, sampling, seeds, started=started)
        return {"groups": [[vars(each) for each in group] for group in groups], "stats": self.engine.last_stats}

    def release(self) -> None:
        """Give back the memory that only sampling needs."""
        self.engine.release()
        self.is_released = True


class Link:
    """The pipes to the trainer.

    Args:
        parent: number of the trainer's process.
    """

    def __init__(self, parent: int) -> None:
        self.parent, self.requests, self.replies = parent, sys.stdin.buffer, os.dup(1)
        os.dup2(2, 1)  # what libraries print is no answer
        self.lock = threading.Lock()

    def read(self) -> Iterator[tuple[str, bytes]]:
        """Return the requests until the trainer closes the pipe."""
        while line := self.requests.readline():
            name, size = line.decode().split()
            yield name, self.requests.read(int(size))

    def reply(self, answer: dict[str, Any]) -> None:
        """Send an answer."""
        rest = memoryview(json.dumps(answer).encode() + b"\n")
        with self.lock:
            while rest:
                rest = rest[os.write(self.replies, rest) :]

    def show_pulse(self, servant: Servant, busy: threading.Event) -> None:
        """Tell, while it is busy, whenever work has gone on; end the process when the trainer is gone."""
        told = -1
        while os.getppid() == self.parent:
            threading.Event().wait(PULSE)
            done = servant.work + Ledger.total_draws
            if busy.is_set() and done != told:
                told = done
                self.reply({"alive": done})
        os._exit(1)


def serve_trainer(parent: int, memory: int, number: int) -> None:
    """Answer requests until the trainer closes the pipe or is gone.

    Args:
        parent: number of the trainer's process.
        memory: file descriptor of the shared memory.
        number: of the worker; only the first shows its warnings, as all have the same.
    """
    if number > 0:
        warnings.simplefilter("ignore")
    link, servant, busy = Link(parent), Servant(memory), threading.Event()
    threading.Thread(target=link.show_pulse, args=(servant, busy), daemon=True).start()
    try:
        for name, data in link.read():
            busy.set()
            try:
                answer = getattr(servant, name)(**pickle.loads(data))
            except ValueError as error:
                answer = {"refused": str(error)}
            except Exception as error:
                answer = {"failed": f"{type(error).__name__}: {error}"}
            busy.clear()
            if answer is not None:
                link.reply({"done": name} | answer)
    except BrokenPipeError:
        pass
    os._exit(0)
