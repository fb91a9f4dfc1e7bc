"""Judges that ask a real server: what counts as a verdict, both orders, position bias, rubric marks."""

import re
from collections import Counter
from typing import Any

import pytest

from modules.rewards.chat.clients import HttpChat
from modules.rewards.chat.judge import (
    JudgedPair,
    PairwiseJudge,
    RubricJudge,
    measure_tally,
    read_score,
    read_verdict,
    tally,
)
from modules.rewards.combined import WeightedSum
from modules.types import Completion, Rollout, score


def rollout(text: str, answer: str | None) -> Rollout:
    return Rollout("u", "Say {hello}.", [1], answer, Completion([1], [0.0], text, "stop"), 0, {}, None)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Verdict: A", 1.0),
        ("Verdict: B", 0.0),
        ("Good.\n\n**Verdict: tie**\n", 0.5),
        ("verdict: b.", 0.0),
        ("**Verdict:** A", 1.0),
        ("Verdict: A\nNo, wait.\nVerdict: B", 0.0),
        ("Verdict: A\nVerdict: C", 1.0),
        ("<think>Verdict: A</think>\nVerdict: B", 0.0),
        ("<think>Verdict: A", None),
        ("The verdict: A", None),
        ("Verdict: A or B", None),
        ("Verdict:\nA", None),
        ("Verdict: AB", None),
        ("A", None),
        ("", None),
        (None, None),
    ],
)
def test_the_last_line_that_is_a_verdict_counts(reply: str | None, expected: float | None) -> None:
    assert read_verdict(reply) == expected


def test_marks_from_1_to_10_are_scaled() -> None:
    # (1 - 1) / 9, (10 - 1) / 9, (7 - 1) / 9
    replies = [
        "Score: 1",
        "**Score: 10/10**",
        "Score: 3\nScore: 7.",
        "Score: 0",
        "Score: 11",
        "Score: 7.5",
        "Score: 7/9",
        "7",
        None,
    ]
    assert [read_score(reply) for reply in replies] == [0.0, 1.0, 6 / 9, None, None, None, None, None, None]


def test_a_judge_that_prefers_longer_wins_iff_longer(chat_server: Any, rules: Any) -> None:
    judge = PairwiseJudge(HttpChat(chat_server(rules["longer wins"]).url, "m"))
    pairs = [("p", "aaa", "b"), ("p", "a", "bbb"), ("p", "aa", "bb"), ("p", "same", "same")]
    assert judge.compare(pairs) == [
        JudgedPair(1.0, (1.0, 0.0)),
        JudgedPair(0.0, (0.0, 1.0)),
        JudgedPair(0.5, (0.5, 0.5)),
        JudgedPair(0.5),
    ]
    # 6 verdicts: 2 wins of the first shown, 2 of the second, 2 ties: (2 + 2/2) / 6 - 1/2 = 0; the equal texts are not
    # asked about
    expected = {"comparisons": 4, "invalid": 0, "ties": 2, "position_bias": 0.0, "consistency": 1.0, "requests": 6}
    assert expected.items() <= judge.report().items()


def test_a_judge_that_prefers_the_first_place_gives_ties_alone(chat_server: Any, rules: Any) -> None:
    client = HttpChat(chat_server(rules["always first"]).url, "m")
    judge = PairwiseJudge(client)
    assert [comparison.score for comparison in judge.compare([("p", "aaa", "b"), ("p", "a", "bbb")])] == [0.5, 0.5]
    assert {"ties": 2, "position_bias": 0.5, "consistency": 0.0}.items() <= judge.report().items()
    once = PairwiseJudge(client, both_orders=False)
    scores = Counter(comparison.score for comparison in once.compare([(f"p{index}", "a", "b") for index in range(100)]))
    assert set(scores) == {0.0, 1.0} and 30 < scores[1.0] < 70  # drawn by a fair hash: 50 +- 3 sigma of 5, rounded up
    assert once.report()["position_bias"] == 0.5 and "consistency" not in once.report()


def test_a_win_in_one_order_and_a_tie_in_the_other_is_a_tie(chat_server: Any) -> None:
    judge = PairwiseJudge(
        HttpChat(
            chat_server(
                lambda question: "Verdict: A" if re.search(r"\[Answer A \w+\]\nx\n", question) else "Verdict: tie"
            ).url,
            "m",
        )
    )
    assert judge.compare([("p", "x", "y")]) == [JudgedPair(0.5, (1.0, 0.5))]
    assert judge.report()["position_bias"] == 0.25  # (1 + 1/2) / 2 - 1/2
    assert judge.report()["consistency"] == 0.0


@pytest.mark.parametrize("garbage", ["I like both.", "Verdict: C"])
def test_no_verdict_in_one_order_is_invalid_and_no_tie(chat_server: Any, garbage: str) -> None:
    server = chat_server(lambda question: garbage if re.search(r"\[Answer A \w+\]\ny\n", question) else "Verdict: A")
    judge = PairwiseJudge(HttpChat(server.url, "m"))
    assert judge.compare([("p", "x", "y")]) == [JudgedPair(None, (1.0, None))]
    assert {"comparisons": 1, "invalid": 1, "ties": 0}.items() <= judge.report().items()
    assert "consistency" not in judge.report()


def test_a_request_without_answer_is_invalid(chat_server: Any, rules: Any) -> None:
    judge = PairwiseJudge(HttpChat(chat_server(rules["always first"], plan=[500]).url, "m", retries=0))
    assert judge.compare([("p", "x", "y")])[0].score is None
    assert judge.report()["failed"] == 1


def test_as_a_reward_it_compares_with_the_answer_of_the_row(chat_server: Any, rules: Any) -> None:
    server = chat_server(rules["longer wins"])
    judge = PairwiseJudge(HttpChat(server.url, "m"))
    rollouts = [
        rollout("long", "a"),
        rollout("x", None),
        rollout("a", "long"),
        rollout("<think>" + "x" * 50 + "</think>ab", "cd"),
    ]
    assert score(judge, rollouts) == [1.0, None, 0.0, 0.5]
    assert all("Say {hello}." in body["messages"][0]["content"] for _, body in server.requests)
    assert WeightedSum([judge]).score_parts(rollouts[:1]) == [{"judge": 1.0}]


def test_rubric_marks(chat_server: Any) -> None:
    server = chat_server(lambda question: f"Score: {len(re.findall('good', question))}")
    judge = RubricJudge(HttpChat(server.url, "m"), rubric="Count {} of it.")
    assert score(judge, [rollout("good", None), rollout("good good good good", "x"), rollout("bad", "x")]) == [
        0.0,
        3 / 9,
        None,
    ]
    assert {"scored": 3, "invalid": 1, "requests": 3}.items() <= judge.report().items()
    assert "Count {} of it." in server.requests[0][1]["messages"][0]["content"]


def test_own_templates_are_checked() -> None:
    client = HttpChat("http://127.0.0.1:1/v1", "m")
    assert PairwiseJudge(client, "{{}} {prompt} {first} {second}").template.startswith("{{}}")
    with pytest.raises(
        ValueError,
        match=r"PairwiseJudge: the template has the fields \['first', 'prompt'\] and needs \['first', 'prompt', 'second'\]",
    ):
        PairwiseJudge(client, "{prompt} {first}")
    with pytest.raises(ValueError, match="PairwiseJudge: the template is not a format string"):
        PairwiseJudge(client, "{prompt} {first} {second} {")
    with pytest.raises(ValueError, match="RubricJudge: the rubric is empty"):
        RubricJudge(client, " ")


def test_tallies_add_up() -> None:
    comparisons = [
        JudgedPair(1.0, (1.0, 0.0)),
        JudgedPair(0.5, (1.0, 1.0)),
        JudgedPair(None, (None, 0.0)),
        JudgedPair(0.5),
    ]
    together = tally(comparisons)
    assert sum((tally([comparison]) for comparison in comparisons), Counter()) == +together
    # valid verdicts 1 0 1 1 0: 3 / 5 - 1/2; of two pairs with both verdicts one is consistent
    expected = {
        "comparisons": 4.0,
        "invalid": 1.0,
        "ties": 2.0,
        "position_bias": pytest.approx(0.1),
        "consistency": 0.5,
    }
    assert measure_tally(together) == expected
    assert measure_tally(Counter()) == {"comparisons": 0.0, "invalid": 0.0, "ties": 0.0}
