"""Rewards, which a YAML names by their class name."""

from modules.rewards.answer_forms import MultipleChoice, ReasoningGymScore, TokenF1
from modules.rewards.answers import ExactMatch, MathVerify, NumericMatch
from modules.rewards.chat.clients import HttpChat, LocalChat
from modules.rewards.chat.judge import PairwiseJudge, RubricJudge
from modules.rewards.chat.refusal_judge import RefusalJudge
from modules.rewards.code import CodeTests
from modules.rewards.combined import LengthPenalty, Versus, WeightedSum
from modules.rewards.dispatch import Dispatch
from modules.rewards.earned import EnvironmentReward
from modules.rewards.format import RegexFormat, ThinkAnswerFormat
from modules.rewards.learned import LearnedReward
from modules.rewards.lengths import CosineLength, KimiLength, OverlongPenalty
from modules.rewards.noisy import Noisy
from modules.rewards.writing import InstructionConstraints, LanguageConsistency, Repetition, ScriptConsistency
from modules.types import FunctionReward

__all__ = [
    "CodeTests",
    "CosineLength",
    "Dispatch",
    "EnvironmentReward",
    "ExactMatch",
    "FunctionReward",
    "HttpChat",
    "InstructionConstraints",
    "KimiLength",
    "LanguageConsistency",
    "LearnedReward",
    "LengthPenalty",
    "LocalChat",
    "MathVerify",
    "MultipleChoice",
    "Noisy",
    "NumericMatch",
    "OverlongPenalty",
    "PairwiseJudge",
    "ReasoningGymScore",
    "RefusalJudge",
    "RegexFormat",
    "Repetition",
    "RubricJudge",
    "ScriptConsistency",
    "ThinkAnswerFormat",
    "TokenF1",
    "Versus",
    "WeightedSum",
]
