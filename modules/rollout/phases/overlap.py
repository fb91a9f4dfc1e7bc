"""Samples the phases to come in another thread while the policy trains, from weights of a bounded age."""

import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue

import torch
from lightning.pytorch.utilities import rank_zero_warn

from modules.networks.policy import Policy
from modules.rollout.engine import RolloutEngine
from modules.types import Completion, SampledAhead

Groups = list[list[Completion]]
Jobs = SimpleQueue[tuple[Future[Groups], Callable[[], Groups]] | None]  # None = there are no more


def check_overlap(engine: RolloutEngine, environment: object | None) -> None:
    """Refuse to sample ahead where the engine has no weights of its own, or completions call tools.

    Raises:
        ValueError: it is refused; the message says what to change.
    """
    if engine.max_staleness > 0 and not engine.copies_weights:
        raise ValueError(
            f"{type(engine).__name__}: max_staleness is {engine.max_staleness}, and it samples from the policy's own weights "
            "(copies_weights), which change while it would sample: set max_staleness to 0, or name another engine"
        )
    if engine.max_staleness > 0 and environment is not None:
        raise ValueError(
            f"{type(engine).__name__}: max_staleness is {engine.max_staleness}, and completions with tools are not sampled "
            "ahead: set max_staleness to 0 or leave model.environment out"
        )


def refuse_staleness(engine: RolloutEngine, why: str) -> None:
    """Refuse to sample ahead where nothing is sampled to be trained on; ``why`` says so. Raises ValueError."""
    if engine.max_staleness > 0:
        raise ValueError(f"{type(engine).__name__}: max_staleness is {engine.max_staleness}, and {why}: set it to 0")


class Overlap:
    """Asks the engine for phases in time: phase p has the weights with which phase max(0, p - ``max_staleness``) began.

    When a phase is collected, its own completions are there or are waited for, and the completions of the phase that lies
    ``max_staleness`` ahead are asked for from the current weights. So what is sampled depends on no clock. All calls of
    the engine come one after another. With more than one phase under way, a copy of the current weights is kept until
    the engine is free.

    Args:
        engine: samples from a copy of the weights.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self._jobs: Jobs | None = None
        self._copy: Policy | None = None  # what the engine reads, where it is synced behind other phases

    def sample(
        self,
        ahead: dict[int, SampledAhead],
        phase: int,
        policy: Policy,
        version: int,
        ask: Callable[[int], Callable[[], Groups]],
    ) -> tuple[Groups, float]:
        """Return the completions of a phase, and have those of later phases sampled.

        Args:
            ahead: the phases that are sampled or under way, by number; brought up to date.
            phase: the number of the phase.
            policy: holds the current weights.
            version: optimiser updates so far.
            ask: number of a phase -> what samples it, when the engine has its weights.

        Returns:
            the completions of each prompt, and the seconds that they were waited for.

        Raises:
            Exception: what the engine raised in the other thread.
        """
        bound = self.engine.max_staleness
        older = [number for number, each in ahead.items() if number >= phase and number - each.weights > bound]
        if older:
            rank_zero_warn(
                f"what the checkpoint has of phases {older} is older than max_staleness {bound} allows, and is sampled anew"
            )
        for number in [number for number in ahead if number < phase or number in older]:
            del ahead[number]
        start = time.perf_counter()
        if phase in ahead:
            ahead[phase].completions()  # before the engine is synced
        waited = time.perf_counter() - start
        missing = [number for number in range(phase, phase + bound + 1) if number not in ahead]
        sync = self._begin_sync(policy, version)
        for number in missing:
            ahead[number] = SampledAhead(phase, self._run(partial(run_behind, sync, ask(number))).result)
            sync = None
        start = time.perf_counter()
        found = ahead[phase].completions()
        return found, waited + time.perf_counter() - start

    def sync(self, ahead: dict[int, SampledAhead], policy: Policy, version: int) -> None:
        """Give the engine the current weights, once it has sampled what it was asked for."""
        for each in ahead.values():
            each.completions()
        if (sync := self._begin_sync(policy, version)) is not None:
            sync()

    def close(self, ahead: dict[int, SampledAhead]) -> None:
        """Wait for what is being sampled, since a checkpoint may still be written, and end the other thread."""
        for each in ahead.values():
            with suppress(Exception):  # raised where the completions are needed
                each.completions()
        if self._jobs is not None:
            self._jobs.put(None)
        self._jobs = None

    def _begin_sync(self, policy: Policy, version: int) -> Callable[[], None] | None:
        """Sync the engine, or return a function that syncs it later from a copy of the current weights."""
        if self.engine.max_staleness == 1:  # the engine is free
            self.engine.sync_weights(policy, version)
            return None
        if self._copy is None:
            self._copy = copy.deepcopy(policy).requires_grad_(False)
        learned = {name: each.detach().clone() for name, each in policy.named_parameters() if each.requires_grad}
        return partial(sync_copy, self.engine, self._copy, learned, version)

    def _run(self, job: Callable[[], Groups]) -> Future[Groups]:
        """Do a job in the other thread, behind those before it."""
        if self._jobs is None:
            self._jobs = SimpleQueue()
            # A daemon, so that a run which ends by an error or a second signal waits for no engine.
            threading.Thread(target=work, args=(self._jobs,), name="sampling ahead", daemon=True).start()
        future: Future[Groups] = Future()
        self._jobs.put((future, job))
        return future


def work(jobs: Jobs) -> None:
    """Do jobs one after another until there are no more."""
    while (found := jobs.get()) is not None:
        future, job = found
        try:
            future.set_result(job())
        except BaseException as error:  # the run's thread raises it
            future.set_exception(error)


def run_behind(first: Callable[[], None] | None, job: Callable[[], Groups]) -> Groups:
    """Do a job behind another one, if there is one."""
    if first is not None:
        first()
    return job()


@torch.no_grad()
def sync_copy(engine: RolloutEngine, policy: Policy, learned: dict[str, torch.Tensor], version: int) -> None:
    """Give an engine the learned weights of an earlier time, by a policy that holds them for it."""
    weights = dict(policy.named_parameters())
    for name, weight in learned.items():
        weights[name].copy_(weight)
    engine.sync_weights(policy, version)
