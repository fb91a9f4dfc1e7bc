"""Which prompts are kept and in which order they are drawn, on real files, with numbers worked out by hand."""

import json
from collections import Counter
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from datamodules import (
    Difficulty,
    EasyToHard,
    HarderLater,
    MixIn,
    MoPPS,
    Prioritised,
    PromptOrder,
    Source,
    VerifiableDataModule,
)
from datamodules.curriculum.orders import LearningOrder
from datamodules.formats.prompt_shapes import VerifiableExample
from modules.networks.tiny import tiny_tokenizer
from modules.types import PromptBatch

RATED = [
    {"pass_rate": 0.0, "guess_rate": 0.0, "pass_length": 9.0, "pass_truncated": 0.0},
    {"pass_rate": 0.25, "guess_rate": 0.0, "pass_length": 99.0, "pass_truncated": 0.5},
    {"pass_rate": 0.5, "guess_rate": 0.125, "pass_length": 9.0, "pass_truncated": 0.25},
    {"pass_rate": 0.75, "guess_rate": 0.0, "pass_length": 9.0, "pass_truncated": 0.5},
    {"pass_rate": 1.0, "guess_rate": 1.0, "pass_length": 9.0, "pass_truncated": 0.0},
    {"pass_rate": None, "guess_rate": 0.0, "pass_length": None, "pass_truncated": None},
]


def write(folder: Path, measures: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    rows = [{"prompt": f"p{number}", "answer": "1", **row} for number, row in enumerate(measures)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(train: str | Source, **settings: Any) -> VerifiableDataModule:
    module = VerifiableDataModule(tiny_tokenizer(), train, **{"chat": False, "prompts_per_phase": 2} | settings)
    module.setup("fit")
    return module


def texts(module: VerifiableDataModule) -> str:
    return " ".join(prompt.text for prompt in module.train_prompts)


@pytest.mark.parametrize(
    ("keep", "kept", "told"),
    [
        ({}, "p1 p2 p3", "3 used + 1 never right + 1 always right + 1 without pass_rate"),
        ({"above": 0.25, "below": 0.75}, "p2", "1 used + 1 never right + 1 too hard + 1 too easy + 1 always right"),
        ({"below": 0.51}, "p1 p2", "2 used + 1 never right + 1 too easy + 1 always right + 1 without pass_rate"),
        ({"above": None}, "p0 p1 p2 p3", "4 used + 1 always right + 1 without pass_rate"),
        ({"max_guess_rate": 0.0}, "p1 p3", "2 used + 1 never right + 1 right without thinking + 1 always right"),
        ({"max_length": 50}, "p2 p3", "2 used + 1 never right + 1 with long answers + 1 always right"),
        ({"max_truncated": 0.25}, "p2", "1 used + 1 never right + 2 with answers cut off + 1 always right"),
        ({"above": None, "below": None, "max_guess_rate": 0.5}, "p0 p1 p2 p3 p5", "5 used + 1 right without thinking"),
    ],
)
def test_prompts_out_of_bounds_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keep: dict[str, float | None], kept: str, told: str
) -> None:
    rows = write(tmp_path, RATED)
    with caplog.at_level("INFO"):
        module = load(rows, val=rows, keep=Difficulty(**keep))
    assert texts(module) == kept
    assert f"6 rows in = {told}" in caplog.text
    assert len(module.val_prompts) == 6  # what is measured on held-out prompts does not depend on it
    info = module.train_prompts[0].example.info
    assert info == RATED[int(kept[1])]  # the columns still reach rewards


def test_a_column_of_another_name_or_in_csv_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,answer,solved\na,1,0.5\nb,1,1\nc,1,\n")
    module = load(str(tmp_path / "rows.csv"), columns={"pass_rate": "solved"}, keep=Difficulty())
    assert texts(module) == "a"
    nested = tmp_path / "nested.jsonl"
    nested.write_text('{"prompt": "a", "extra": {"rate": 0.5}}\n{"prompt": "b", "extra": {"rate": 0}}\n')
    assert texts(load(str(nested), columns={"pass_rate": "extra.rate"}, keep=Difficulty())) == "a"
    bad = write(tmp_path, [{"pass_rate": "n/a"}, {"pass_rate": "0.5"}])
    assert texts(load(bad, keep=Difficulty(), on_bad_row="drop")) == "p1"
    assert texts(load(bad)) == "p0 p1"  # nothing asks for the column
    with pytest.raises(ValueError, match="columns maps pass_rate to 'extra.rate', and nothing reads it"):
        load(str(nested), columns={"pass_rate": "extra.rate"})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"above": 1.5}, r"keep.above is a share in \[0, 1\], got 1.5"),
        ({"above": 0.5, "below": 0.5}, r"keep.above \(0.5\) must be less than keep.below \(0.5\)"),
        ({"max_length": 0}, "keep.max_length is a number of tokens above 0, got 0"),
        ({"above": None, "below": None}, "keep asks for nothing; set one of its bounds"),
    ],
)
def test_bounds_out_of_range_are_refused(settings: dict[str, float | None], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Difficulty(**settings)


@pytest.mark.parametrize(
    ("measures", "settings", "sentence"),
    [
        ([{}, {}], {"keep": Difficulty()}, "data.keep reads pass_rate, and none of the 2 training rows has it"),
        (
            [{"pass_rate": 50}],
            {"keep": Difficulty()},
            r"rows.jsonl:1: column 'pass_rate' holds 50, a share in \[0, 1\] was",
        ),
        ([{"pass_rate": True}], {"keep": Difficulty()}, "column 'pass_rate' holds True, a share"),
        ([{"pass_rate": 0.0}, {"pass_rate": 1.0}], {"keep": Difficulty()}, "1 never right, 1 always right; move its"),
        ([{"pass_rate": 0.5}, {}], {"order": EasyToHard()}, "EasyToHard needs the pass_rate of every row, and 1 of 2"),
        ([{}], {"order": HarderLater()}, "HarderLater reads pass_rate, and none of the 1 training rows has it"),
        (
            [{"pass_rate": 0.75}],
            {"order": HarderLater()},
            "none of the 1 rows has a pass_rate of at most 0.5, the lowest",
        ),
        ([{"pass_rate": "n/a"}], {"order": Prioritised()}, "column 'pass_rate' holds 'n/a', a share"),
    ],
)
def test_rows_that_cannot_be_ordered_are_refused(
    tmp_path: Path, measures: list[dict[str, Any]], settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(write(tmp_path, measures), **settings)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Prioritised(rate=0), "data.order: rate must be > 0 and <= 1, got 0"),
        (lambda: Prioritised(floor=2, prior=-1), "floor must be >= 0 and <= 1, got 2; prior must be >= 0"),
        (lambda: MoPPS(target=1), "target must be > 0 and < 1, got 1"),
        (lambda: HarderLater(start=-1), "start must be >= 0, got -1"),
    ],
)
def test_numbers_of_orders_out_of_range_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_rows_read_twice_cannot_be_told_apart(tmp_path: Path) -> None:
    rows = write(tmp_path, RATED)
    with pytest.raises(ValueError, match=r"data.order Prioritised .* 2 training rows are called .*rows.jsonl:1; read"):
        load(MixIn(rows, rows, num=6), order=Prioritised())


def drawn(module: VerifiableDataModule, stretches: range) -> list[PromptBatch]:
    return [module.draw(number) for number in stretches]


EIGHT = [{"pass_rate": rate} for rate in (0.1, 0.9, 0.3, 0.7, 0.5, 0.2, 0.8, 0.6)]  # rows by ease: 1 6 3 7 4 2 5 0


def test_easy_to_hard_is_the_shuffled_stream_and_then_sorted(tmp_path: Path) -> None:
    rows = write(tmp_path, EIGHT)
    plain, ordered = load(rows, prompts_per_phase=3), load(rows, prompts_per_phase=3, order=EasyToHard(start=3))
    assert drawn(ordered, range(3)) == drawn(plain, range(3))
    later = [text for batch in drawn(ordered, range(3, 8)) for text in batch["prompt"]]
    assert later == [f"p{row}" for row in (1, 6, 3, 7, 4, 2, 5, 0, 1, 6, 3, 7, 4, 2, 5)]
    uids = [uid for batch in drawn(ordered, range(8)) for uid in batch["uid"]]
    assert len(set(uids)) == len(uids) == 24
    equal = load(write(tmp_path, [{"pass_rate": 0.5}] * 8), prompts_per_phase=8, order=EasyToHard())
    first, second = (batch["prompt"] for batch in drawn(equal, range(2)))
    assert sorted(first) == sorted(second) and first != second  # equal rates come in another order


def test_harder_later_is_the_shuffled_stream_and_then_that_of_hard_rows(tmp_path: Path) -> None:
    rows = write(tmp_path, EIGHT)
    order = HarderLater(start=3, max_pass_rate=0.5)
    plain, ordered = load(rows, prompts_per_phase=3), load(rows, prompts_per_phase=3, order=order)
    assert drawn(ordered, range(3)) == drawn(plain, range(3))
    later = [text for batch in drawn(ordered, range(3, 11)) for text in batch["prompt"]]
    assert Counter(later) == {"p0": 6, "p2": 6, "p4": 6, "p5": 6}  # 24 places for the four rows up to 0.5
    uids = [uid for batch in drawn(ordered, range(11)) for uid in batch["uid"]]
    assert len(set(uids)) == len(uids) == 33


class OnRank(VerifiableDataModule):
    """A DataModule that believes it is one of two processes."""

    place = 0

    @property
    def rank(self) -> int:
        return self.place

    @property
    def world_size(self) -> int:
        return 2


@pytest.mark.parametrize("make", [EasyToHard, lambda: HarderLater(start=1), Prioritised, MoPPS])
def test_two_ranks_share_the_stretch_of_one(tmp_path: Path, make: Any) -> None:
    rows = write(tmp_path, EIGHT)
    alone = load(rows, prompts_per_phase=4, order=make())
    for number in range(4):
        shares = []
        for rank in range(2):
            module = OnRank(tiny_tokenizer(), rows, chat=False, prompts_per_phase=4, order=make())
            module.place = rank
            module.setup("fit")
            shares.append(module.draw(number)["uid"])
        assert [uid for pair in zip(*shares, strict=True) for uid in pair] == alone.draw(number)["uid"]


def begin(order: PromptOrder, rates: list[float | None], seed: int = 0) -> PromptOrder:
    examples = [
        VerifiableExample(f"p{row}", None, {}, f"rows:{row}", "rows", measures={"pass_rate": rate})
        for row, rate in enumerate(rates)
    ]
    order.begin(examples, seed)
    return order


def count(order: PromptOrder, places: int, stretches: int) -> list[int]:
    rows = Counter(row for number in range(stretches) for row, _ in order.draw(number, places))
    return [rows[row] for row in range(order.rows)]


def assert_expected(counts: list[int], expected: list[float], stretches: int) -> None:
    """Compare how often rows were drawn with their chances, within five standard deviations."""
    for found, chance in zip(counts, expected, strict=True):
        assert abs(found - stretches * chance) <= 5 * sqrt(stretches * chance * (1 - chance)) + 1e-9, (counts, expected)


def test_the_probability_is_proportional_to_one_minus_success() -> None:
    order = begin(Prioritised(floor=0.0), [1.0, 0.5, 0.0])
    assert_expected(count(order, 1, 3000), [0, 1 / 3, 2 / 3], 3000)
    order = begin(Prioritised(floor=0.25, prior=0.75), [1.0, None, 0.5])  # weights 0.25, 0.25, 0.5
    assert_expected(count(order, 1, 3000), [1 / 4, 1 / 4, 1 / 2], 3000)
    # Two of three rows without replacement: the third is drawn first with 1/2, and second after either of the others,
    # 2 * 1/4 * (1/2) / (3/4) = 1/3; the others share what is left of two places.
    assert_expected(count(order, 2, 3000), [7 / 12, 7 / 12, 5 / 6], 3000)


def test_a_stretch_holds_no_row_twice_unless_rows_are_fewer_than_places() -> None:
    for order in (begin(Prioritised(floor=0.0), [0.0, 1.0, 1.0, 0.5]), begin(MoPPS(), [None] * 4)):
        for number in range(50):
            assert len({row for row, _ in order.draw(number, 4)}) == 4
        found = [entry for number in range(5) for entry in order.draw(number, 10)]
        assert len(set(found)) == 50  # every instance has a name of its own
        assert all(
            2 <= times <= 3
            for number in range(5)
            for times in Counter(row for row, _ in order.draw(number, 10)).values()
        )
    order = begin(Prioritised(floor=0.0), [0.0, 1.0, 1.0, 0.5])
    for number in range(50):
        assert {row for row, _ in order.draw(number, 3)} > {0, 3}  # of weight 0 only where the others do not suffice
    for each in (order, begin(MoPPS(), [None] * 4)):
        assert len({each.draw(number, 4)[0][0] for number in range(50)}) == 4  # the order in a stretch tells nothing


def test_draws_depend_on_seed_number_and_what_was_learned_alone() -> None:
    for make in (Prioritised, MoPPS):
        order, again, other = (begin(make(), [None] * 20, seed) for seed in (0, 0, 1))
        stretches = [order.draw(number, 5) for number in range(4)]
        assert [again.draw(number, 5) for number in reversed(range(4))] == stretches[::-1]
        assert other.draw(0, 5) != stretches[0] and stretches[1] != stretches[2]
        assert isinstance(order, LearningOrder)
        order.learn({row: (4, 4) for row, _ in stretches[0]})
        assert order.draw(1, 5) != stretches[1]


def test_success_rates_by_hand() -> None:
    order = begin(Prioritised(rate=0.5, prior=0.5), [None, 0.25])
    assert isinstance(order, Prioritised)
    order.learn({0: (3, 4)})  # 0.5 + 0.5 (0.75 - 0.5)
    assert order.success.tolist() == [0.625, 0.25]
    order.learn({0: (0, 4), 1: (4, 4)})
    assert order.success.tolist() == [0.3125, 0.625]
    assert order.weights() == [0.6875, 0.375]


def test_posteriors_by_hand_and_draws_near_the_target() -> None:
    order = begin(MoPPS(target=0.5, decay=0.5), [None] * 3)
    assert isinstance(order, MoPPS)
    order.learn({0: (3, 4)})
    order.learn({0: (1, 4), 2: (0, 2)})
    # right: 1 -> 0.5 + 0.5 + 3 = 4 -> 2 + 0.5 + 1; wrong: 1 -> 0.5 + 0.5 + 1 = 2 -> 1 + 0.5 + 3
    assert order.right.tolist() == [3.5, 1.0, 1.0] and order.wrong.tolist() == [4.5, 1.0, 3.0]
    uniform = begin(MoPPS(target=0.5), [None] * 4)
    assert_expected(count(uniform, 1, 2000), [1 / 4] * 4, 2000)
    known = begin(MoPPS(target=0.5, decay=1.0), [None] * 3)
    assert isinstance(known, MoPPS)
    known.learn({0: (200, 200), 1: (100, 200), 2: (0, 200)})
    assert count(known, 1, 200) == [0, 200, 0]
    hard = begin(MoPPS(target=0.01, decay=1.0), [None] * 3)
    assert isinstance(hard, MoPPS)
    hard.learn({0: (200, 200), 1: (100, 200), 2: (0, 200)})
    assert count(hard, 1, 200) == [0, 0, 200]
