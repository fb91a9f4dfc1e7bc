"""Post-training methods as LightningModules. The command line knows them by these names.

A method is imported when it is first asked for, since its libraries take seconds to load.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

FILES = {
    "DistillModule": "modules.distill",
    "DPOModule": "modules.dpo",
    "GRPOModule": "modules.grpo",
    "OnlineDPOModule": "modules.online_dpo",
    "PPOModule": "modules.ppo",
    "KnowledgeModule": "modules.predict.knowledge",
    "LabelModule": "modules.predict.label",
    "SelfInstructModule": "modules.predict.self_instruct",
    "RewardModule": "modules.reward",
    "SFTModule": "modules.sft",
}


def __getattr__(name: str) -> Any:
    """Import a method."""
    if name not in FILES:
        raise AttributeError(f"module 'modules' has no attribute {name!r}")
    globals()[name] = getattr(import_module(FILES[name]), name)
    return globals()[name]
