"""Option letters, shared words and the rules of reasoning-gym tasks, by hand."""

import json
from typing import Any

import pytest

from datamodules.sources import ReasoningGym
from modules.rewards import MultipleChoice, ReasoningGymScore, TokenF1
from modules.rewards.combined import find_accuracy
from modules.types import Completion, Rollout


def rollout(text: str, answer: str | None = None, prompt: str = "q", **info: Any) -> Rollout:
    return Rollout("u", prompt, [1], answer, Completion([2], [0.0], text, "stop"), 0, {}, None, info)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("The answer is (B).", 1.0),
        ("b)", 1.0),
        ("A or B?\n\n**B**", 1.0),
        ("Answer: A\nNo. Answer: B", 1.0),  # the last line that states one
        ("$\\boxed{\\text{B}}$", 1.0),
        ("\u7b54\u6848\u662fB\u3002", 1.0),
        ("<answer>B) Paris</answer>", 1.0),
        ("The answer is A or B.", 0.0),
        ("Answer: B, C", 0.0),
        ("The answer is a bee.", 0.0),
        ("The answer is Bonn.", 0.0),
        ("Paris", 0.0),
        ("<answer>B</answer><answer>B</answer>", 0.0),
        ("<think>Answer: B</think>Who knows?", 0.0),
        ("<think>Answer: B", 0.0),
        ("", 0.0),
    ],
)
def test_one_letter_must_be_stated(text, score):
    assert MultipleChoice()([rollout(text, "B")]) == [score]


def test_a_thought_that_the_prompt_opened_holds_no_answer():
    opened = "q<think>\n"
    assert MultipleChoice()([rollout("Answer: B", "B", opened), rollout("A?</think>Answer: B", "B", opened)]) == [
        0.0,
        1.0,
    ]


def test_gold_answers_are_letters_or_texts_of_options():
    golds = ["(b)", "B) Paris", "#### B", "Paris", "Rome", "2", None]
    rollouts = [rollout("Answer: B", gold, options=["Bonn", "Paris"]) for gold in golds]
    assert MultipleChoice()(rollouts) == [1.0, 1.0, 1.0, 1.0, None, None, None]
    arc = {"text": ["Bonn", "Paris"], "label": ["1", "2"]}
    assert MultipleChoice()([rollout("Answer: B", "Rome", options=arc)]) == [None]


def test_f1_by_hand():
    rollouts = [
        rollout("The cat sat on the mat.", "a cat sat"),  # {cat sat on mat} and {cat sat}: 2 * 2 / (4 + 2)
        rollout("cat cat", "cat"),  # a word counts as often as both have it: 2 * 1 / (2 + 1)
        rollout("U.S.", "us"),
        rollout("\u5317\u4eac\u5e02\u3002", "\u5317\u4eac"),  # 2 * 2 / (3 + 2)
        rollout("dog", "cat"),
        rollout("<think>cat</think>", "cat"),
        rollout("<think>dog</think><answer>cat</answer>", "cat"),
        rollout("the", "a"),  # no words on either side
        rollout("cat"),
    ]
    assert TokenF1()(rollouts) == [
        pytest.approx(score) if score else score for score in (2 / 3, 2 / 3, 1.0, 0.8, 0.0, 0.0, 1.0, 1.0, None)
    ]


def gym_row(task: str, number: int = 0) -> tuple[str, dict[str, Any]]:
    """The answer and the metadata of a row, as they come out of a file."""
    columns = ReasoningGym(task, size=number + 1, seed=3).rows()[number].columns
    return columns["answer"], json.loads(json.dumps(columns["metadata"]))


def test_a_task_judges_by_its_own_rule():
    gold, metadata = gym_row("countdown")
    total = metadata["target"]
    texts = [
        metadata["expression"],
        f"<think>{total}</think><answer>{metadata['expression']}</answer>",
        str(total),
        "?",
    ]
    assert ReasoningGymScore()([rollout(text, gold, metadata=metadata) for text in texts]) == [1.0, 1.0, 0.0, 0.0]
    as_text = rollout(metadata["expression"], gold, metadata=json.dumps(metadata))
    assert ReasoningGymScore()([as_text, rollout("5", "5"), rollout("5", "5", metadata={"source_dataset": "x"})]) == [
        1.0,
        None,
        None,
    ]


def test_part_of_the_score_is_asked_for():
    gold, metadata = gym_row("chain_sum")
    rollouts = [rollout(f"{gold} or so", gold, metadata=metadata), rollout(gold, gold, metadata=metadata)]
    whole, partial = ReasoningGymScore(), ReasoningGymScore(partial=True)
    assert whole(rollouts) == [0.0, 1.0]
    assert partial(rollouts) == [pytest.approx(len(gold) / (len(gold) + 6)), 1.0]  # the task's share of the text
    assert find_accuracy(whole) is whole and find_accuracy(partial) is None


def test_an_answer_is_not_run(tmp_path):
    gold, metadata = gym_row("n_queens")
    mark = tmp_path / "mark"
    texts = [f"open({str(mark)!r}, 'w')", f"__import__('os').system('touch {mark}')", f"[open({str(mark)!r}, 'w')]"]
    assert ReasoningGymScore()([rollout(text, gold, metadata=metadata) for text in texts]) == [0.0] * 3
    assert not mark.exists()


def test_a_task_whose_rule_takes_any_text_compares():
    gold, metadata = gym_row("game_of_life_halting")
    other = {"True": "False", "False": "True"}[gold]
    assert ReasoningGymScore()([rollout(text, gold, metadata=metadata) for text in (gold, other, "hm")]) == [
        1.0,
        0.0,
        0.0,
    ]


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="ReasoningGymScore: reasoning-gym has no task 'chain_sums'"):
        ReasoningGymScore(task="chain_sums")
