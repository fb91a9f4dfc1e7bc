"""Questions about a run's health, one a file. They look and log; they change nothing."""

from callbacks.diversity import Diversity
from callbacks.export import Export
from callbacks.length_bias import LengthBias
from callbacks.overoptimization import Overoptimization
from callbacks.prediction_writer import PredictionWriter
from callbacks.preference_audit import PreferenceAudit
from callbacks.preference_writer import PreferenceWriter
from callbacks.samples import Samples
from callbacks.summary import Summary
from callbacks.win_rate import WinRate

__all__ = [
    "Diversity",
    "Export",
    "LengthBias",
    "Overoptimization",
    "PredictionWriter",
    "PreferenceAudit",
    "PreferenceWriter",
    "Samples",
    "Summary",
    "WinRate",
]
