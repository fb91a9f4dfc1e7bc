"""The instruction filter: ROUGE-L by hand and by a naive table, each check and its limits, and the order of tasks."""

import json
import random
import re
import sys
from pathlib import Path

import pytest

from modules.predict.instruction_filter import REASONS, InstructionPool, find_objection, rouge_l, split_plain_words

DATA = Path(__file__).parents[3] / "shared" / "data" / "self-instruct"
GOOD = "Name three rivers of Asia."


def longest_common(first: list[str], second: list[str]) -> int:
    """Compute the longest common subsequence by the textbook table."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def naive(first: list[str], second: list[str]) -> float:
    """Compute F1 from precision and recall."""
    common = longest_common(first, second)
    if common == 0:
        return 0.0
    precision, recall = common / len(first), common / len(second)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a b c d", "a c d e", 0.75),  # LCS a c d: P = R = 3/4
        ("a b c d", "a c d", 6 / 7),  # LCS 3: P = 3/4, R = 1, F1 = 2 * 3 / (4 + 3)
        ("a b c", "c b a", 1 / 3),  # LCS 1; a bag of words would say 1
        ("a b", "c d", 0.0),
        ("", "a", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l_by_hand(first: str, second: str, expected: float) -> None:
    assert rouge_l(first.split(), second.split()) == pytest.approx(expected, abs=1e-12)
    assert rouge_l(second.split(), first.split()) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_and_the_nearest_of_random_lists_are_those_of_a_naive_table() -> None:
    draw = random.Random(0)
    texts = [[draw.choice("abcdefgh") for _ in range(draw.randint(1, 12))] for _ in range(120)]
    for _ in range(300):
        first, second = draw.choice(texts), draw.choice(texts)
        assert rouge_l(first, second) == pytest.approx(naive(first, second), abs=1e-12)
    pool = InstructionPool([" ".join(text) for text in texts[:80]])
    for text in texts[80:]:
        similar, score = pool.nearest(" ".join(text))
        assert score == pytest.approx(max(naive(text, other) for other in texts[:80]), abs=1e-12)
        assert score == pytest.approx(naive(text, similar.split()), abs=1e-12)


def test_words() -> None:
    assert split_plain_words("What's  the *snake_case* of Überraschung-2?") == [
        "what",
        "s",
        "the",
        "snake",
        "case",
        "of",
        "überraschung",
        "2",
    ]


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        (GOOD, None),
        ("one two three", "length"),
        ("one two three four", None),
        ("word " * 149 + "word", None),  # 150
        ("word " * 150 + "word", "length"),
        ("", "length"),
        ("Describe what the Image shows.", "blacklist"),
        ("Where would you go to swim?", "blacklist"),
        ("Plot, if you can, y = x.", "blacklist"),
        ("Explain mapping, filing and plotting in graphical work.", None),  # whole words alone
        ("Write a program that adds two numbers.", "program"),
        ("Explain how to write a program.", None),
        ('"Quote" this for me please', "first_character"),
        ("Été is a season, which one?", "first_character"),
        ("2 and 2 is how much?", None),
    ],
)
def test_checks_of_one_task(instruction: str, reason: str | None) -> None:
    assert find_objection(instruction, "out") == reason
    assert reason is None or reason in REASONS
    assert InstructionPool([]).judge(instruction, "out")[0] == reason


def test_an_empty_output_is_refused_after_what_is_wrong_with_the_instruction() -> None:
    assert find_objection(GOOD, "") == "no_output"
    assert find_objection("too short", "") == "length"


def test_the_threshold() -> None:
    pool = InstructionPool(["a b c d"])
    assert pool.judge("a c d e", "out") == ("similar", "a b c d", 0.75)
    assert pool.judge("a x c y", "out") == (None, "a b c d", 0.5)
    assert InstructionPool(["a b c d"], max_similarity=0.75).judge("a c d e", "out")[0] is None
    # LCS 7 of 10 words each: 14 / 20 is 0.7 and not more
    assert InstructionPool(["a b c d e f g h i j"]).judge("a b c d e f g x y z", "out") == (
        None,
        "a b c d e f g h i j",
        0.7,
    )
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"max_similarity must lie in \[0, 1\], got {wrong}"):
            InstructionPool([], wrong)


def test_what_was_kept_is_refused_when_it_comes_again() -> None:
    pool = InstructionPool(["Tell me a story about a fox."], max_similarity=1.0)
    assert pool.judge(GOOD, "out")[0] is None
    pool.add(GOOD)
    assert pool.judge(GOOD, "out") == ("duplicate", GOOD, 1.0)
    assert pool.judge("name three rivers of asia", "another out") == ("duplicate", GOOD, 1.0)
    assert pool.judge("Name three rivers of South Asia.", "out")[0] is None  # 10 / 11, which is not above 1


def test_an_empty_pool_refuses_nothing() -> None:
    assert InstructionPool([]).judge(GOOD, "out") == (None, "", 0.0)


def kept(instructions: list[str]) -> list[str]:
    pool = InstructionPool([])
    for instruction in instructions:
        if pool.judge(instruction, "out")[0] is None:
            pool.add(instruction)
    return pool.instructions


def test_the_order_decides() -> None:
    # neighbours share 4 of 5 words (F1 0.8), the ends 3 of 5 (0.6)
    chain = ["a b c d e", "b c d e f", "c d e f g"]
    assert kept(chain) == ["a b c d e", "c d e f g"]
    assert kept([chain[1], chain[0], chain[2]]) == ["b c d e f"]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.process", None)
    with pytest.raises(ImportError, match=r"rapidfuzz is not installed: pip install 'lightning-align\[instruct\]'"):
        InstructionPool([])


def test_human_seeds_against_one_another() -> None:
    if not DATA.is_dir():
        pytest.skip("no real data beside the repository")
    seeds = [json.loads(line) for line in (DATA / "seed_tasks.jsonl").read_text().split("\n")[:-1]]
    pool, refused = InstructionPool([]), []
    for seed in seeds:
        reason = pool.judge(seed["instruction"], seed["instances"][0]["output"])[0]
        if reason is None:
            pool.add(seed["instruction"])
        else:
            refused.append(reason)
    mine: list[list[str]] = []
    short = alike = 0
    for seed in seeds:
        tokens = re.sub(r"[^a-z0-9]+", " ", seed["instruction"].lower()).split()
        if len(seed["instruction"].split()) <= 3:
            short += 1
        elif any(naive(tokens, other) > 0.7 for other in mine):
            alike += 1
        else:
            mine.append(tokens)
    assert (len(seeds), short, alike, len(mine)) == (124, 2, 1, 121)
    assert sorted(refused) == ["length", "length", "similar"]
    assert len(pool.instructions) == 121
