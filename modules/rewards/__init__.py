"""Rewards, which a YAML names by their class name."""

from modules.rewards.chat.clients import HttpChat, LocalChat
from modules.rewards.chat.judge import PairwiseJudge, RubricJudge
from modules.rewards.chat.refusal_judge import RefusalJudge
from modules.rewards.format import RegexFormat, ThinkAnswerFormat
from modules.rewards.function import FunctionReward
from modules.rewards.learned import LearnedReward
from modules.rewards.length import LengthPenalty
from modules.rewards.math import ExactMatch, MathVerify, NumericMatch
from modules.rewards.versus import Versus
from modules.rewards.weighted_sum import WeightedSum, breakdown

__all__ = [
    "ExactMatch",
    "FunctionReward",
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
