"""Rewards, chosen by class name in YAML."""

from modules.rewards.chat.clients import HttpChat, LocalChat
from modules.rewards.chat.judge import PairwiseJudge, RubricJudge
from modules.rewards.chat.refusal_judge import RefusalJudge
from modules.rewards.format import RegexFormat, ThinkAnswerFormat
from modules.rewards.function import FunctionReward
from modules.rewards.learned import LearnedReward
from modules.rewards.combined import LengthPenalty
from modules.rewards.math import ExactMatch, MathVerify, NumericMatch
from modules.rewards.combined import Versus
from modules.rewards.combined import WeightedSum, breakdown

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
