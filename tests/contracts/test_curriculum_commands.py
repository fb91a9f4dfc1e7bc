"""The commands of the sections on curricula and samples run one after another, word for word but for their length."""

import json
import re
import shlex
from pathlib import Path

from modules.__main__ import main

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "datamodules/README.md").read_text()
SECTIONS = {name: TEXT.split(f"## {name}")[1].split("\n## ")[0] for name in ("Curriculum", "Rejection sampling")}
SHORT = {"predict": ["--trainer.limit_predict_batches=2"], "fit": ["--trainer.max_epochs=2", "--data.val=null"]}


def run_commands(name):
    commands = re.findall(r"^python -m modules (.*)$", SECTIONS[name], flags=re.MULTILINE)
    for command in commands:
        arguments = shlex.split(command.replace("configs/", f"{ROOT}/configs/"))
        main([*arguments, *SHORT[arguments[0]], "--trainer.num_sanity_val_steps=0", "--trainer.accelerator=cpu"])
    return [command.split()[0] for command in commands]


def test_verified_samples_are_learned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_commands("Rejection sampling") == ["predict", "fit"]
    rows = [json.loads(line) for line in (tmp_path / "runs/samples/verified.jsonl").read_text().splitlines()]
    assert rows and all(row["completion"] == row["answer"] for row in rows)
    assert (tmp_path / "runs/self-taught/export/config.json").is_file()


def test_the_commands_lead_from_rows_to_a_run(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO"):
        assert run_commands("Curriculum") == ["predict", "fit", "predict", "fit"]
    rated, guessed = (
        [json.loads(line) for line in (tmp_path / f"runs/{name}/rated.jsonl").read_text().splitlines()]
        for name in ("difficulty", "guesses")
    )
    assert len(rated) == len(guessed) == 500
    assert all(after.items() >= before.items() for before, after in zip(rated, guessed, strict=True))
    measured = [row["pass_rate"] for row in rated if row["pass_rate"] is not None]
    assert 60 <= len(measured) <= 128  # two batches
    never, always = measured.count(0.0), measured.count(1.0)
    used = len(measured) - never - always
    told = [set(line.split(" + ")) for line in re.findall(r"500 rows in = (.*?);", "\n".join(caplog.messages))]
    reasons = {f"{never} never right", f"{always} always right", f"{500 - len(measured)} without pass_rate"}
    assert {f"{used} used", *reasons} in told
