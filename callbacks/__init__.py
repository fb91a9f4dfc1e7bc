"""Questions about a run's health, one a file. They look and log; they change nothing."""

from callbacks.diversity import Diversity
from callbacks.export import Export
from callbacks.length_bias import LengthBias
from callbacks.overoptimization import Overoptimization
from callbacks.prediction_writer import PredictionWriter
from callbacks.samples import Samples
from callbacks.summary import Summary

__all__ = ["Diversity", "Export", "LengthBias", "Overoptimization", "PredictionWriter", "Samples", "Summary"]
