"""Rewards, chosen by class name in YAML."""

from modules.rewards.base import WeightedSum, breakdown
from modules.rewards.format import RegexFormat, ThinkAnswerFormat
from modules.rewards.math import ExactMatch, MathVerify, NumericMatch

__all__ = ["ExactMatch", "MathVerify", "NumericMatch", "RegexFormat", "ThinkAnswerFormat", "WeightedSum", "breakdown"]
