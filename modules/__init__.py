"""Post-training methods as LightningModules. The command line knows them by these names."""

from modules.distill import DistillModule
from modules.dpo import DPOModule
from modules.grpo import GRPOModule
from modules.online_dpo import OnlineDPOModule
from modules.ppo import PPOModule
from modules.predict.knowledge import KnowledgeModule
from modules.predict.label import LabelModule
from modules.predict.self_instruct import SelfInstructModule
from modules.reward import RewardModule
from modules.sft import SFTModule

__all__ = [
    "DPOModule",
    "DistillModule",
    "GRPOModule",
    "KnowledgeModule",
    "LabelModule",
    "OnlineDPOModule",
    "PPOModule",
    "RewardModule",
    "SFTModule",
    "SelfInstructModule",
]
