"""Where examples come from and how they are batched."""

from datamodules.instruction import InstructionDataModule
from datamodules.sources import Addition, Files, ReasoningGym, Source
from datamodules.verifiable import VerifiableDataModule

__all__ = ["Addition", "Files", "InstructionDataModule", "ReasoningGym", "Source", "VerifiableDataModule"]
