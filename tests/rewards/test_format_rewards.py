"""Format rewards: the table of well-formed and ill-formed completions."""

import re
import time

import pytest

from modules.rewards import ExactMatch, RegexFormat, ThinkAnswerFormat
from modules.rewards.format import THINK_ANSWER
from modules.types import Completion, Rollout

GOOD = [
    "<think>a</think><answer>b</answer>",
    "  \n<think>a\n\nb</think> \n\t<answer>5</answer>\n\n",
    "<think></think><answer></answer>",
    "<think>1 < 2 and <b>bold</b></think><answer>a < b</answer>",
]
BAD = {
    "trailing text": "<think>a</think><answer>b</answer> trailing",
    "trailing text on the next line": "<think>a</think><answer>b</answer>\ntrailing",
    "leading text": "Sure! <think>a</think><answer>b</answer>",
    "leading line": "Sure!\n<think>a</think><answer>b</answer>",
    "text between": "<think>a</think> so <answer>b</answer>",
    "two answers": "<think>a</think><answer>b</answer><answer>c</answer>",
    "two thoughts": "<think>a</think><think>a</think><answer>b</answer>",
    "answer inside the reasoning": "<think>a<answer>b</answer></think><answer>c</answer>",
    "nested reasoning": "<think><think>a</think></think><answer>c</answer>",
    "nested answer": "<think>a</think><answer><answer>c</answer></answer>",
    "reasoning inside the answer": "<think>a</think><answer><think>c</think></answer>",
    "stray closing tag": "<think>a</think><answer>c</think></answer>",
    "answer not closed": "<think>a</think><answer>b",
    "reasoning not closed": "<think>a<answer>b</answer>",
    "reasoning not opened": "a</think><answer>b</answer>",
    "wrong order": "<answer>b</answer><think>a</think>",
    "other case": "<Think>a</Think><Answer>b</Answer>",
    "no tags": "b",
    "empty": "",
}


def make_rollout(text: str, answer: str | None = "b") -> Rollout:
    return Rollout("uid", "question", [1], answer, Completion([2], [0.0], text, "stop"), 0, {}, None)


@pytest.mark.parametrize("text", GOOD)
def test_well_formed(text: str) -> None:
    assert ThinkAnswerFormat()([make_rollout(text)]) == [1.0]


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_ill_formed(text: str) -> None:
    assert ThinkAnswerFormat()([make_rollout(text)]) == [0.0]


def test_the_usual_loose_pattern_would_pay_for_ill_formed_text() -> None:
    loose = re.compile(r"^<think>.*?</think>\s*<answer>.*?</answer>$", re.DOTALL | re.MULTILINE)
    paid = {name for name, text in BAD.items() if loose.match(text)}
    assert {"trailing text on the next line", "two answers", "nested answer"} <= paid


def test_format_needs_no_gold_answer_and_keeps_order() -> None:
    assert ThinkAnswerFormat()([make_rollout(GOOD[0], None), make_rollout("b", None)]) == [1.0, 0.0]


def test_the_answer_group_of_the_constant_pattern() -> None:
    reward = ExactMatch(pattern=THINK_ANSWER)
    texts = ["<think>a</think>\n<answer> b </answer>\n", "<think>b</think><answer>c</answer>", *BAD.values()]
    assert reward([make_rollout(text) for text in texts]) == [1.0, 0.0, *[0.0] * len(BAD)]


@pytest.mark.parametrize(
    "text", ["<" * 10**6, "<think>" * 10**5, "<think>" + "<a" * 10**6, "<think>a</think>" + " " * 10**6 + "<"]
)
def test_long_ill_formed_text_takes_linear_time(text: str) -> None:
    start = time.perf_counter()
    assert ThinkAnswerFormat()([make_rollout(text)]) == [0.0]
    assert time.perf_counter() - start < 5.0


def test_regex_format_matches_the_whole_completion_across_lines() -> None:
    reward = RegexFormat(pattern=r".*</think>\s*\S.*", name="closed")  # for a prompt that ends with <think>
    assert reward.name == "closed"
    assert reward([make_rollout("a\nb</think>\nanswer"), make_rollout("a</think>"), make_rollout("a")]) == [
        1.0,
        0.0,
        0.0,
    ]
    assert RegexFormat("a|b")([make_rollout(text) for text in ("a", "ab", "b\n")]) == [1.0, 0.0, 0.0]
    assert RegexFormat("a$")([make_rollout("a\nb")]) == [0.0]


def test_regex_format_refuses_an_invalid_pattern() -> None:
    with pytest.raises(ValueError, match="RegexFormat got an invalid regular expression"):
        RegexFormat("(a")
