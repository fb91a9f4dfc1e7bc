"""The engines that the conformance suite tries. A new one is one entry of ``CASES``."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fakes import running_fake

from modules.rollout import InProcessEngine, RolloutEngine, VLLMEngine, WorkerEngine

SMALL_GB = 150e-6  # 150 tokens of the models of ``conftest``


@dataclass(frozen=True)
class EngineCase:
    """An engine, the architecture that it samples from here, and what it may leave out.

    ``small`` makes one with so little memory that 80 requests of up to 30 tokens wait for each other. ``tolerance`` bounds
    the difference of its log-probs from those of the trainer, in nats. ``exact``: greedy tokens are those of the trainer's
    model, however close its logits are. ``disturb`` does to a sampling engine what it has to survive,
    such as killing a worker; it is called in another thread a moment after ``generate``.
    """

    policy: str  # a name of ``conftest.FAST`` or ``conftest.GENERAL``
    make: Callable[[], RolloutEngine]
    small: Callable[[], RolloutEngine]
    tolerance: float = 1e-4
    exact: bool = True
    goes_on: bool = True  # ``generate`` takes ``started``
    unbroken: bool = True  # what goes on from a beginning is what one call would have sampled
    disturb: Callable[[RolloutEngine], None] | None = None


def attach_to_fake() -> VLLMEngine:
    return VLLMEngine(url=running_fake("qwen3").url)


def kill_worker(engine: Any) -> None:
    """End one of an engine's two processes."""
    os.kill(engine._crew.processes[0].child.pid, signal.SIGKILL)


def small_engine() -> InProcessEngine:
    return InProcessEngine(SMALL_GB)


def start_vllm() -> VLLMEngine:
    return VLLMEngine(os.environ["VLLM_PYTHON"], cache_gb=0.25)


CASES = {
    "in process, fast": EngineCase("qwen3", InProcessEngine, small_engine),
    "in process, in blocks": EngineCase("qwen3", lambda: InProcessEngine(check_every=4), small_engine),
    "in process, static": EngineCase("gpt2", InProcessEngine, small_engine),
    "workers": EngineCase("qwen3", WorkerEngine, lambda: WorkerEngine(1, small_engine()), disturb=kill_worker),
    "vllm, fake server": EngineCase("qwen3", attach_to_fake, attach_to_fake, unbroken=False),
}
if "VLLM_PYTHON" in os.environ:  # make test-vllm
    CASES = {"vllm itself": EngineCase("qwen3", start_vllm, start_vllm, unbroken=False)}
