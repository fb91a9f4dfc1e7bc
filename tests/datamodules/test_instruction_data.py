"""What InstructionDataModule does with its rows: domains, knowledge, packing, bad rows."""

import pytest

from datamodules import Addition, Facts, InstructionDataModule
from datamodules.sources import Row, Source
from modules.networks.tiny import tiny_tokenizer


class Rows(Source):
    """A source that gives the rows it was made with."""

    def __init__(self, *columns: dict) -> None:
        self.columns = columns

    def rows(self):
        return [Row(dict(columns), f"rows#{index}", "rows") for index, columns in enumerate(self.columns)]


def data(*columns, **settings) -> InstructionDataModule:
    module = InstructionDataModule(tiny_tokenizer(), Rows(*columns), **{"chat": False, **settings})
    module.setup("fit")
    return module


def learned(module: InstructionDataModule) -> list[str]:
    return [
        module.tokenizer.decode(
            [token for token, kept in zip(row.ids, row.supervised, strict=True) if kept], skip_special_tokens=True
        )
        for row in module.train_rows
    ]


KNOWLEDGE = [
    {"prompt": f"{name}=", "completion": "x", "knowledge": name}
    for name in ("HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown")
]


@pytest.mark.parametrize(
    ("unknown", "expected"),
    [("keep", ["x", "x", "x", "x"]), ("drop", ["x", "x"]), ("idk", ["x", "x", "x", "I don't know."])],
)
def test_what_the_model_does_not_know_is_kept_dropped_or_disowned(unknown, expected):
    module = data(*KNOWLEDGE, unknown=unknown)
    assert learned(module) == expected
    assert module.dropped["train"] == module.bad["train"] == 0


def test_held_out_rows_are_left_as_they_are():
    module = data(*KNOWLEDGE, unknown="drop", val=Rows(*KNOWLEDGE))
    assert len(module.val_rows) == 4


def test_nothing_known_is_said_so():
    with pytest.raises(ValueError, match="of 1 train rows from here on none is left: 1 left out"):
        data(KNOWLEDGE[3], unknown="drop")


def test_domains_are_loaded_by_name():
    module = data({"text": "abc"}, val={"sums": Addition(5, held_out=True), "facts": Facts(3)}, batch_size=2)
    assert {name: len(rows) for name, rows in module.domains.items()} == {"sums": 5, "facts": 3}
    assert len(module.val_rows) == 8
    batches = list(module.domain_loader("facts"))
    assert sum(len(batch["input_ids"]) for batch in batches) == 3
    assert [len(data({"text": "abc"}, val=Facts(3)).domains["val"])] == [3]


def test_bad_rows_are_counted_or_named():
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": None},
        {"prompt": "a"},
        {"prompt": "a", "completion": "b" * 50},
    ]
    module = data(*rows, on_bad_row="drop", max_length=20)
    assert (len(module.train_rows), module.bad["train"], module.dropped["train"]) == (1, 2, 1)
    with pytest.raises(ValueError, match="rows#1: column 'completion' holds a NoneType"):
        data(*rows)


def test_packed_rows_hold_every_token_once():
    plain, packed = data(*[{"text": "x" * size} for size in (3, 7, 4, 9)]), None
    packed = data(*[{"text": "x" * size} for size in (3, 7, 4, 9)], packing=True, max_length=16)
    assert sum(len(row.ids) for row in packed.train_rows) == sum(len(row.ids) for row in plain.train_rows)
    assert sum(sum(row.supervised) for row in packed.train_rows) == sum(sum(row.supervised) for row in plain.train_rows)
    assert len(packed.train_rows) == 2 and max(len(row.ids) for row in packed.train_rows) <= 16


def test_the_system_message_and_the_mask_are_as_asked():
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "p"), ("assistant", "one"), ("user", "q"), ("assistant", "two"))
    ]
    assert [text.split() for text in learned(data({"messages": turns}))] != [
        text.split() for text in learned(data({"messages": turns}, loss_on="last"))
    ]
    assert "one" not in learned(data({"messages": turns}, loss_on="last"))[0]
    row = data({"messages": turns}, loss_on="all", system="be brief").train_rows[0]
    assert row.supervised == [False] + [True] * (len(row.ids) - 1)
    assert "be brief" in data({"messages": turns}, system="be brief").tokenizer.decode(row.ids)


def test_a_misspelt_format_is_refused():
    with pytest.raises(ValueError, match="format 'alpacca' is not known"):
        data({"text": "a"}, format="alpacca")
