"""PassRates in real runs: what predict measured against a count over its predictions, on one rank and on two."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from programs import run_ranks

from callbacks import PassRates, PredictionWriter
from datamodules import FactsDataModule, Files, MixIn, Source, VerifiableDataModule
from modules import GRPOModule, KnowledgeModule
from modules.generation import Validation
from modules.networks.tiny import tiny_tokenizer
from modules.rewards import ExactMatch, LengthPenalty, RegexFormat, WeightedSum
from modules.rollout.sampling import Sampling

ROOT = Path(__file__).parents[2]
ASCII = r"[\x00-\x7f].*"  # an untrained model fulfils it now and then
ROWS = [
    {"question": f"q{n} \u00e9\u2028", "answer": f"{n}", "id": n, "nested": {"level": [n, None]}, "pass_rate": 7}
    for n in range(7)
]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def measure(folder: Path, train: str | Source, callbacks: list[Any], accuracy: Any = None, **options: Any) -> None:
    # The second part of the reward is always 1, so that a sum above 0.5 does not say what is right.
    reward = WeightedSum([RegexFormat(ASCII, name="ascii"), RegexFormat(r".*", name="any")])
    sampling = Sampling(max_completion_length=6)
    right = Validation(accuracy=accuracy or RegexFormat(ASCII, name="right"))
    module = GRPOModule("tiny", reward, num_generations=5, sampling=sampling, validation=right)
    data = VerifiableDataModule(train=train, chat=False, val_batch_size=3)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=callbacks, default_root_dir=folder, **quiet | options)
    trainer.predict(module, data)


def count_by_hand(predictions: Path) -> dict[str, tuple[float, float, float]]:
    """Return the share of ASCII completions, mean tokens and share cut off of each uid."""
    groups = defaultdict(list)
    for line in read_rows(predictions):
        right = line["completion"][:1].isascii() and line["completion"] != ""
        groups[line["uid"]].append((right, line["num_tokens"], line["finish"] != "stop"))
    return {uid: tuple(sum(column) / len(rows) for column in zip(*rows, strict=True)) for uid, rows in groups.items()}  # type: ignore[misc]


def test_rows_come_back_with_what_was_measured(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", ROWS)
    measure(tmp_path, rows, [PredictionWriter(), PassRates()])
    found = read_rows(tmp_path / "rated.jsonl")
    counted = count_by_hand(tmp_path / "predictions.jsonl")
    names = ("pass_rate", "pass_length", "pass_truncated")
    for number, (before, after) in enumerate(zip(ROWS, found, strict=True), start=1):
        expected = dict(zip(names, counted[f"{rows}:{number}#0"], strict=True))
        assert after == before | expected
    assert len({row["pass_rate"] for row in found}) > 1 and all(row["pass_length"] > 1 for row in found)
    # A second measurement, of the same rows, adds its own columns and keeps the first's.
    measure(tmp_path, str(tmp_path / "rated.jsonl"), [PassRates("guess", str(tmp_path / "new/guessed.jsonl"))])
    for before, after in zip(found, read_rows(tmp_path / "new/guessed.jsonl"), strict=True):
        assert after.items() >= before.items() and 0 <= after["guess_rate"] <= 1


def test_rows_that_were_not_sampled_or_cannot_be_judged_have_no_rate(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", ROWS)
    measure(tmp_path, rows, [PassRates()], limit_predict_batches=1)
    found = read_rows(tmp_path / "rated.jsonl")
    assert [row["pass_rate"] is None for row in found] == [False] * 2 + [True] * 5  # batches of 2, 2 and 3 rows
    assert found[-1]["pass_length"] is None
    some = [row | ({"answer": None} if row["id"] == 2 else {}) for row in ROWS]  # nothing to compare with
    answered = write_rows(tmp_path / "some.jsonl", some)
    measure(tmp_path, answered, [PassRates()], accuracy=ExactMatch())
    found = read_rows(tmp_path / "rated-2.jsonl")  # the first one stays
    assert [row["pass_rate"] for row in found] == [0.0, 0.0, None, 0.0, 0.0, 0.0, 0.0]
    assert found[2]["pass_length"] > 1 and found[2]["answer"] is None
    before = sorted(tmp_path.glob("rated*"))
    measure(tmp_path, rows, [PassRates()], fast_dev_run=True)
    assert sorted(tmp_path.glob("rated*")) == before


def test_what_cannot_be_measured_is_refused_before_sampling(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", ROWS)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with pytest.raises(ValueError, match="PassRates: 2 training rows are called .*in.jsonl:1; read every file once"):
        measure(tmp_path, MixIn(Files(rows), rows, num=7), [PassRates()])
    with pytest.raises(ValueError, match=f"PassRates: {tmp_path} is a folder; name a file"):
        measure(tmp_path, rows, [PassRates(path=str(tmp_path))])
    with pytest.raises(ValueError, match="name is the beginning of column names, such as pass or guess, got 'a b'"):
        PassRates("a b")
    unclear = LengthPenalty(RegexFormat("a"), 0.1)
    module = GRPOModule("tiny", unclear, num_generations=2, sampling=Sampling(max_completion_length=2))
    trainer = Trainer(accelerator="cpu", callbacks=[PassRates()], **quiet)
    with pytest.raises(
        ValueError, match="PassRates needs to know which answers are right, .* model.validation.accuracy"
    ):
        trainer.predict(module, VerifiableDataModule(train=rows))
    for verb in ("fit", "validate"):
        asked = Trainer(accelerator="cpu", callbacks=[PassRates()], max_epochs=1, default_root_dir=tmp_path, **quiet)
        with pytest.raises(
            ValueError, match=f"PassRates writes what predict finds, and this is {verb}: remove it, or "
        ):
            getattr(asked, verb)(module, VerifiableDataModule(train=rows, val=rows))
    (tmp_path / "facts.jsonl").write_text("".join(f'{{"question": "{n}", "answer": "b"}}\n' for n in range(3)))
    facts = FactsDataModule(tiny_tokenizer(), str(tmp_path / "facts.jsonl"), num_prompts=1, num_shots=1)
    trainer = Trainer(accelerator="cpu", callbacks=[PassRates()], **quiet)
    with pytest.raises(
        ValueError, match="PassRates needs a method that samples and scores .* KnowledgeModule does not"
    ):
        trainer.predict(KnowledgeModule("tiny"), facts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.jsonl", "in.jsonl"]


def test_two_ranks_measure_what_one_measures(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", ROWS)
    arguments = ["predict", "--config", str(ROOT / "configs/tiny/grpo.yaml"), f"--data.train={rows}"]
    arguments += [
        "--data.chat=false",
        "--data.val=null",
        "--model.reward=RegexFormat",
        f"--model.reward.pattern={ASCII}",
    ]
    arguments += [
        "--model.validation.accuracy=RegexFormat",
        f"--model.validation.accuracy.pattern={ASCII}",
        "--model.policy=tiny",
        "--trainer.callbacks+=PassRates",
    ]
    ddp = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--out=two"]
    run_ranks("-m", "modules", *arguments, *ddp, folder=tmp_path)
    found = read_rows(tmp_path / "two/rated.jsonl")
    counted = count_by_hand(tmp_path / "two/predictions.jsonl")
    assert [row["id"] for row in found] == list(range(7))
    for number, row in enumerate(found, start=1):
        measures = (row["pass_rate"], row["pass_length"], row["pass_truncated"])
        assert measures == pytest.approx(counted[f"{rows}:{number}#0"], abs=1e-12)
