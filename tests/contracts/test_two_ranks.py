"""Every shipped YAML on two processes, with its own callbacks and the bar: nobody waits for a rank that is elsewhere."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_shipped_configs import ONE_BATCH, RECIPES, ROOT, stages
from two_ranks import TwoRanks

CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
DDP = ["--config", str(ROOT / "configs/overlays/ddp.yaml")]
FIT = [name for name, path in CONFIGS.items() if "max_epochs" in path.read_text() or "max_steps" in path.read_text()]
TWO_EPOCHS = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=1",
    "--trainer.check_val_every_n_epoch=1",
    *ONE_BATCH,
]
WITHIN = 30.0  # seconds in which a run ends that is told to


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[TwoRanks]:
    ranks = TwoRanks()
    yield ranks
    ranks.end()


@pytest.mark.parametrize("name", FIT)
def test_a_method_ends(two_ranks, tmp_path, name):
    two_ranks.run(tmp_path, "fit", "--config", str(CONFIGS[name]), *DDP, *TWO_EPOCHS)
    two_ranks.run(tmp_path, "validate", "--config", str(CONFIGS[name]), *DDP, *ONE_BATCH)
    assert (tmp_path / "runs" / name / "export/config.json").is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_ends(two_ranks, tmp_path, recipe):
    for command, *arguments in stages(recipe, tmp_path, epochs=2):
        two_ranks.run(tmp_path, command, *arguments, *DDP)


def test_facts_are_sorted(two_ranks, tmp_path):
    two_ranks.run(tmp_path, "predict", "--config", str(CONFIGS["knowledge"]), *DDP)
    assert len((tmp_path / "runs/knowledge/facts.jsonl").read_text().splitlines()) == 40


def test_a_judge_labels(two_ranks, tmp_path, chat_server, rules):
    rows = [{"prompt": f"Say {number}.", "completions": ["Hi", "Hello there"]} for number in range(5)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    url = f"--model.judge.client.base_url={chat_server(rules['longer wins']).url}"
    two_ranks.run(tmp_path, "predict", "--config", str(CONFIGS["label"]), *DDP, url)
    assert len((tmp_path / "runs/label/preferences.jsonl").read_text().splitlines()) == 5


def test_every_config_is_here():
    assert {*FIT, "knowledge", "label", "self_instruct"} == set(
        CONFIGS
    )  # self_instruct refuses a second rank, see its own test
