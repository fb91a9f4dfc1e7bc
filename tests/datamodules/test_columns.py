"""Which columns are found, how others are mapped, and what a message says about a missing one."""

import json
import logging
import pickle
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules import InstructionDataModule, VerifiableDataModule
from datamodules.formats.prompt_shapes import read_gold, verifiable_example
from datamodules.formats.reading import Reading
from datamodules.sources import Row
from modules.networks.tiny import tiny_tokenizer
from modules.types import ALPACA_PROMPT_WITH_INPUT

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def row(**columns: Any) -> Row:
    return Row(columns, "data.jsonl:3", "data")


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("columns", "mapping", "prompt", "answer", "info"),
    [
        ({"prompt": "x", "answer": "y", "level": 3}, {}, "x", "y", {"level": 3}),
        ({"question": "x", "answer": "work\n#### 1,080"}, {}, "x", "1080", {}),
        ({"question": "x", "ground_truth": 27.0}, {}, "x", "27.0", {"ground_truth": 27.0}),
        ({"prompt": [USER], "solution": None}, {}, [USER], None, {"solution": None}),
        (
            {"problem": "x", "answer": "025", "solution": "long"},
            {"question": "problem"},
            "x",
            "025",
            {"solution": "long"},
        ),
        (
            {"prompt": "x", "answer": "old", "final": "y"},
            {"answer": "final"},
            "x",
            "y",
            {"answer": "old", "final": "y"},
        ),
        ({"prompt": "x", "answer": ["y"]}, {}, "x", "y", {}),
        ({"prompt": "x", "answer": float("nan")}, {}, "x", None, {}),
        ({"prompt": "x", "a.b": "y"}, {"answer": "a.b"}, "x", "y", {"a.b": "y"}),
        (
            {"prompt": "x", "check": {"gold": {"text": "y"}}},
            {"answer": "check.gold.text"},
            "x",
            "y",
            {"check": {"gold": {"text": "y"}}},
        ),
    ],
)
def test_verifiable_columns(
    columns: dict[str, Any], mapping: dict[str, str], prompt: object, answer: object, info: dict[str, Any]
) -> None:
    example = verifiable_example(row(**columns), Reading("verifiable", mapping))
    assert (example.prompt, example.answer, example.info) == (prompt, answer, info)
    assert (example.origin, example.source) == ("data.jsonl:3", "data")


def test_read_golds() -> None:
    for given, expected in (
        ("#### 5", "5"),
        ("a #### b\n#### -1,234,567 ", "-1234567"),
        ("(1,8,19), (2,700,13)", "(1,8,19), (2,700,13)"),
        ("025", "025"),
    ):
        assert read_gold(given) == expected
    assert read_gold(None) is None and read_gold(12) == "12"


REFUSED = [
    (
        {"document": "x", "label": 1},
        {},
        "found the columns document, label; looked for messages, prompt \\+ completion, prompt \\+ answer, instruction",
    ),
    (
        {"prompt": "x", "completion": "y"},
        {"completion": "target"},
        "no column 'target' \\(for completion\\); found prompt, completion",
    ),
    (
        {"prompt": "x", "completion": None},
        {},
        "column 'completion' holds a NoneType, text or a list of messages was expected",
    ),
    ({"prompt": "x", "completion": True}, {}, "column 'completion' holds a bool"),
    (
        {"instruction": "x", "output": ["a", 5]},
        {},
        "column 'output' holds a list, text or a list of messages was expected",
    ),
    ({"messages": "hi"}, {}, "column 'messages' holds a str, a list of messages was expected"),
    (
        {"messages": [USER, {"from": "bot", "value": "x"}]},
        {},
        "messages, message 1, has the role 'bot'; known are user, human",
    ),
    ({"messages": [{"role": "user", "content": None}]}, {}, "messages, message 0, must have a role and a content"),
]


@pytest.mark.parametrize(("columns", "mapping", "message"), REFUSED)
def test_bad_columns_are_refused_with_file_and_line_before_training(
    tmp_path: Path, columns: dict[str, Any], mapping: dict[str, str], message: str
) -> None:
    good = (
        {"messages": [USER, ASSISTANT]} if "messages" in columns else {"prompt": "x", "completion": "y", "target": "z"}
    )
    path = write(tmp_path / "data.jsonl", good, columns)
    with pytest.raises(ValueError, match=message) as raised:
        InstructionDataModule(tiny_tokenizer(), path, columns=mapping).setup("fit")
    assert str(raised.value).startswith(f"{path}:2: ")


def test_missing_verifiable_columns_are_refused_with_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"prompt": "x", "answer": "y"}, {"promt": "x", "answer": "y"})
    with pytest.raises(
        ValueError, match=f"{path}:2: found the columns promt, answer; .* did you mean prompt for promt"
    ):
        VerifiableDataModule(tiny_tokenizer(), path).setup("fit")
    with pytest.raises(ValueError, match="column 'answer' holds a list of 2 answers, a single answer was expected"):
        verifiable_example(row(prompt="x", answer=["a", "b"]), Reading("verifiable"))
    example = verifiable_example(row(prompt="x", answer='["", null]'), Reading("verifiable"))
    assert example.answer is None


def test_nested_columns_of_a_parquet_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "nested.parquet"
    pq.write_table(
        pa.Table.from_pylist([{"prompt": [USER], "reward_model": {"ground_truth": "34", "style": "rule"}}]), path
    )
    module = VerifiableDataModule(tiny_tokenizer(), str(path), columns={"answer": "reward_model.ground_truth"})
    module.setup("fit")
    assert module.train_prompts[0].example.answer == "34"
    with pytest.raises(
        ValueError, match=r"no row has the column 'reward_model.answer' \(for answer\); found prompt, reward_model"
    ):
        VerifiableDataModule(tiny_tokenizer(), str(path), columns={"answer": "reward_model.answer"}).setup("fit")


def test_other_columns_are_plain_enough_for_torchs_safe_loading(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    when = datetime(2024, 2, 1, 12, 30, tzinfo=UTC)
    other = {
        "when": when,
        "day": when.date(),
        "price": Decimal("1.50"),
        "raw": b"ab",
        "parts": [{"at": when.time()}, None],
        "n": 3,
        "x": 0.5,
    }
    pq.write_table(pa.Table.from_pylist([{"prompt": "x", "answer": "y", **other}]), tmp_path / "typed.parquet")
    module = VerifiableDataModule(tiny_tokenizer(), str(tmp_path / "typed.parquet"))
    module.setup("fit")
    info = module.train_prompts[0].example.info
    parts = [{"at": "12:30:00"}, None]
    assert info == {
        "when": "2024-02-01T12:30:00+00:00",
        "day": "2024-02-01",
        "price": "1.50",
        "raw": "b'ab'",
        "parts": parts,
        "n": 3,
        "x": 0.5,
    }
    torch.save(info, tmp_path / "info.pt")
    assert torch.load(tmp_path / "info.pt", weights_only=True) == info
    torch.save(other, tmp_path / "raw.pt")
    with pytest.raises(pickle.UnpicklingError):  # as they came they would have made the checkpoint unreadable
        torch.load(tmp_path / "raw.pt", weights_only=True)


def test_a_long_row_is_dropped_without_a_warning_about_its_length(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = write(tmp_path / "data.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a" * 1100, "completion": "b"})
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        InstructionDataModule(tiny_tokenizer(), path).setup("fit")
        assert "sequence length is longer" not in caplog.text
        tiny_tokenizer()("a" * 1100)
        assert "sequence length is longer" in caplog.text  # what was avoided
    finally:
        logger.removeHandler(caplog.handler)


def test_evaluating_without_held_out_rows_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"prompt": "x", "answer": "y", "completion": "z"})
    for kind in (InstructionDataModule, VerifiableDataModule):
        for stage in ("validate", "test"):
            with pytest.raises(ValueError, match="no held-out rows to evaluate; set data.val"):
                kind(tiny_tokenizer(), path).setup(stage)


def test_unknown_names_of_ours_are_refused_at_construction() -> None:
    for module in (InstructionDataModule, VerifiableDataModule):
        with pytest.raises(
            ValueError, match=r"columns maps unknown names promt \(did you mean prompt\?\); the names on the"
        ):
            module(tiny_tokenizer(), "data.jsonl", columns={"promt": "question"})


def test_alpaca_rows_are_chats_where_there_is_a_template(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"instruction": "add", "input": "1 2", "output": "3"})
    tokenizer = tiny_tokenizer()
    module = InstructionDataModule(tokenizer, path)
    module.setup("fit")
    chat = "<|im_start|>user\nadd\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    assert tokenizer.decode(module.train_rows[0].ids) == chat
    tokenizer.chat_template = None
    module = InstructionDataModule(tokenizer, path)
    module.setup("fit")
    assert (
        tokenizer.decode(module.train_rows[0].ids)
        == ALPACA_PROMPT_WITH_INPUT.format(instruction="add", input="1 2") + "3<|eos|>"
    )


def test_long_rows_are_dropped_and_counted_or_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "data.jsonl", {"prompt": "abc", "completion": "d"}, {"prompt": "abcd", "completion": "e"})
    module = InstructionDataModule(tiny_tokenizer(), path, max_length=5, chat=False)  # 3 + 1 + eos fit
    module.setup("fit")
    assert (len(module.train_rows), module.dropped) == (1, {"train": 1, "val": 0})
    with pytest.raises(ValueError, match=f"{path}:2: 6 tokens and the limit is 5"):
        InstructionDataModule(tiny_tokenizer(), path, max_length=5, drop_long=False, chat=False).setup("fit")
    with pytest.raises(
        ValueError, match="of 2 train rows from here on none is left: 0 left out, 0 bad, 2 longer than 4 tokens"
    ):
        InstructionDataModule(tiny_tokenizer(), path, max_length=4, chat=False).setup("fit")


def test_the_loaded_stage_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "data.jsonl", {"prompt": "abc", "completion": "d"}, {"prompt": "abcdef", "completion": "g"})
    with caplog.at_level("INFO"):
        InstructionDataModule(tiny_tokenizer(), path, max_length=5, chat=False).setup("fit")
    assert "train: prompt + completion; text prompts are plain text (data.chat: false); 2 rows in" in caplog.text
    assert "= 1 used + 1 too long; 40.0% of 5 tokens supervised" in caplog.text
