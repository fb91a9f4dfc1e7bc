"""Post-training methods as LightningModules; the names here are the short names of the command line."""

from modules.dpo import DPOModule
from modules.grpo import GRPOModule
from modules.knowledge import KnowledgeModule
from modules.label import LabelModule
from modules.online_dpo import OnlineDPOModule
from modules.ppo import PPOModule
from modules.reward import RewardModule
from modules.self_instruct import SelfInstructModule
from modules.sft import SFTModule

__all__ = [
    "DPOModule",
    "GRPOModule",
    "KnowledgeModule",
    "LabelModule",
    "OnlineDPOModule",
    "PPOModule",
    "RewardModule",
    "SFTModule",
    "SelfInstructModule",
]
