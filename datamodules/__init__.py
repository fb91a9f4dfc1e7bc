"""Where examples come from and how they are batched."""

from datamodules.curriculum.difficulty import Difficulty
from datamodules.curriculum.orders import EasyToHard, HarderLater, MoPPS, Prioritised, PromptOrder
from datamodules.instruction import InstructionDataModule
from datamodules.loaders.mixture_streams import DecayPhase, Stream
from datamodules.loaders.ptx import PtxStream
from datamodules.mixture import MixtureDataModule
from datamodules.predict.candidates import CandidatesDataModule
from datamodules.predict.facts import FactsDataModule
from datamodules.predict.seed_tasks import SeedTasksDataModule
from datamodules.preference import PreferenceDataModule
from datamodules.pretraining import PretrainingDataModule
from datamodules.sources import (
    Addition,
    AdditionPairs,
    ChainLessons,
    Chains,
    FactDocuments,
    Facts,
    Files,
    FlanTemplates,
    GuardedAddition,
    MixIn,
    NumberTexts,
    OasstTrees,
    PreferencePrompts,
    ProductCalls,
    Products,
    ReasoningGym,
    Sampled,
    Scored,
    Source,
    ThinkingFusion,
    WorkedChains,
)
from datamodules.streaming import StreamingDataModule
from datamodules.verifiable import VerifiableDataModule

__all__ = [
    "Addition",
    "AdditionPairs",
    "ChainLessons",
    "Chains",
    "CandidatesDataModule",
    "DecayPhase",
    "Difficulty",
    "EasyToHard",
    "FactDocuments",
    "Facts",
    "FactsDataModule",
    "Files",
    "FlanTemplates",
    "GuardedAddition",
    "HarderLater",
    "InstructionDataModule",
    "MixIn",
    "MixtureDataModule",
    "MoPPS",
    "NumberTexts",
    "ProductCalls",
    "Products",
    "OasstTrees",
    "PreferenceDataModule",
    "PreferencePrompts",
    "PretrainingDataModule",
    "Prioritised",
    "PromptOrder",
    "PtxStream",
    "ReasoningGym",
    "Sampled",
    "Scored",
    "SeedTasksDataModule",
    "Source",
    "Stream",
    "StreamingDataModule",
    "ThinkingFusion",
    "VerifiableDataModule",
    "WorkedChains",
]
