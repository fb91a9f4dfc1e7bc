"""Rewards, which a YAML names by their class name."""

from modules.rewards.answers import ExactMatch, MathVerify, NumericMatch
from modules.rewards.chat.clients import HttpChat, LocalChat
from modules.rewards.chat.judge import PairwiseJudge, RubricJudge
from modules.rewards.chat.refusal_judge import RefusalJudge
from modules.rewards.combined import LengthPenalty, Versus, WeightedSum
from modules.rewards.earned import EnvironmentReward
from modules.rewards.format import RegexFormat, ThinkAnswerFormat
from modules.rewards.learned import LearnedReward
from modules.types import FunctionReward

__all__ = [
    "EnvironmentReward",
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
]
