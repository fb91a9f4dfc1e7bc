"""Engines that sample completions from a policy, and environments whose tools a completion may call."""

from modules.rollout.calculator import Calculator
from modules.rollout.engine import InProcessEngine, RolloutEngine
from modules.rollout.environment import Environment
from modules.rollout.phases.partial import PartialRollouts
from modules.rollout.sampling import Reuse, SampledPolicy, Sampling
from modules.rollout.thinking import Thinking
from modules.rollout.vllm import VLLMEngine
from modules.rollout.workers import WorkerEngine

__all__ = [
    "Calculator",
    "Environment",
    "InProcessEngine",
    "PartialRollouts",
    "Reuse",
    "RolloutEngine",
    "SampledPolicy",
    "Sampling",
    "Thinking",
    "VLLMEngine",
    "WorkerEngine",
]
