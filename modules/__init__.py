"""Post-training methods as LightningModules; the names here are the short names of the command line."""

from modules.grpo import GRPOModule
from modules.sft import SFTModule

__all__ = ["GRPOModule", "SFTModule"]
