"""Callbacks: each file answers one question about a run's health. They measure and log; they do not change the
training.
"""

from callbacks.budget_curve import BudgetCurve
from callbacks.curves import Curves
from callbacks.dashboard import Dashboard
from callbacks.data_report import DataReport
from callbacks.diversity import Diversity
from callbacks.doctor import Doctor
from callbacks.engine_mismatch import EngineMismatch
from callbacks.forgetting import Forgetting
from callbacks.group_bias import GroupBias
from callbacks.length_bias import LengthBias
from callbacks.overoptimization import Overoptimization
from callbacks.preference_audit import PreferenceAudit
from callbacks.refusal import Refusal
from callbacks.samples import Samples
from callbacks.stages.averaged_weights import AveragedWeights
from callbacks.stages.claims import Claims
from callbacks.stages.comparison import Comparison
from callbacks.stages.export import Export
from callbacks.stages.hand_off import HandOff
from callbacks.stages.summary import Summary
from callbacks.token_budget import TokenBudget
from callbacks.token_picture import TokenPicture
from callbacks.win_rate import WinRate
from callbacks.writers.instruction_writer import InstructionWriter
from callbacks.writers.knowledge_writer import KnowledgeWriter
from callbacks.writers.long_to_short_pairs import LongToShortPairs
from callbacks.writers.pass_rates import PassRates
from callbacks.writers.prediction_writer import PredictionWriter
from callbacks.writers.preference_writer import PreferenceWriter
from callbacks.writers.verified_samples import VerifiedSamples

__all__ = [
    "AveragedWeights",
    "BudgetCurve",
    "Claims",
    "Comparison",
    "Curves",
    "Dashboard",
    "DataReport",
    "Diversity",
    "Doctor",
    "EngineMismatch",
    "Export",
    "Forgetting",
    "GroupBias",
    "HandOff",
    "InstructionWriter",
    "KnowledgeWriter",
    "LengthBias",
    "LongToShortPairs",
    "Overoptimization",
    "PassRates",
    "PredictionWriter",
    "PreferenceAudit",
    "PreferenceWriter",
    "Refusal",
    "Samples",
    "Summary",
    "TokenBudget",
    "TokenPicture",
    "VerifiedSamples",
    "WinRate",
]
