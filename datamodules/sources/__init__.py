"""Sources of raw rows. They are imported together, so that YAML files can use their short class names."""

from datamodules.sources.files import Files
from datamodules.sources.flan import FlanTask, FlanTemplate, FlanTemplates
from datamodules.sources.mix_in import MixIn
from datamodules.sources.oasst import OasstTrees
from datamodules.sources.preference_prompts import PreferencePrompts
from datamodules.sources.reasoning_gym import ReasoningGym
from datamodules.sources.scored import Sampled, Scored
from datamodules.sources.source import Row, Source
from datamodules.sources.thinking_fusion import ThinkingFusion
from datamodules.sources.toys.addition import Addition, AdditionPairs
from datamodules.sources.toys.chains import ChainLessons, Chains, WorkedChains
from datamodules.sources.toys.guarded_addition import GuardedAddition
from datamodules.sources.toys.invented_facts import FactDocuments, Facts
from datamodules.sources.toys.number_texts import NumberTexts
from datamodules.sources.toys.products import ProductCalls, Products

__all__ = [
    "Addition",
    "AdditionPairs",
    "ChainLessons",
    "Chains",
    "FactDocuments",
    "Facts",
    "Files",
    "FlanTask",
    "FlanTemplate",
    "FlanTemplates",
    "GuardedAddition",
    "MixIn",
    "NumberTexts",
    "OasstTrees",
    "PreferencePrompts",
    "ProductCalls",
    "Products",
    "ReasoningGym",
    "Row",
    "Sampled",
    "Scored",
    "Source",
    "ThinkingFusion",
    "WorkedChains",
]
