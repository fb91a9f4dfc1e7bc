"""Engines that sample completions from a policy."""

from modules.rollout.engine import RolloutEngine, SampledPolicy, Sampling
from modules.rollout.in_process import InProcessEngine

__all__ = ["InProcessEngine", "RolloutEngine", "SampledPolicy", "Sampling"]
