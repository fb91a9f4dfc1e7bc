"""Rewards, chosen by class name in YAML."""

from modules.rewards.base import WeightedSum, breakdown
from modules.rewards.chat_client import HttpChat, LocalChat
from modules.rewards.format import RegexFormat, ThinkAnswerFormat
from modules.rewards.judge import PairwiseJudge, RubricJudge
from modules.rewards.learned import LearnedReward
from modules.rewards.length import LengthPenalty
from modules.rewards.math import ExactMatch, MathVerify, NumericMatch
from modules.rewards.refusal_judge import RefusalJudge
from modules.rewards.versus import Versus

__all__ = [
    "ExactMatch",
    "HttpChat",
    "LearnedReward",
    "LengthPenalty",
    "LocalChat",
    "MathVerify",
    "NumericMatch",
    "PairwiseJudge",
    "RefusalJudge",
    "RegexFormat",
    "RubricJudge",
    "ThinkAnswerFormat",
    "Versus",
    "WeightedSum",
    "breakdown",
]
