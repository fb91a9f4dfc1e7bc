"""ExactMatch and NumericMatch: tables of right verdicts, construction errors, hostile input, GSM8K."""

import json
import time
from pathlib import Path

import pytest

from modules.rewards import ExactMatch, NumericMatch
from modules.types import Completion, Rollout

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


def make_rollout(text: str, answer: str | None) -> Rollout:
    return Rollout("uid", "question", [1], answer, Completion([2], [0.0], text, "stop"), 0, {}, None)


def numeric(text: str, answer: str | None, tolerance: float = 0.0) -> float | None:
    return NumericMatch(tolerance=tolerance)([make_rollout(text, answer)])[0]


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (" Paris\n", "Paris", 1.0),
        ("Paris", " Paris ", 1.0),
        ("paris", "Paris", 0.0),
        ("The capital is Paris", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("Paris", None, None),
    ],
)
def test_exact_match_of_the_whole_completion(text: str, answer: str | None, expected: float | None) -> None:
    assert ExactMatch()([make_rollout(text, answer)]) == [expected]


def test_exact_match_of_a_group() -> None:
    reward = ExactMatch(pattern=r".*\n?Answer:([^\n]*)", name="line")
    texts = ["One line\nAnswer: 1/2", "One line\nAnswer: 12", "Answer: 1/2\nand more", "1/2"]
    assert reward.name == "line"
    assert reward([make_rollout(text, "1/2") for text in texts]) == [1.0, 0.0, 0.0, 0.0]
    assert ExactMatch(pattern="x(y)?")([make_rollout("x", "y"), make_rollout("xy", "y")]) == [0.0, 1.0]


@pytest.mark.parametrize("reward", [ExactMatch, NumericMatch])
def test_patterns_are_checked_at_construction(reward: type[ExactMatch] | type[NumericMatch]) -> None:
    with pytest.raises(ValueError, match="invalid regular expression"):
        reward(pattern="(a")
    with pytest.raises(ValueError, match="exactly one group.* has 0"):
        reward(pattern="a")
    with pytest.raises(ValueError, match="exactly one group.* has 2"):
        reward(pattern="(a)(b)")


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_tolerance_is_checked_at_construction(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance"):
        NumericMatch(tolerance=tolerance)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("72", "72", 1.0),
        ("72.0", "72", 1.0),
        ("72", "72.00", 1.0),
        ("The answer is 72.", "72", 1.0),
        ("First 70, then 72", "72", 1.0),
        ("First 72, then 70", "72", 0.0),
        ("72 apples in 2 bags", "72", 0.0),
        ("**72** apples", "72", 1.0),
        ("72km", "72", 1.0),
        ("1,234", "1234", 1.0),
        ("1234", "1,234", 1.0),
        ("1,234,567.50", "1234567.5", 1.0),
        ("12,34", "1234", 0.0),
        ("-3", "-3", 1.0),
        ("\u22123", "-3", 1.0),
        ("3", "-3", 0.0),
        ("x=-3", "-3", 1.0),
        ("10-3", "-3", 0.0),
        ("10-3", "3", 1.0),
        ("f(x)-3", "3", 1.0),
        ("a total--3", "3", 1.0),
        ("$18", "18", 1.0),
        ("-$18", "$-18", 1.0),
        ("\\$18.50", "18.5", 1.0),
        ("50%", "50", 1.0),
        ("1/2", "0.5", 1.0),
        ("0.5", "1/2", 1.0),
        ("2/4", "1/2", 1.0),
        ("-1/2", "-.5", 1.0),
        ("12", "1/2", 0.0),
        ("1/2", "12", 0.0),
        ("1/3", "0.3333333333333333", 0.0),
        ("0.1000000000000000055511151231257827", "0.1", 0.0),
        ("1e3", "1000", 1.0),
        ("1/0", "1", 0.0),
        ("so x2 and H2O", "2", 0.0),
        ("wait...5", "5", 1.0),
        ("no number", "72", 0.0),
        ("", "72", 0.0),
        ("72", "4 + 68 = 72\n#### 72", 1.0),
        ("68", "#### 72\n#### 68", 1.0),
        ("72", "seventy-two", None),
        ("72", "72 apples", 1.0),
        ("72", "1/0", None),
        ("72", "#### ", None),
        ("72", "", None),
        ("72", None, None),
        ("<think>70</think> 72", "72", 1.0),
        ("<think>72</think> I do not know", "72", 0.0),
        ("<think>it may be 72", "72", 0.0),
    ],
)
def test_numeric_table(text: str, answer: str | None, expected: float | None) -> None:
    assert numeric(text, answer) == expected


def test_tolerance_is_decimal_and_inclusive() -> None:
    # In floats 0.3 - 0.2 = 0.09999999999999998 and 0.8 - 0.7 = 0.10000000000000009.
    assert [numeric("0.8", "0.7", 0.1), numeric("0.3", "0.2", 0.1), numeric("0.80001", "0.7", 0.1)] == [1.0, 1.0, 0.0]
    assert abs(0.8 - 0.7) > 0.1
    # The float 0.3 is 0.29999999999999998889...
    assert numeric("1.3", "1", 0.3) == 1.0


def test_numeric_group_must_be_one_number() -> None:
    reward = NumericMatch(pattern=r".*<answer>(.*)</answer>\s*")
    texts = [
        "<answer> $1,080. </answer>",
        "<answer>3 or 1080</answer>",
        "<answer></answer>",
        "<answer>1080</answer> 7",
        "1080",
    ]
    assert reward([make_rollout(text, "1080") for text in texts]) == [1.0, 0.0, 0.0, 0.0, 0.0]


HOSTILE = {
    "digits": "9" * 10**6,
    "thousands": "1" + ",111" * 250_000 + "1",
    "positive exponent": "1e999999999",
    "negative exponent": "1e-999999999",
    "long exponent": "1e" + "9" * 10**6,
    "hidden in a fraction": "1/1e999999999",
    "signs": "-$" * 500_000,
    "dots": "." * 10**6,
    "many numbers": "1,2341," * 150_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_input_is_fast_on_either_side(text: str) -> None:
    start = time.perf_counter()
    assert numeric(text, "72") == 0.0
    assert numeric("72", text) is None
    assert time.perf_counter() - start < 5.0


def test_every_reference_solution_of_gsm8k() -> None:
    if not GSM8K.is_dir():
        pytest.skip("no GSM8K files next to the repository")
    text = (GSM8K / "train.jsonl").read_text(encoding="utf-8") + (GSM8K / "test.jsonl").read_text(encoding="utf-8")
    answers = [json.loads(line)["answer"] for line in text.split("\n") if line]
    assert len(answers) > 8000
    reward = NumericMatch()
    assert set(reward([make_rollout(answer, answer) for answer in answers])) == {1.0}
    shifted = [str(int(answer.rpartition("####")[2].replace(",", "")) + 1) for answer in answers]
    assert set(reward([make_rollout(wrong, answer) for wrong, answer in zip(shifted, answers, strict=True)])) == {0.0}
