"""Where examples come from and how they are batched."""

from datamodules.candidates import CandidatesDataModule
from datamodules.instruction import InstructionDataModule
from datamodules.preference import PreferenceDataModule
from datamodules.sources import Addition, AdditionPairs, Files, OasstTrees, ReasoningGym, Scored, Source
from datamodules.verifiable import VerifiableDataModule

__all__ = [
    "Addition",
    "AdditionPairs",
    "CandidatesDataModule",
    "Files",
    "InstructionDataModule",
    "OasstTrees",
    "PreferenceDataModule",
    "ReasoningGym",
    "Scored",
    "Source",
    "VerifiableDataModule",
]
