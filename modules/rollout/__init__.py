"""Engines that sample completions from a policy."""

from modules.rollout.engine import InProcessEngine, RolloutEngine
from modules.rollout.sampling import SampledPolicy, Sampling

__all__ = ["InProcessEngine", "RolloutEngine", "SampledPolicy", "Sampling"]
