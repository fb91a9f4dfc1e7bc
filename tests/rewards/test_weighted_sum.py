"""WeightedSum, the parts of a score, the checks on what rewards return, and building rewards from YAML."""

from collections.abc import Callable, Sequence

import jsonargparse
import pytest

from modules.rewards import ExactMatch, NumericMatch, RegexFormat, ThinkAnswerFormat, WeightedSum
from modules.rewards.answers import cut_final_answer
from modules.types import Completion, Reward, Rollout, cut_final_text


class Fixed(Reward):
    """A reward that gives fixed scores."""

    def __init__(self, name: str, values: list[float | None]) -> None:
        self.name = name
        self.values = values
        self.calls = 0

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        self.calls += 1
        return self.values


def make_rollouts(*texts: str, answer: str | None = "5") -> list[Rollout]:
    return [
        Rollout("uid", "question", [1], answer, Completion([2], [0.0], text, "stop"), 0, {}, None) for text in texts
    ]


THREE = make_rollouts("a", "b", "c")

Parts = list[dict[str, float | None]]


def breakdown(reward: Reward, rollouts: Sequence[Rollout]) -> tuple[Parts, list[float | None]]:
    parts = reward.score_parts(rollouts)
    return parts, [reward.add_parts(part) for part in parts]


def test_weighted_total_and_none() -> None:
    total = WeightedSum([Fixed("one", [1.0, 0.5, None]), Fixed("two", [2.0, -1.0, 3.0])], weights=[0.5, 2.0])
    # 0.5 * 1 + 2 * 2 = 4.5;  0.5 * 0.5 + 2 * -1 = -1.75;  one component unscorable
    assert total(THREE) == [4.5, -1.75, None]


def test_default_weights_add_up() -> None:
    total = WeightedSum([Fixed("one", [1.0, 0.0, 1.0]), Fixed("two", [1.0, 1.0, 0.0])])
    assert total(THREE) == [2.0, 1.0, 1.0]


def test_none_counts_even_with_weight_zero() -> None:
    assert WeightedSum([Fixed("one", [None, 1.0, 1.0]), Fixed("two", [1.0, 1.0, 1.0])], weights=[0.0, 1.0])(THREE) == [
        None,
        1.0,
        1.0,
    ]


def test_breakdown_of_a_sum_scores_each_component_once() -> None:
    one, two = Fixed("one", [1.0, None, 0.0]), Fixed("two", [2.0, 4.0, 8.0])
    parts, totals = breakdown(WeightedSum([one, two], weights=[1.0, 0.25]), THREE)
    assert parts == [{"one": 1.0, "two": 2.0}, {"one": None, "two": 4.0}, {"one": 0.0, "two": 8.0}]
    assert totals == [1.5, None, 2.0]
    assert (one.calls, two.calls) == (1, 1)


def test_breakdown_of_a_plain_reward() -> None:
    assert breakdown(Fixed("one", [1.0, None, 0.0]), THREE) == (
        [{"one": 1.0}, {"one": None}, {"one": 0.0}],
        [1.0, None, 0.0],
    )


def test_nothing_to_score() -> None:
    assert breakdown(WeightedSum([Fixed("one", [])]), []) == ([], [])
    assert WeightedSum([Fixed("one", [])])([]) == []


@pytest.mark.parametrize("wrap", [lambda reward: reward, lambda reward: WeightedSum([reward])])
def test_wrong_number_of_scores(wrap: Callable[[Reward], Reward]) -> None:
    with pytest.raises(ValueError, match="'short' returned 2 scores for 3 rollouts"):
        breakdown(wrap(Fixed("short", [1.0, 0.0])), THREE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_numbers(value: float) -> None:
    with pytest.raises(ValueError, match="'broken' returned .* for rollout 1; return None for unscorable"):
        WeightedSum([Fixed("broken", [1.0, value, 0.0])])(THREE)
    with pytest.raises(ValueError, match="'broken'"):
        breakdown(Fixed("broken", [1.0, value, 0.0]), THREE)


def test_construction_errors() -> None:
    one, two = Fixed("one", []), Fixed("two", [])
    with pytest.raises(ValueError, match="at least one reward"):
        WeightedSum([])
    with pytest.raises(ValueError, match="2 rewards but 1 weights"):
        WeightedSum([one, two], weights=[1.0])
    with pytest.raises(ValueError, match=r"named \['one'\]"):
        WeightedSum([one, two, Fixed("one", [])])
    with pytest.raises(ValueError, match="finite"):
        WeightedSum([one], weights=[float("nan")])


def test_from_yaml_with_short_names() -> None:
    text = r"""
reward:
  class_path: WeightedSum
  init_args:
    rewards:
      - class_path: ExactMatch
        init_args:
          pattern: '\s*<think>(?:(?!</?(?:think|answer)>).)*</think>\s*<answer>((?:(?!</?(?:think|answer)>).)*)</answer>\s*'
      - class_path: NumericMatch
        init_args: {tolerance: 0.5}
      - class_path: ThinkAnswerFormat
      - class_path: RegexFormat
        init_args: {pattern: '.*5.*', name: five}
    weights: [1.0, 0.5, 0.25, 0.125]
"""
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--reward", type=Reward)
    reward = parser.instantiate_classes(parser.parse_string(text)).reward
    assert [type(part) for part in reward.rewards] == [ExactMatch, NumericMatch, ThinkAnswerFormat, RegexFormat]
    well_formed, trailing, hidden = make_rollouts(
        "<think>2 + 3\n< 6</think>\n<answer> 5 </answer>",
        "<think>2 + 3</think><answer>5</answer> done",
        "<think>5</think><answer>5.4</answer>",
    )
    parts, totals = breakdown(reward, [well_formed, trailing, hidden])
    assert parts == [
        {"exact_match": 1.0, "numeric_match": 1.0, "format": 1.0, "five": 1.0},
        {"exact_match": 0.0, "numeric_match": 1.0, "format": 0.0, "five": 1.0},
        {"exact_match": 0.0, "numeric_match": 1.0, "format": 1.0, "five": 1.0},
    ]
    assert totals == [1.875, 0.625, 0.875]


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("no tags 5", "no tags 5"),
        ("<think>4</think> 5", " 5"),
        ("4</think> 5", " 5"),
        ("<think>1</think>2<think>3</think>4", "4"),
        ("<think>5 and still thinking", ""),
        ("", ""),
    ],
)
def test_final_text_is_what_follows_the_reasoning(text: str, final: str) -> None:
    assert cut_final_text(text) == final


def test_final_answer_drops_the_worked_solution() -> None:
    assert cut_final_answer("4 + 4 = 8 #### no\n#### 1,080 ") == "1,080"
    assert cut_final_answer(" 72\n") == "72"
