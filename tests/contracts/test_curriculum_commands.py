"""The commands of the section on curricula run one after another, word for word but for their length."""

import json
import re
import shlex
from pathlib import Path

from modules.__main__ import main

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "datamodules/README.md").read_text().split("## Curriculum")[1].split("\n## ")[0]
SHORT = {"predict": ["--trainer.limit_predict_batches=2"], "fit": ["--trainer.max_epochs=2", "--data.val=null"]}


def test_the_commands_lead_from_rows_to_a_run(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^python -m modules (.*)$", SECTION, flags=re.MULTILINE)
    kinds = [command.split()[0] for command in commands]
    assert kinds == ["predict", "fit", "predict", "fit"]
    for command, kind in zip(commands, kinds, strict=True):
        arguments = shlex.split(command.replace("configs/", f"{ROOT}/configs/"))
        quick = SHORT[kind] + ["--trainer.num_sanity_val_steps=0", "--trainer.accelerator=cpu"]
        with caplog.at_level("INFO"):
            main([*arguments, *quick])
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
