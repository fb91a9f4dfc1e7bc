"""Questions about a run's health, one a file. They look and log; they change nothing."""

from callbacks.averaged_weights import AveragedWeights
from callbacks.claims import Claims
from callbacks.comparison import Comparison
from callbacks.data_report import DataReport
from callbacks.diversity import Diversity
from callbacks.export import Export
from callbacks.forgetting import Forgetting
from callbacks.hand_off import HandOff
from callbacks.instruction_writer import InstructionWriter
from callbacks.knowledge_writer import KnowledgeWriter
from callbacks.length_bias import LengthBias
from callbacks.overoptimization import Overoptimization
from callbacks.prediction_writer import PredictionWriter
from callbacks.preference_audit import PreferenceAudit
from callbacks.preference_writer import PreferenceWriter
from callbacks.refusal import Refusal
from callbacks.samples import Samples
from callbacks.summary import Summary
from callbacks.token_picture import TokenPicture
from callbacks.win_rate import WinRate

__all__ = [
    "AveragedWeights",
    "Claims",
    "Comparison",
    "DataReport",
    "Diversity",
    "Export",
    "Forgetting",
    "HandOff",
    "InstructionWriter",
    "KnowledgeWriter",
    "LengthBias",
    "Overoptimization",
    "PredictionWriter",
    "PreferenceAudit",
    "PreferenceWriter",
    "Refusal",
    "Samples",
    "Summary",
    "TokenPicture",
    "WinRate",
]
