"""Gold answers and completions as people write them: LaTeX, names, other scripts."""

from fractions import Fraction

import pytest

from modules.rewards import MathVerify, NumericMatch
from modules.rewards.answers import cut_final_answer, name_reader
from modules.types import Completion, Rollout


def rollout(text: str, answer: str) -> Rollout:
    return Rollout("u", "p", [1], answer, Completion([2], [0.0], text, "stop"), 0, {}, None)


DASHES = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"  # that stand for a minus
GAPS = ["\u00a0", "\u2009", "\u202f", "'", "\u2019"]  # between groups of three digits
FORMULAS = [
    "5\u00b2",
    "10\u207b\u2075",
    "11\u2082",
    "\u221a5",
    "2\u221a3",
    "\u221b8",
    "\u221a(2x)",
    "sqrt(5)",
    "5!",
    "3 \u00d7 10\u2075",
    "0x10",
    "0b101",
]

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
    *[(f"{dash}5", "-5") for dash in DASHES],
    ("\uff0b5", "5"),  # full-width plus
    ("x = - 3", "-3"),
    ("$- 3$", "-3"),
    ("\u20ac5", "5"),
    ("-\u20ac5", "-5"),
    ("5 \u20ac", "5"),
    ("\u00a3 5", "5"),
    (r"5\$", "5"),
    ("(5)", "5"),
    ("$(-5)$.", "-5"),
    ("\u00bd", "1/2"),
    ("1\u00bd", "3/2"),
    ("-2 \u00bd", "-5/2"),
    ("2 1/2", "5/2"),
    ("-2 1/2", "-5/2"),
    ("1\u20442", "1/2"),  # fraction slash
    (r"\frac{1}{-2}", "-1/2"),
    (r"\frac{-1}{-2}", "1/2"),
    ("1/-2", "-1/2"),
    ("1/(-2)", "-1/2"),
    *[(f"1{gap}000{gap}000", "1000000") for gap in (*GAPS, " ", "_", r"\,")],
    ("12 345.5", "12345.5"),
    ("-1 000", "-1000"),
    ("\u0663\u066b\u0665", "7/2"),  # 3.5 in Arabic
    ("90\u00b0", "90"),
]


@pytest.mark.parametrize(("gold", "number"), GOLDS)
def test_golds_are_read(gold: str, number: str) -> None:
    assert NumericMatch()([rollout(number, gold), rollout("123456789", gold)]) == [1.0, 0.0]
    assert NumericMatch()([rollout(f"So {gold}", number)]) == [1.0]
    assert "NumericMatch" in name_reader(gold)


@pytest.mark.parametrize(
    "gold",
    [
        *(
            "**5**",
            "= 5",
            "{5}",
            r"\text{5}",
            r"5\,\text{kg}",
            "5 dollars",
            "5 km.",
            "Answer: 5",
            "A: 5",
            "**Answer:** 5",
        ),
        *(
            "<answer>5</answer>",
            "<answer>\n5\n</answer>",
            "The final answer is 5.",
            r"\boxed 5",
            r"\fbox{5}",
            r"\mathbf{5}",
        ),
        *("The answer is: **5**", r"$5\,\mathrm{cm}$"),
    ],
)
def test_golds_in_a_frame_are_read(gold: str) -> None:
    assert NumericMatch()([rollout("5", gold), rollout("6", gold)]) == [1.0, 0.0]
    assert "NumericMatch" in name_reader(gold)


def test_a_gold_answer_with_a_loose_sign_is_no_list() -> None:
    assert NumericMatch()([rollout("-5", "- 5"), rollout("5", "- 5")]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "gold",
    [
        *("x=5, y=3", "x>=5", "10^6", r"\sqrt{2}", "(B)", "$5 and $6", r"5\pi", "1=1=1", "#### a\nb"),
        *(
            "5m",
            "5k",
            "5 million",
            "5 pi",
            "5x",
            "A: B",
            "<answer></answer>",
            "**5** and **6**",
            "a = {5, 6}",
            "{5}{6}",
        ),
        *("1 2 3", "100 200 300", "3\u20135", "5-3", "(3, 4)", "2024-05-06", "Solve $3 x=24$"),
        *FORMULAS,
    ],
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
        *[(formula, None) for formula in FORMULAS],
        ("there are 5! ways", None),
        ("5! = 120", 120),
        ("The answer is 5!", 5),
        ("So it is 5!\n\nBye", 5),
        ("sqrt(25) = 5", 5),
        ("\u221a25 = 5", 5),
        ("area 5 cm\u00b2", 5),
        ("x\u00b2 = 5", 5),
        ("5 of H\u2082O", 5),
        ("10\u20133", 3),
        ("pages 3\u20135", 5),
        ("so 1 2 3", 3),
        ("100 200 300", 300),
        ("1 2 345", 345),
        ("1 234 5", 5),
        ("on 1 1/2/2025", 2025),
        ("2024-05-06", 6),
        ("- 5 apples", 5),
        ("so $x$ - 5", 5),
        ("so $- 5$", -5),
        (r"so x = - \frac{1}{2}", Fraction(-1, 2)),
        ("\u50f9\u683c\u00a55", 5),
        ("2 3/2", Fraction(3, 2)),
    ],
)
def test_the_last_number_of_a_completion_is_a_whole_one(text: str, number: Fraction | None) -> None:
    for wrong in (0, 1, 2, 3, 5, 6, 8, 10, 16, 101):
        assert NumericMatch()([rollout(text, str(wrong))]) == [float(number == wrong)]
    if number is not None:
        assert NumericMatch()([rollout(text, str(number))]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        *("\\frac{" * 20000, "1 " * 50000, "a^" * 50000, "\\boxed{" * 20000, "\\frac 1" * 20000),
        *("sqrt(" * 50000, "1 000 " * 50000, "= - " * 50000, "(1," * 50000, "1_{" * 50000, "a 5!" * 50000),
    ],
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
    ("90", "\\boxed{90\u00b0}"),
    ("90", "\\boxed{90\u00ba}"),
    ("90", r"\boxed{90 degrees}"),
    (r"90^\circ", "\\boxed{90\u00b0}"),
    ("90\u00b0", r"\boxed{90}"),
    ("5", r"It costs \$5."),
    ("5.5", r"It costs \$5.50."),
    ("5", "\\boxed{\u20ac5}"),
    ("5", "\\boxed{5 \u20ac}"),
    ("\u20ac5", r"\boxed{5}"),
    *[("-3", f"{said}{dash}3") for dash in "-" + DASHES for said in ("\u7b54\u6848\uff1a", "Answer: ", "x = ")],
    *[("-3", f"\\boxed{{{dash}3}}") for dash in DASHES],
    ("\u20133", r"\boxed{-3}"),
    ("-3", "Answer:-3"),
    ("-3", "x = - 3"),
    *[("1234", f"\\boxed{{1{gap}234}}") for gap in (*GAPS, " ", r"\,", r"\ ")],
    (r"1\,234", r"\boxed{1234}"),
    ("1000", r"\boxed{1e3}"),
    ("1000", "It is 1E3."),
    ("0.0015", r"\boxed{1.5e-3}"),
    ("1e3", r"\boxed{1000}"),
    ("2", r"\boxed{2.}"),
    ("2", r"\boxed{x = 2.}"),
    (r"3\sqrt{2}", "\\boxed{3\u221a2}"),
    (r"3\sqrt{2}", "$3\u221a(2)$"),
    (r"3\sqrt{2}", "It is 3\u221a2."),
    (r"3\sqrt{2}", "x = 3*sqrt(2)"),
    ("3\u221a2", r"\boxed{3\sqrt{2}}"),
    ("1/2", "\\boxed{\u00bd}"),
    ("1/2", "It is \u00bd."),
    ("\u00bd", r"\boxed{0.5}"),
    ("3/2", "\\boxed{1\u00bd}"),
    ("5/2", r"\boxed{2 1/2}"),
    ("25", "\\boxed{5\u00b2}"),
    ("x^2", "\\boxed{x\u00b2}"),
    ("x_1", "\\boxed{x\u2081}"),
    ("300000", "\\boxed{3 \u00d7 10\u2075}"),
    ("12", "\\boxed{3\u00b74}"),
    (r"\infty", "\\boxed{\u221e}"),
    ("(3,4)", "(3, 4)"),
    ("(3,4)", "The point is **(3, 4)**."),
    (r"(-3,\frac{1}{2})", "The point is (-3, 1/2)."),
    ("[3,4]", "It is [3, 4]."),
    ("11_2", r"\boxed{11_{2}}"),
    ("11_{2}", "It is 11_2."),
    ("5", "The point (3, 4) is at the distance 5."),
    ("5", "The answer is 5 (see steps 3, 4)."),
]
REFUSED = [
    ("11", r"\boxed{11_2}"),
    ("11", r"\boxed{11_{\text{two}}}"),
    ("11", "$11_{2}$"),
    ("11", "It is 11_2."),
    ("11", "11\u2082"),
    ("11_2", r"\boxed{11}"),
    ("11_2", r"\boxed{11_3}"),
    ("5", "\\boxed{5\u00b2}"),
    ("(3,5)", "The point is (3, 4)."),
    ("3", "\\boxed{\u20133}"),
]


def test_math_verify_reads_answers_as_they_are_written() -> None:
    verify = MathVerify()
    for pairs, right in ((VERIFIED, 1.0), ([("77", text) for _, text in VERIFIED], 0.0), (REFUSED, 0.0)):
        scores = verify([rollout(text, gold) for gold, text in pairs])
        assert [pair for pair, score in zip(pairs, scores, strict=True) if score != right] == []


def test_a_heading_is_no_answer() -> None:
    assert cut_final_answer("4\n#### Check\nall is well") == "4\n#### Check\nall is well"


@pytest.mark.parametrize("gold", ["B", "(B)", "b."])
def test_option_letters_are_for_exact_match(gold: str) -> None:
    assert name_reader(gold).startswith("ExactMatch compares option letters")
