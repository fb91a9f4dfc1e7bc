"""JSON that would lose something, or break later: one sentence with the file, the line and the way out."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from datamodules import InstructionDataModule, PreferenceDataModule, VerifiableDataModule
from datamodules.sources import Files, FlanTask, FlanTemplates
from modules.networks.tiny import tiny_tokenizer

DIGITS = "9" * 4301
DEEP = "[" * 600 + "1" + "]" * 600
ASKED = '{"role": "user", "content": "a"}'
CELLS = [  # what follows a question in a conversation
    ("deep", f'{{"role": "assistant", "content": "b", "id": {DEEP}}}', "nested more than 100 deep; flatten them$"),
    (
        "deeper",
        f'{{"role": "assistant", "content": "b", "id": {"[" * 100_000 + "]" * 100_000}}}',
        "nested more than 100 deep",
    ),
    ("digits", f'{{"role": "assistant", "content": "b", "id": {DIGITS}}}', "a number has more than 4300 digits"),
    ("twice", '{"role": "assistant", "content": "b", "content": "c"}', "the key 'content' stands twice in one object"),
    ("half", '{"role": "assistant", "content": "b\\ud83d"}', "the text holds half of a character"),
    ("python", "{'role': 'assistant', 'content': 'b', 'content': 'c'}", "the key 'content' stands twice in one object"),
    (
        "deep python",
        f"{{'role': 'assistant', 'content': 'b', 'id': {'[' * 120 + ']' * 120}}}",
        "nested more than 100 deep",
    ),
    ("python digits", f"{{'role': 'assistant', 'content': 'b', 'id': {DIGITS}}}", "a number has more than 4300 digits"),
]
WAY_OUT = "; mend the row, or set data.on_bad_row: drop to leave such rows out"


def read(kind: Any, path: Path, **settings: Any) -> Any:
    """Read the rows of a file as ``fit`` does."""
    data = kind(tiny_tokenizer(), str(path), chat=False, **settings)
    data.setup("fit")
    return data


def write_csv(path: Path, *rows: dict[str, str]) -> Path:
    """Write a table of text."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(("said", "sentence"), [cell[1:] for cell in CELLS], ids=[cell[0] for cell in CELLS])
def test_cells_are_read_as_strictly_as_files(tmp_path: Path, said: str, sentence: str) -> None:
    good = f'[{ASKED}, {{"role": "assistant", "content": "b"}}]'
    asked = ASKED if '"role"' in said else str(json.loads(ASKED))
    bad = {"messages": f"[{asked}, {said}]"}
    file = write_csv(tmp_path / "a.csv", {"messages": good}, bad)
    with pytest.raises(ValueError, match=rf"a\.csv:3: .*{sentence.rstrip('$')}") as raised:
        read(InstructionDataModule, file)
    assert str(raised.value).endswith(WAY_OUT)
    assert "\n" not in str(raised.value)
    dropped = read(InstructionDataModule, file, on_bad_row="drop")
    assert (len(dropped.train_rows), dropped.bad["train"]) == (1, 1)


@pytest.mark.parametrize("column", ["prompt", "chosen", "tools", "history", "options", "completions"])
def test_every_column_that_may_hold_json_is_strict(tmp_path: Path, column: str) -> None:
    twice = f'[{{"role": "user", "content": "a", "content": "{column}"}}]'
    row = {"prompt": "a", "completion": "b"}
    kind: Any = InstructionDataModule
    if column == "tools":
        row["tools"] = '[{"name": "f", "name": "g"}]'
    elif column == "options":
        row["options"] = '{"A": "b", "A": "c"}'
    elif column == "chosen":
        row, kind = {"prompt": "a", "chosen": twice.replace("user", "assistant"), "rejected": "c"}, PreferenceDataModule
    elif column == "completions":
        row, kind = {"prompt": "a", "completions": '[{"text": "b", "text": "c"}, {"text": "d"}]'}, PreferenceDataModule
    else:
        row[column] = twice
    settings = {} if kind is PreferenceDataModule else {"on_bad_row": "raise"}
    with pytest.raises(ValueError, match=r"a\.csv:2: .*the key '\w+' stands twice in one object; keep one of them"):
        kind(tiny_tokenizer(), str(write_csv(tmp_path / "a.csv", row)), **settings).setup("fit")


@pytest.mark.parametrize("answer", ['{"a": 1, "a": 2}', DEEP, f"[{DIGITS}]", "[" * 3000, '["\\ud83d"]'])
def test_text_that_only_looks_like_json_stays_text(tmp_path: Path, answer: str) -> None:
    file = write_csv(tmp_path / "a.csv", {"prompt": "a", "completion": answer})
    (row,) = read(InstructionDataModule, file, max_length=9000).train_rows
    assert answer in tiny_tokenizer().decode(row.ids)


FAULTS = [
    (
        "a.jsonl",
        f'{{"a": 1}}\n{{"a": {DIGITS}}}\n',
        r"a\.jsonl:2: a number has more than 4300 digits; write it as text",
    ),
    ("a.json", f'[{{"a": 1}},\n\n {{"b": "{DIGITS}", "a": -{DIGITS}}}]', r"a\.json:3: a number has more than 4300 d"),
    ("a.json", f'{{"a": {DIGITS}}}\n{{"a": 1}}', r"a\.json:1: a number has more than 4300 digits"),
    (
        "a.jsonl",
        '{"a": 1}\n{"b": 1, "c": 2, "b": 1}\n',
        r"a\.jsonl:2: the key 'b' stands twice in one object; keep one",
    ),
    ("a.jsonl", '{"a": {"b": 1, "\\u0062": [2]}}\n', r"a\.jsonl:1: the key 'b' stands twice"),
    ("a.json", '{"a": 1, "a": 2}\n{"a": 1}\n', r"a\.json:1: the key 'a' stands twice"),
    (
        "a.json",
        '[{"a": "{\\"b\\": 1, \\"b\\"", "c": ["d", "d"]},\n {"e": {"d": 1},\n  "d": "e",\n  "e": {}}]',
        r"a\.json:4: the key 'e' stands twice",
    ),
    ("a.json", f'[{{"a": 1}},\n {{"a": {DEEP}}}]', r"a\.json:2: lists and objects are nested more than 100 deep"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), FAULTS)
def test_files_are_read_strictly(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=sentence) as raised:
        Files(str(tmp_path / name)).rows()
    assert "\n" not in str(raised.value)


def test_what_may_stand_twice(tmp_path: Path) -> None:
    row = {"a": [{"b": 1}, {"b": 1}], "b": "b", "c": {"a": "9" * 5000, "b": 10**4000}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert Files(str(tmp_path / "a.jsonl")).rows()[0].columns == row


def test_templates_are_read_strictly(tmp_path: Path) -> None:
    name = "t.json"
    (tmp_path / name).write_text('[{"input": "{a}",\n "target": "{b}", "input": "{b}"}]')
    (tmp_path / "a.jsonl").write_text('{"a": "x", "b": "y"}\n')
    with pytest.raises(ValueError, match=rf"{name}:2: the key '?input'? stands twice"):
        FlanTemplates(
            {"t": FlanTask(str(tmp_path / "a.jsonl"), str(tmp_path / name))}, num_examples=1, few_shot=0.0
        ).rows()


def test_prompts_of_verifiable_rows(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", {"prompt": f'[{ASKED.replace("}", ", ")}"content": "b"}}]', "answer": "5"})
    with pytest.raises(ValueError, match=r"a\.csv:2: .*the key 'content' stands twice"):
        read(VerifiableDataModule, file)
