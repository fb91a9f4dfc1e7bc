"""Addition and reasoning-gym: answers are right, and no training set shows a held-out problem."""

import re
import sys

import pytest

from datamodules import Addition, AdditionPairs, NumberTexts, ReasoningGym
from datamodules.sources.toys.addition import is_held_out


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-align\[reasoning\]'"):
        ReasoningGym("chain_sum", 1).rows()


def test_addition_writes_the_reversed_sum() -> None:
    row = Addition(num_examples=1).rows()[0].columns
    first, second = row["prompt"].rstrip("=").split("+")
    assert len(first) == len(second) == 2
    assert int(row["answer"][::-1]) == int(first) + int(second)
    assert len(row["answer"]) == 3 and row["completion"] == row["answer"]
    rows = {
        row.columns["prompt"]: row.columns["answer"]
        for row in [*Addition(8000).rows(), *Addition(900, held_out=True).rows()]
    }
    assert [
        rows.get(prompt, answer) for prompt, answer in (("23+45=", "860"), ("99+99=", "891"), ("00+07=", "700"))
    ] == ["860", "891", "700"]


def pairs(source: Addition) -> list[frozenset[str]]:
    return [frozenset(row.columns["prompt"].rstrip("=").split("+")) for row in source.rows()]


def test_addition_holds_pairs_out_in_both_orders_under_every_seed() -> None:
    held_out = set(pairs(Addition(200, held_out=True, seed=5)))
    sizes = {side: available(side) for side in (False, True)}
    assert sizes[False] + sizes[True] == 100 * 100 and 800 < sizes[True] < 1200
    everything = Addition(sizes[False]).rows()
    assert len({row.columns["prompt"] for row in everything}) == sizes[False]
    assert held_out.isdisjoint(pairs(Addition(sizes[False])))
    assert held_out.isdisjoint(pairs(Addition(500, seed=1)))


def available(held_out: bool) -> int:
    with pytest.raises(ValueError, match="has only") as raised:
        Addition(10000, held_out=held_out).rows()
    return int(str(raised.value).split("has only ")[1].split()[0])


def test_addition_seeds_and_limits() -> None:
    assert Addition(20, seed=1).rows() == Addition(20, seed=1).rows() != Addition(20, seed=2).rows()
    with pytest.raises(ValueError, match="num_examples is 10000 but 2-digit addition has only"):
        Addition(10000).rows()
    with pytest.raises(ValueError, match="digits must be 1 to 3, got 4"):
        Addition(1, digits=4)
    with pytest.raises(ValueError, match="num_examples must be at least 1"):
        Addition(0)


def chain_sum(size: int, **settings: object) -> ReasoningGym:
    return ReasoningGym("chain_sum", size, options={"max_terms": 2, "max_digits": 2}, **settings)  # type: ignore[arg-type]


def test_reasoning_gym_rows() -> None:
    rows = chain_sum(300, completion="<think>{question}</think><answer>{answer}</answer>").rows()
    questions = [row.columns["question"] for row in rows]
    assert len(set(questions)) == len(questions) == 300
    for row in rows:
        first, sign, second = row.columns["question"].removesuffix(" =").split(": ")[1].split()
        assert int(row.columns["answer"]) == int(first) + (int(second) if sign == "+" else -int(second))
        assert (
            row.columns["completion"]
            == f"<think>{row.columns['question']}</think><answer>{row.columns['answer']}</answer>"
        )
    assert "completion" not in chain_sum(1).rows()[0].columns
    row = chain_sum(1, completion="{expression} = {answer}").rows()[0].columns
    assert row["completion"] == f"{row['metadata']['expression']} = {row['answer']}"


def test_reasoning_gym_holds_questions_out_under_every_seed() -> None:
    held_out = {row.columns["question"] for row in chain_sum(150, held_out=True, seed=3).rows()}
    training = {row.columns["question"] for seed in (0, 3, 99) for row in chain_sum(2000, seed=seed).rows()}
    assert len(held_out) == 150 and held_out.isdisjoint(training)


def test_reasoning_gym_refusals() -> None:
    with pytest.raises(ValueError, match="size is 5000 but only .* distinct training problems of chain_sum"):
        ReasoningGym("chain_sum", 5000, options={"max_terms": 2, "max_digits": 1}).rows()
    with pytest.raises(ValueError, match="refuses task 'no_such_task'"):
        ReasoningGym("no_such_task", 1).rows()
    with pytest.raises(ValueError, match="refuses task 'chain_sum' with {'colour': 'red'}"):
        ReasoningGym("chain_sum", 1, options={"colour": "red"}).rows()
    with pytest.raises(ValueError, match="may only use the fields"):
        ReasoningGym("chain_sum", 1, completion="{solution}").rows()


def test_pairs_of_sums_are_right_and_wrong_by_one_digit_and_differ_in_dots() -> None:
    rows = [row.columns for row in AdditionPairs(2000, dots=6, longer_chosen=0.7).rows()]
    longer = 0
    for row in rows:
        right, wrong = row["chosen"].rstrip("."), row["rejected"].rstrip(".")
        first, second = row["prompt"].rstrip("=").split("+")
        assert int(right[::-1]) == int(first) + int(second) and right == row["answer"]
        assert len(wrong) == 3 and sum(a != b for a, b in zip(right, wrong, strict=True)) == 1
        assert len(row["chosen"]) != len(row["rejected"])
        longer += len(row["chosen"]) > len(row["rejected"])
    assert 0.66 < longer / len(rows) < 0.74
    assert (
        AdditionPairs(2000, dots=6, longer_chosen=0.7).rows() == AdditionPairs(2000, dots=6, longer_chosen=0.7).rows()
    )
    assert all(row.columns["chosen"] == row.columns["answer"] for row in AdditionPairs(20).rows())


def test_dots_follow_the_sum() -> None:
    completions = {row.columns["completion"][3:] for row in Addition(500, dots=2).rows()}
    assert completions == {"", ".", ".."}


@pytest.mark.parametrize("settings", [{"dots": -1}, {"longer_chosen": 1.5}])
def test_pairs_refuse_values_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="dots must be|longer_chosen must lie"):
        AdditionPairs(10, **settings)  # type: ignore[arg-type]


def test_texts_of_sums_are_right_and_hold_no_held_out_pair():
    rows = NumberTexts(200).rows()
    found = [re.fullmatch(r"(\d\d),(\d\d):(\d{3})", item) for row in rows for item in row.columns["text"].split(" ")]
    assert len(found) == 200 * 12 and all(found)
    for a, b, total in (match.groups() for match in found):
        assert int(a) + int(b) == int(total[::-1]) and not is_held_out(int(a), int(b))
    assert rows == NumberTexts(200).rows() != NumberTexts(200, seed=1).rows()


def test_texts_of_counting_have_equal_steps():
    for item in NumberTexts(50, subject="counting").rows()[7].columns["text"].rstrip(";").split("; "):
        first, second, third, fourth = map(int, item.split(" "))
        assert 1 <= second - first == third - second == fourth - third <= 9
    with pytest.raises(ValueError, match="sums or counting"):
        NumberTexts(5, subject="tales")
