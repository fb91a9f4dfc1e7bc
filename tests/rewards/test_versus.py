"""Wins, ties and losses against the row's answer under one reward."""

from modules.rewards.answers import NumericMatch
from modules.rewards.combined import Versus, compare_scores
from modules.rewards.format import RegexFormat
from modules.types import Completion, Rollout

POLITE = RegexFormat(".*please.*", name="polite")


def rollout(text: str, answer: str | None) -> Rollout:
    return Rollout("u", "p", [1], answer, Completion([7], [0.0], text, "stop"), 0, {}, None)


def test_win_tie_loss_and_no_answer():
    pairs = [("yes please", "no"), ("no", "yes please"), ("a", "b"), ("please", None), ("please a", "please b")]
    reward = Versus(POLITE)
    assert reward([rollout(*pair) for pair in pairs]) == [1.0, 0.0, 0.5, None, 0.5]
    assert reward.name == "versus_polite"
    assert reward([rollout("please", None)]) == [None]
    assert reward([]) == []


def test_verdict():
    assert [compare_scores(0.2, 0.1), compare_scores(-1.0, 0.0), compare_scores(3.0, 3.0)] == [1.0, 0.0, 0.5]
    assert compare_scores(None, 1.0) is compare_scores(1.0, None) is None


def test_unscorable_under_the_reward():
    assert Versus(NumericMatch())([rollout("4", "four")]) == [None]  # no gold number, so neither side has a score
