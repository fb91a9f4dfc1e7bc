"""Text for continued pretraining: all of it is learned, nothing is dropped, and rows are full."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_instruction_resume import Unigram, fit

from datamodules import PretrainingDataModule
from modules.networks.tiny import tiny_tokenizer

TEXTS = ["abc" * 40, "hello", "x" * 7, "a longer sentence of forty characters ..."]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(train: str, **settings: Any) -> PretrainingDataModule:
    module = PretrainingDataModule(tiny_tokenizer(), train, max_length=32, **settings)
    module.setup("fit")
    return module


def test_all_tokens_are_kept_and_learned_but_the_first_of_each_piece(tmp_path: Path) -> None:
    module = loaded(write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS]))
    rows = module.train_rows
    begins = [tiny_tokenizer()(text).input_ids for text in TEXTS]
    total = sum(len(ids) + 1 for ids in begins)  # and an end token each
    assert sum(len(row.ids) for row in rows) == total
    assert module.dropped == {"train": 0, "val": 0}
    pieces = sum(len(row.documents) for row in rows)
    assert pieces == sum(-(-(len(ids) + 1) // 32) for ids in begins) > len(TEXTS)
    assert sum(sum(row.supervised) for row in rows) == total - pieces
    assert all(len(row.ids) <= 32 and sum(row.documents) == len(row.ids) for row in rows)
    assert sum(row.ids.count(tiny_tokenizer().eos_token_id) for row in rows) == len(TEXTS)


def test_other_columns_other_rows_and_domains(tmp_path: Path) -> None:
    other = write(tmp_path / "b.jsonl", [{"content": "abcdef"}])
    assert (
        loaded(other, columns={"text": "content"}).train_rows
        == loaded(write(tmp_path / "c.jsonl", [{"text": "abcdef"}])).train_rows
    )
    asked = write(tmp_path / "d.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    (row,) = loaded(asked).train_rows
    assert row.supervised == [False] + [True] * (len(row.ids) - 1)
    module = loaded(asked, val={"web": other.replace("b.jsonl", "c.jsonl"), "sums": asked})
    assert list(module.domains) == ["web", "sums"]
    assert all(row.documents for row in module.val_rows)


def test_bad_rows_are_named_or_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "e.jsonl", [{"text": "abc"}, {"text": True}, {"text": "abd"}])
    with pytest.raises(ValueError, match="e.jsonl:2"):
        loaded(path)
    assert loaded(path, on_bad_row="drop").bad["train"] == 1


def test_a_real_run(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [{"text": text} for text in TEXTS * 5])
    model = Unigram()
    fit(model, PretrainingDataModule(tiny_tokenizer(), path, max_length=32, batch_size=4), max_epochs=1)
    assert all(len(row) <= 32 for rows in model.seen for row in rows)
