"""Gold answers and completions as people write them: LaTeX, names, other scripts."""

from fractions import Fraction

import pytest

from modules.rewards import MathVerify, NumericMatch
from modules.rewards.answers import cut_final_answer, name_reader
from modules.types import Completion, Rollout


def rollout(text: str, answer: str) -> Rollout:
    return Rollout("u", "p", [1], answer, Completion([2], [0.0], text, "stop"), 0, {}, None)


GOLDS = [
    ("$5$", "5"),
    ("$$5$$", "5"),
    (r"\(5\)", "5"),
    (r"\[ 5 \]", "5"),
    ("x=5", "5"),
    ("$x = 5$.", "5"),
    (r"\boxed{5}", "5"),
    (r"\boxed{x=5}", "5"),
    (r"It is $\boxed{\frac{3}{4}}$, as said.", "3/4"),
    (r"\boxed{70{,}000}", "70000"),
    (r"70\,000", "70000"),
    (r"\frac{3}{2}", "3/2"),
    (r"$-\dfrac12$", "-1/2"),
    (r"2\frac{1}{2}", "5/2"),
    (r"5\text{ cm}", "5"),
    (r"90^\circ", "90"),
    ("\uff15", "5"),
    ("#### Step 1\nadd\n#### 5", "5"),
    ("#### Step 1\nadd: $\\boxed{5}$", "5"),
    ("$18.00", "18"),
    ("18%", "18"),
]


@pytest.mark.parametrize(("gold", "number"), GOLDS)
def test_golds_are_read(gold: str, number: str) -> None:
    assert NumericMatch()([rollout(number, gold), rollout("123456789", gold)]) == [1.0, 0.0]
    assert NumericMatch()([rollout(f"So {gold}", number)]) == [1.0]
    assert "NumericMatch" in name_reader(gold)


@pytest.mark.parametrize(
    "gold", ["x=5, y=3", "x>=5", "10^6", r"\sqrt{2}", "(B)", "$5 and $6", r"5\pi", "1=1=1", "#### a\nb"]
)
def test_what_is_no_single_number_is_none(gold: str) -> None:
    assert NumericMatch()([rollout("5", gold)]) == [None]
    assert "NumericMatch" not in name_reader(gold)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"so \frac{1}{2}", Fraction(1, 2)),
        (r"so $\frac{\sqrt{3}}{2}$", None),
        (r"2 or 2\sqrt{3}", None),
        ("10^6", None),
        ("2**10", None),
        (r"9\pi", None),
        (r"\frac{x}{2}", None),
        ("area 5 cm^2", 5),
        ("x^2 = 5", 5),
        ("**5** apples", 5),
        ("\u7b54\u6848\u662f9\u3002", 9),
    ],
)
def test_the_last_number_of_a_completion_is_a_whole_one(text: str, number: Fraction | None) -> None:
    for wrong in (2, 3, 6, 10):
        assert NumericMatch()([rollout(text, str(wrong))]) == [float(number == wrong)]
    if number is not None:
        assert NumericMatch()([rollout(text, str(number))]) == [1.0]


@pytest.mark.parametrize(
    "text", ["\\frac{" * 20000, "1 " * 50000, "a^" * 50000, "\\boxed{" * 20000, "\\frac 1" * 20000]
)
def test_hostile_texts_take_no_long(text: str) -> None:
    NumericMatch()([rollout(text, "5"), rollout("5", text)])


VERIFIED = [
    ("9", "\u7b54\u6848\u662f9\u3002"),  # Chinese: the answer is 9.
    ("9", "\u7b54\u3048\u306f\uff19\u3067\u3059\u3002"),  # Japanese, with a full-width 9
    ("9", "\uc815\ub2f5\uc740 9\uc785\ub2c8\ub2e4."),  # Korean
    ("9", "\u0e04\u0e33\u0e15\u0e2d\u0e1a\u0e04\u0e37\u0e2d9\u0e04\u0e23\u0e31\u0e1a"),  # Thai
    ("9", "\u7b54\u6848\uff1a$9$\u3002"),
    ("3/5", "The answer is 3/5."),
    (r"\frac{3}{5}", "so x = 3/5."),
    ("4", "The answer is 3 days.\n#### 4"),
    (r"So $\boxed{4}$.", "4"),
    ("5", "The answer is 5."),
    (r"2\sqrt{3}", r"It is $2\sqrt{3}$."),
]


def test_math_verify_reads_answers_as_they_are_written() -> None:
    verify = MathVerify()
    assert verify([rollout(text, gold) for gold, text in VERIFIED]) == [1.0] * len(VERIFIED)
    assert verify([rollout(text, "77") for _, text in VERIFIED]) == [0.0] * len(VERIFIED)
    verify.close()


def test_a_heading_is_no_answer() -> None:
    assert cut_final_answer("4\n#### Check\nall is well") == "4\n#### Check\nall is well"
