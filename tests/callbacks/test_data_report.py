"""DataReport in a real Trainer, over rows with planted faults."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.data_report import DataReport, find_documents, guess_languages, write_markdown_table, write_table
from datamodules import InstructionDataModule, PreferenceDataModule
from datamodules.preference import PreferenceTokens
from datamodules.sources import Row, Source
from datamodules.tokens.encoding import Tokens
from modules import SFTModule
from modules.networks.tiny import tiny_tokenizer

ENGLISH = "The children walked to the river and watched the boats until the evening."
GERMAN = "Die Kinder gingen zum Fluss und schauten den Booten bis zum Abend zu."
PAIRS = [("a?", ENGLISH), ("a?", ENGLISH), ("a?", GERMAN), ("b?", "- one\n- two"), ("c?", "Sure, c."), ("d?", "x")]


class Pairs(Source):
    def __init__(self, pairs: list[tuple[str, str]], columns: tuple[str, ...] = ("prompt", "completion")) -> None:
        self.pairs, self.columns = pairs, columns

    def rows(self) -> list[Row]:
        return [
            Row(dict(zip(self.columns, pair, strict=True)), f"pairs:{place}", "pairs")
            for place, pair in enumerate(self.pairs)
        ]


def data(
    train: list[tuple[str, str]], val: list[tuple[str, str]] | None = None, **options: Any
) -> InstructionDataModule:
    return InstructionDataModule(
        tiny_tokenizer(), Pairs(train), None if val is None else Pairs(val), chat=False, **options
    )


def trainer(folder: Path, report: DataReport, **options: Any) -> Trainer:
    """Make a Trainer that runs the hooks and no batch."""
    options = {
        "logger": TensorBoardLogger(folder, name="logs", version=""),
        "limit_train_batches": 0,
        "limit_val_batches": 0,
        **options,
    }
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", max_epochs=1, callbacks=[report], **quiet, **options)


def fit(folder: Path, rows: Any, report: DataReport | None = None, **options: Any) -> list[str]:
    """Fit and return the warnings about the data."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(folder, report or DataReport(), **options).fit(SFTModule("tiny"), datamodule=rows)
    return [str(warning.message) for warning in caught if " data: " in str(warning.message)]


def content(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def events(request: pytest.FixtureRequest) -> Any:
    """Give events(folder), which reads what a run wrote to TensorBoard."""
    return type(request.getfixturevalue("fit")(Callback(), [[]]))


def test_planted_faults_are_found(tmp_path: Path, events: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("py3langid", reason="the extra language is not installed")
    long = ("e?", "y" * 200)
    said = fit(tmp_path, data([*PAIRS, long], [PAIRS[3], ("z?", "26")], max_length=100))
    report = content(tmp_path / "logs/data_report.json")
    train, val = report["train"], report["val"]
    assert (train["rows"], train["documents"], train["answers"]) == (6, 6, 6)
    assert (train["duplicates"], train["same_prompt"], train["leaked"]) == (1, 1, 1)
    assert (train["dropped"], train["bad"], train["empty_outputs"], train["one_token_outputs"]) == (1, 0, 0, 1)
    # The tokens are bytes: prompts of 2, an end token behind each answer.
    answers = [len(text) + 1 for _, text in PAIRS]
    assert train["tokens"] == 6 * 2 + sum(answers)
    assert train["supervised_share"] == pytest.approx(sum(answers) / train["tokens"], abs=1e-12)
    assert (train["output_length"]["max"], train["output_length"]["min"]) == (max(answers), 2)
    assert train["prompt_length"]["mean"] == 2
    assert (train["list_share"], train["opener_share"], train["refusal_share"]) == (1 / 6, 1 / 6, 0)
    assert train["first_words"]["the"] == 2 / 6
    assert train["languages"]["de"] >= 1 / 6 and train["languages"]["en"] >= 2 / 6
    assert "leaked" not in val and list(val["languages"].values()) == [1.0]  # "26" has no letters
    assert said == [
        "train data: 1 of 6 documents repeat an earlier one, token by token",
        "train data: 1 of 6 documents are also held out, so validation looks better than it is",
        "train data: 14.3% of the rows are left out: 1 too long, 0 unreadable",
    ]
    told = events(tmp_path / "logs")
    assert len(told.images("data/lengths")) == 1
    ((_, text),) = told.texts("data/report")
    assert "| exact duplicates | 1 (16.7%) | 0 (0.0%) |" in text
    printed = capsys.readouterr().out
    assert "data report" in printed and "1 (16.7%)" in printed


def test_control_characters_of_the_data_are_escapes_in_the_table(
    tmp_path: Path, events: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, data([("a?", "\x1b[31mred car"), ("b?", "\x1b[31mred bus")]))
    ((_, text),) = events(tmp_path / "logs").texts("data/report")
    printed = capsys.readouterr().out
    assert "x1b" in text and "\\x1b" in printed  # the backslash of the table is a character reference
    assert "\x1b" not in text and "\x1b[31mred" not in printed


def test_clean_data_pass_without_a_warning(tmp_path: Path) -> None:
    assert fit(tmp_path, data(PAIRS[1:], [("z?", "26")]), DataReport(str(tmp_path / "new" / "r.json"))) == []
    assert content(tmp_path / "new" / "r.json")["train"]["leaked"] == 0
    assert not (tmp_path / "logs/data_report.json").exists()


def test_empty_answers_are_said(tmp_path: Path) -> None:
    rows = data([("never", "read")])
    rows.train_rows = [Tokens([70, 71, 2], [False, False, True]), Tokens([70, 72, 73, 2], [False, False, True, True])]
    assert fit(tmp_path, rows) == ["train data: 1 of 2 answers are empty, so the model learns to say nothing"]


def test_validate_reports_too(tmp_path: Path) -> None:
    running = trainer(tmp_path, DataReport(), limit_val_batches=1)
    running.validate(SFTModule("tiny"), datamodule=data(PAIRS, [("z?", "26")]), verbose=False)
    report = content(tmp_path / "logs/data_report.json")
    assert (report["train"]["rows"], report["val"]["rows"]) == (6, 1)


def test_packed_rows_and_preferences_become_documents() -> None:
    packed = Tokens([5, 6, 7, 8, 9], [False, True, False, False, True], (2, 3))
    assert [(document.ids, document.prompt, document.answers) for document in find_documents(packed)] == [
        ([5, 6], (), [[6]]),  # one token before what is learned: a text
        ([7, 8, 9], [7, 8], [[9]]),
    ]
    compared = PreferenceTokens([5, 6], [[7, 2], [8, 9, 2]], [0, 1], None, "here:1")
    assert [(document.prompt, document.answers) for document in find_documents(compared)] == [
        ([5, 6], [[7, 2]]),
        ([5, 6], [[8, 9, 2]]),
    ]


def test_preference_data_are_reported(tmp_path: Path) -> None:
    rows = PreferenceDataModule(
        tiny_tokenizer(), Pairs([("p?", "good", "bad"), ("q?", "good", "worse")], ("prompt", "chosen", "rejected"))
    )
    assert fit(tmp_path, rows) == []
    train = content(tmp_path / "logs/data_report.json")["train"]
    assert (train["rows"], train["documents"], train["same_prompt"]) == (2, 4, 2)


def test_other_data_are_passed_over_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, DataReport()).fit(BoringModel())
    assert any("nothing to report" in message for message in caplog.messages)
    assert list(tmp_path.rglob("*.json")) == []


def test_a_fast_dev_run_writes_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    fit(
        tmp_path,
        data(PAIRS),
        DataReport(str(path)),
        fast_dev_run=True,
        limit_train_batches=None,
        limit_val_batches=None,
    )
    assert "data report" in capsys.readouterr().out
    assert not path.exists()


def test_languages_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    assert guess_languages(["some text"]) is None


def test_languages_are_shares_of_texts_with_letters() -> None:
    pytest.importorskip("py3langid", reason="the extra language is not installed")
    assert guess_languages([GERMAN, ENGLISH, ENGLISH, "1 + 1", ""]) == {"en": 2 / 3, "de": 1 / 3}
    assert guess_languages(["12"]) == {}


def test_cells_are_safe_in_both_tables() -> None:
    report = {
        "rows": 1,
        "documents": 1,
        "tokens": 2,
        "answers": 1,
        "supervised_share": 0.5,
        "duplicates": 0,
        "duplicate_share": 0.0,
    }
    report |= {
        "same_prompt": 0,
        "empty_outputs": 0,
        "one_token_outputs": 0,
        "at_limit": 0,
        "dropped": 0,
        "bad": 0,
        "list_share": 0.0,
    }
    report |= {
        "refusal_share": 0.0,
        "opener_share": 0.0,
        "prompt_length": {},
        "output_length": {"min": 1.0},
        "languages": None,
    }
    lines = write_table({"train": {**report, "first_words": {"a|b": 1.0}}})
    assert ["languages of answers", "unknown: pip install 'lightning-align[language]'"] in lines
    assert ["also held out", "-"] in lines
    assert "| first words of answers | a&#124;b 100.0% |" in write_markdown_table(lines)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; name a file"):
        DataReport(str(tmp_path))
