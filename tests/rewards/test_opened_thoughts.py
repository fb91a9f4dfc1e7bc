"""What rewards read where the prompt opens a thought: the tag is part of the completion's text."""

from dataclasses import replace

import pytest

from modules.rewards import (
    ExactMatch,
    MathVerify,
    NumericMatch,
    RegexFormat,
    ThinkAnswerFormat,
    Versus,
)
from modules.rewards.format import THINK_ANSWER
from modules.types import Completion, FunctionReward, Reward, Rollout, cut_final_text

STRICT = ExactMatch(THINK_ANSWER)


def rollout(prompt: str, text: str, answer: str = "4") -> Rollout:
    return Rollout("u", prompt, [1], answer, Completion([2], [0.0], text, "length"), 0, {}, None)


@pytest.mark.parametrize("prompt", ["2+2=<think>\n", "<|assistant|><think>", "<think>a</think>again: <think> \n"])
@pytest.mark.parametrize(
    ("text", "numeric", "whole_form"),
    [
        ("First 2, then 2, so maybe 4", 0.0, 0.0),  # cut inside the thought
        ("a\n</think>\n<answer>4</answer>", 1.0, 1.0),
        ("a\n</think>\n<answer>5</answer>", 0.0, 1.0),
        ("a</think>4<think>4", 0.0, 0.0),  # opened again
        ("<think>a</think><answer>4</answer>", 1.0, 0.0),  # opened twice
    ],
)
def test_a_thought_opened_by_the_prompt_is_read(prompt: str, text: str, numeric: float, whole_form: float) -> None:
    rows = [rollout(prompt, text)]
    assert NumericMatch()(rows) == [numeric]
    assert ThinkAnswerFormat()(rows) == RegexFormat(r"<think>\s*[^<]*</think>\s*<answer>[^<]*</answer>")(rows)
    assert ThinkAnswerFormat()(rows) == [whole_form]
    assert STRICT(rows) == [numeric * whole_form]


def test_a_prompt_that_only_speaks_of_thoughts_opens_none() -> None:
    for prompt in ("Use <think> tags.", "<think>\n\n</think>\n\n", "2+2="):
        assert NumericMatch()([rollout(prompt, "4")]) == [1.0]
        assert rollout(prompt, "4").text == "4"


def test_every_kind_of_reward_reads_the_same_text() -> None:
    def echo(completions: list[str]) -> list[float]:
        return [float(text == "<think>\n4") for text in completions]

    assert FunctionReward(echo)([rollout("<think>\n", "4")]) == [1.0]
    verify = MathVerify()
    assert verify([rollout("<think>\n", "so 4"), rollout("<think>\n", "so</think>4")]) == [0.0, 1.0]


def test_the_gold_answer_of_versus_closes_the_thought() -> None:
    versus = Versus(NumericMatch())
    assert versus([rollout("<think>\n", "4"), rollout("<think>\n", "x</think>4"), rollout("", "4")]) == [0.0, 0.5, 0.5]


def test_final_text() -> None:
    assert cut_final_text("a</think>b<think>c") == ""
    assert rollout("<think>", "a</think>b").final_text == "b"
    assert replace(rollout("<think>", "a"), prompt="").final_text == "a"


class Unnamed(Reward):
    def __call__(self, rollouts):
        return [1.0 for _ in rollouts]


def test_a_reward_without_a_name_has_that_of_its_class() -> None:
    assert Unnamed().score_parts([rollout("", "4")]) == [{"Unnamed": 1.0}]
