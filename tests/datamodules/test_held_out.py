"""Rows held out by share, the tokenizer that comes from the module, and the template that text prompts get."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from datamodules import (
    Addition,
    InstructionDataModule,
    MixtureDataModule,
    PreferenceDataModule,
    PretrainingDataModule,
    StreamingDataModule,
    VerifiableDataModule,
)
from datamodules.loaders.mixture_streams import Stream
from datamodules.loaders.ptx import PtxStream
from datamodules.sources.held_out import hold_out
from datamodules.sources.source import Row
from datamodules.tokens.encoding import encode_example, encode_prompt
from modules import SFTModule
from modules.__main__ import main
from modules.networks.tiny import tiny_tokenizer

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
CONFIGS = Path(__file__).parents[2] / "configs"
ROWS: list[dict[str, Any]] = [{"prompt": f"{n % 30}+1?", "completion": f"{n}", "answer": "2"} for n in range(40)]
KINDS: list[tuple[type[Any], Any]] = [
    (InstructionDataModule, lambda n: {"prompt": f"{n}+1?", "completion": f"{n + 1}"}),
    (PreferenceDataModule, lambda n: {"prompt": f"{n}+1?", "chosen": f"{n + 1}", "rejected": "no"}),
    (VerifiableDataModule, lambda n: {"prompt": f"{n}+1?", "answer": f"{n + 1}"}),
    (PretrainingDataModule, lambda n: {"text": f"{n} and {n + 1} " * 30}),
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(number: int, asks: int = 10**6) -> list[Row]:
    return [Row({"prompt": f"q{n % asks}", "completion": f"a{n}"}, f"f:{n}", "f") for n in range(number)]


@pytest.mark.parametrize(("kind", "row"), KINDS)
@pytest.mark.parametrize("val", [0.1, "0.1"])
def test_a_share_of_the_training_rows_is_held_out(
    kind: type[Any], row: Any, val: float | str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "rows.jsonl", [row(n) for n in range(40)])
    data = kind(tiny_tokenizer(), path, val, seed=3)
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert "val: 4 of 40 rows are held out of train, by their content and seed 3 (data.val 0.1)" in caplog.messages
    sides = [[each.origin for each in side.rows()] for side in (data.train, data.val)]
    assert [len(side) for side in sides] == [36, 4] and not set(sides[0]) & set(sides[1])
    again = kind(tiny_tokenizer(), path, val, seed=3)
    again.setup("validate")
    assert [each.origin for each in again.val.rows()] == sides[1]
    other = kind(tiny_tokenizer(), path, val, seed=4)
    other.setup("fit")
    assert [each.origin for each in other.val.rows()] != sides[1]


def test_rows_that_ask_the_same_stay_together() -> None:
    train, val = hold_out(rows(40, asks=10), 0.25, 0, {})
    asked = [{row.columns["prompt"] for row in side.rows()} for side in (train, val)]
    assert len(val.rows()) == 8 and len(asked[1]) == 2 and not asked[0] & asked[1]  # 12 would be as near to 10
    mapped = [Row({"mine": row.columns["prompt"], "b": n}, row.origin, "f") for n, row in enumerate(rows(40, asks=10))]
    by_hand = hold_out(mapped, 0.25, 0, {"prompt": "mine"})[1].rows()
    assert len({row.columns["mine"] for row in by_hand}) == 2
    for number, share, expected in ((2, 0.01, 1), (2, 0.99, 1), (100, 0.05, 5)):
        train, val = hold_out(rows(number), share, 0, {})
        assert (len(train.rows()), len(val.rows())) == (number - expected, expected)
    with pytest.raises(ValueError, match="f:0: all 5 rows ask the same, so none can be held out"):
        hold_out(rows(5, asks=1), 0.5, 0, {})


@pytest.mark.parametrize("columns", [{}, {"prompt": "info.title"}])
def test_what_an_object_asks_counts(columns: dict[str, str]) -> None:
    def compare(number: int) -> Row:
        info = {"post": f"post {number % 10}", "title": f"title {number % 10}"}
        summaries = [{"text": f"{number}a"}, {"text": f"{number}b"}]
        return Row({"info": info, "summaries": summaries, "choice": number % 2}, f"f:{number}", "f")

    train, val = hold_out([compare(number) for number in range(40)], 0.25, 0, columns)
    posts = [{row.columns["info"]["post"] for row in side.rows()} for side in (train, val)]
    assert len(val.rows()) == 8 and len(posts[1]) == 2 and not posts[0] & posts[1]


def test_the_side_of_a_row_does_not_depend_on_the_order() -> None:
    given = rows(50)
    held = {row.origin for row in hold_out(given, 0.2, 0, {})[1].rows()}
    assert held == {row.origin for row in hold_out(given[::-1], 0.2, 0, {})[1].rows()}


def test_verdicts_are_settled_on_all_rows(tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{n}", "output_1": "a", "output_2": "b", "preference": int(n == 7)} for n in range(40)]
    data = PreferenceDataModule(tiny_tokenizer(), write(tmp_path / "p.jsonl", pairs), 0.05, first_is_better=0)
    data.setup("fit")
    assert {tuple(row.ranks) for row in data.val_rows} == {(0, 1)}  # a column of zeros alone would be ties


@pytest.mark.parametrize("val", [0.0, 1.0, 1.5, -0.1, "2", float("nan")])
def test_a_share_lies_between_0_and_1(val: float | str) -> None:
    with pytest.raises(
        ValueError, match="val must be a share between 0 and 1, such as 0.05, or name held-out rows; got"
    ):
        InstructionDataModule(tiny_tokenizer(), "a.jsonl", val)


def test_streams_take_no_share() -> None:
    with pytest.raises(ValueError, match="the rows of a stream cannot be held out"):
        StreamingDataModule(tiny_tokenizer(), "a.jsonl", 1, val="0.1")
    with pytest.raises(ValueError, match="stream a: val 0.1 is a share; name held-out rows"):
        MixtureDataModule(tiny_tokenizer(), {"a": Stream("a.jsonl", val="0.1")}, 1)


def test_texts_of_ptx_are_held_out(tmp_path: Path) -> None:
    texts = write(tmp_path / "t.jsonl", [{"text": f"{n} " * 40} for n in range(20)])
    stream = PtxStream(texts, rows_per_update=1, max_length=128, val=0.2)
    data = VerifiableDataModule(tiny_tokenizer(), Addition(8), ptx=stream)
    data.setup("fit")
    assert (len(stream.train.rows()), len(stream.val.rows())) == (16, 4) and list(data.domains) == ["val"]  # type: ignore[union-attr]


def test_the_tokenizer_of_the_module(tmp_path: Path) -> None:
    module, path = SFTModule("tiny"), write(tmp_path / "my.jsonl", ROWS)
    data = InstructionDataModule(train=path, val=0.1)
    Trainer(**QUIET, max_steps=1).fit(module, datamodule=data)
    assert data.tokenizer is module.tokenizer and len(data.train_rows) + len(data.val_rows) == 40
    with pytest.raises(ValueError, match="InstructionDataModule was given no tokenizer and no module has one"):
        InstructionDataModule(train=path).setup("fit")


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        (InstructionDataModule, "train"),
        (PreferenceDataModule, "train"),
        (VerifiableDataModule, "train"),
        (StreamingDataModule, "train, steps_per_epoch"),
        (MixtureDataModule, "streams, num_steps"),
    ],
)
def test_what_is_missing_is_named(kind: type[Any], missing: str) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} needs {missing}: .*configs/tiny/<method>.yaml runs offline"):
        kind()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(CONFIGS / "dpo.yaml"), "--model.policy", "nosuch/model"])
    said = capsys.readouterr().err
    assert "PreferenceDataModule needs train: add --data.train my.jsonl; with nothing of your own" in said
    assert "configs/tiny/dpo.yaml runs offline" in said and len(said.strip().splitlines()) == 1
    write(tmp_path / "my.jsonl", ROWS)
    options = ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.logger=false", "--data.val", "0.1"]
    main(["fit", "--model=SFTModule", "--model.policy=tiny", "--data.train=my.jsonl", *options])


CHATS = "text prompts are user messages of the chat template"


@pytest.mark.parametrize("kind", [InstructionDataModule, PreferenceDataModule, VerifiableDataModule])
@pytest.mark.parametrize(
    ("chat", "template", "source", "expected"),
    [
        (None, True, "file", CHATS),
        (None, False, "file", "text prompts are plain text (the tokenizer has no chat template)"),
        (False, True, "file", "text prompts are plain text (data.chat: false)"),
        (None, True, "sums", "text prompts are plain text (as their source says)"),
        (True, True, "sums", CHATS),
    ],
)
def test_text_prompts_are_chats_by_rule_and_it_is_said(
    kind: type[Any],
    chat: bool | None,
    template: bool,
    source: str,
    expected: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from datamodules.sources.toys.addition import AdditionPairs

    tokenizer = tiny_tokenizer()
    if not template:
        tokenizer.chat_template = None
    row = dict(KINDS)[kind](1)
    sums = AdditionPairs(1) if kind is PreferenceDataModule else Addition(1)
    data = kind(tokenizer, sums if source == "sums" else write(tmp_path / "a.jsonl", [row]), chat=chat)
    with caplog.at_level("INFO"):
        data.setup("fit")
    (line,) = (message for message in caplog.messages if "text prompts" in message)
    assert expected in line and line.count("text prompts") == 1
    asked = sums.rows()[0].columns["prompt"] if source == "sums" else row["prompt"]
    ids = encode_prompt(tokenizer, asked, "here", chat=expected == CHATS)[1]
    if kind is VerifiableDataModule:
        assert data.train_prompts[0].ids == ids
    elif kind is PreferenceDataModule:
        assert data.train_rows[0].prompt == ids
    else:
        assert data.train_rows[0].ids[: len(ids)] == ids


def test_a_prompt_that_is_rendered_already_is_no_message(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    text, ids = encode_prompt(tokenizer, "1+1?", "here", chat=True)
    path = write(tmp_path / "a.jsonl", [{"prompt": text, "completion": "2", "answer": "2"}])
    learned, asked = InstructionDataModule(tokenizer, path), VerifiableDataModule(tokenizer, path)
    for data in (learned, asked):
        data.setup("fit")
    end = encode_example(tokenizer, "1+1?", "2", "here", chat=True)
    assert learned.train_rows[0].ids == end.ids[:-1]  # without the line break behind the end of the turn
    assert asked.train_prompts[0].ids == ids


@pytest.mark.parametrize(("kind", "make"), KINDS)
def test_rows_of_a_test_split_are_not_trained_on(tmp_path, kind, make):
    """They may be a file's validation rows, and with the column left out all rows are learned."""
    path = write(tmp_path / "rows.jsonl", [{**make(n), "split": "test" if n == 7 else "train"} for n in range(8)])
    with pytest.raises(ValueError, match=r"rows.jsonl:8: column 'split' holds 'test' here and 'train' in other rows"):
        kind(tiny_tokenizer(), path).setup("fit")
    kind(tiny_tokenizer(), path, columns={"split": ""}).setup("fit")
    alone = write(tmp_path / "train.jsonl", [{**make(n), "split": "train"} for n in range(8)])
    kind(tiny_tokenizer(), alone, val=write(tmp_path / "test.jsonl", [{**make(9), "split": "test"}])).setup("fit")
