"""Shipped YAML on two processes, with its own callbacks and progress bar: no rank waits for ever.

Every method runs on two. A stage of a recipe runs on two if it has something that no stage before it has; the others
run on one process.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_shipped_configs import ONE_BATCH, QUIET, RECIPES, ROOT, run, shrunk, stages
from two_ranks import TwoRanks

from modules.cli.parser import LOADER

CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
TINY = {path.stem: path for path in sorted((ROOT / "configs/tiny").glob("*.yaml"))}
COMPLETION = {"sft": {"completion": "4"}, **dict.fromkeys(("dpo", "reward"), {"chosen": "4", "rejected": "5"})}
DDP = [
    "--config",
    str(ROOT / "configs/overlays/ddp.yaml"),
    "--trainer.callbacks+=RichProgressBar",
    "--trainer.enable_progress_bar=true",
]
FIT, FIT_TINY = (
    [name for name, path in found.items() if re.search("max_epochs|max_steps", path.read_text())]
    for found in (CONFIGS, TINY)
)
TWO_EPOCHS = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=1", *ONE_BATCH]


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[TwoRanks]:
    ranks = TwoRanks()
    yield ranks
    ranks.end()


@pytest.mark.parametrize("name", FIT_TINY)
def test_a_tiny_run_ends(two_ranks, tmp_path, name):
    config = shrunk(TINY[name], tmp_path)
    two_ranks.run(tmp_path, "fit", "--config", config, *DDP, *TWO_EPOCHS)
    two_ranks.run(tmp_path, "validate", "--config", config, *DDP, *ONE_BATCH)
    assert list(tmp_path.glob("runs/*/export/config.json"))


@pytest.mark.parametrize("name", FIT)
def test_a_method_ends(two_ranks, tmp_path, name):
    rows = [{"prompt": f"{number} + 1 = ", **COMPLETION.get(name, {"answer": "4"})} for number in range(80)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["--model.policy=tiny", "--data.train=my.jsonl", "--data.val=0.2", "--trainer.accumulate_grad_batches=1"]
    if "sampling:" in CONFIGS[name].read_text():
        own += ["--model.sampling.max_completion_length=4"]
    if name in ("online_dpo", "ppo"):  # the reward is the user's to name
        own += ["--model.reward=ExactMatch"]
    if name == "distill":  # and so is the teacher
        own += ["--model.teacher=tiny-addition"]
    two_ranks.run(tmp_path, "fit", "--config", shrunk(CONFIGS[name], tmp_path), *DDP, *TWO_EPOCHS, *own)
    assert list(tmp_path.glob("runs/*/export/config.json"))


def name_classes(given: Any) -> list[str]:
    """Return the class path of a class, or those of a list of classes."""
    given = given if isinstance(given, list) else [given]
    return [each if isinstance(each, str) else each["class_path"] for each in given if each]


def list_parts(stage: Path) -> set[tuple[str, ...]]:
    """Return what could make a rank of the stage wait for the other: its method with data, loss, schedule; callbacks."""
    config, command = yaml.load(stage.read_text(), LOADER), stage.stem.split("-")[1]
    if command == "merge":  # one process alone
        return set()
    model, data = config["model"], config["data"]
    method, options = model["class_path"], model.get("init_args", {})
    callbacks = name_classes(config.get("trainer", {}).get("callbacks"))
    chosen = [options.get(name) for name in ("objective", "advantage", "engine", "scheduler")]
    streams = [data.get("init_args", {}).get(name) for name in ("order", "ptx")]
    return {
        (command, method, data["class_path"]),
        *((command, name) for name in callbacks),
        *((command, method, name) for each in [*chosen, *streams] for name in name_classes(each)),
    }


def choose_stages() -> set[Path]:
    """Choose the stages with a part that none before them has, and fits that go on from a checkpoint of such a one."""
    seen, chosen = set[tuple[str, ...]](), set[Path]()
    recipes = sorted(RECIPES, key=lambda recipe: len([*recipe.glob("*.yaml")]), reverse=True)
    for stage in (stage for recipe in recipes for stage in sorted(recipe.glob("*.yaml"))):
        parts = list_parts(stage)
        if not parts <= seen or ("-fit-" in stage.name and "ckpt_path:" in stage.read_text()):
            chosen.add(stage)
        seen |= parts
    return chosen


ON_TWO = choose_stages()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_ends(two_ranks, tmp_path, capfd, recipe):
    for stage, arguments in stages(recipe, tmp_path, epochs=2):
        if stage in ON_TWO:
            two_ranks.run(tmp_path, *arguments, *DDP)
            continue
        try:
            run(*arguments, *(QUIET if arguments[0] != "merge" else []), folder=tmp_path)
        except SystemExit:
            assert "claims did not hold: " in capfd.readouterr().err, stage  # need not, after so short a training


def test_everything_in_recipes_runs_on_two_ranks():
    stages = [stage for recipe in RECIPES for stage in recipe.glob("*.yaml")]
    assert {part for stage in ON_TWO for part in list_parts(stage)} == {
        p for stage in stages for p in list_parts(stage)
    }
    assert 20 < len(ON_TWO) < len(stages) / 3


def test_facts_are_sorted_by_ranks_with_other_numbers_of_batches(two_ranks, tmp_path):
    short = [
        "--data.train.num_facts=33",
        "--data.num_prompts=1",
        "--model.num_samples=2",
        "--model.max_completion_length=4",
    ]
    two_ranks.run(tmp_path, "predict", "--config", str(TINY["knowledge"]), *DDP, *short)
    (facts,) = tmp_path.glob("runs/*/knowledge.jsonl")
    assert len(facts.read_text().splitlines()) == 33  # 17 and 16: two batches and one


def test_a_judge_labels(two_ranks, tmp_path, chat_server, rules):
    rows = [{"prompt": f"Say {number}.", "completions": ["Hi", "Hello there"]} for number in range(5)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    url = f"--model.judge.client.base_url={chat_server(rules['longer wins']).url}"
    two_ranks.run(tmp_path, "predict", "--config", str(CONFIGS["label"]), *DDP, "--data.train=my.jsonl", url)
    assert len((tmp_path / "runs/label/preferences.jsonl").read_text().splitlines()) == 5


def test_every_config_is_tried():
    assert {*FIT, "knowledge", "label", "self_instruct"} == set(CONFIGS)  # self_instruct wants one process, and says so
    assert {*FIT_TINY, "knowledge"} == set(TINY)


def processes(mark: str) -> list[str]:
    """Return the command lines of all processes with this mark in their environment; ended processes have none."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


@pytest.mark.parametrize("receiver", ["first process", "all processes"])
def test_sigterm_ends_both_ranks(tmp_path, receiver):
    config, mark = shrunk(TINY["grpo"], tmp_path), f"MARK={tmp_path}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MARK": str(tmp_path)}
    command = [sys.executable, "-m", "modules", "fit", "--config", config, *DDP, "--trainer.num_sanity_val_steps=0"]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        begun = tmp_path / "runs/tiny-grpo/config.yaml"  # written with the first batch
        deadline = time.monotonic() + 240
        while not begun.exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert begun.exists(), (tmp_path / "log").read_text()
        (os.kill if receiver == "first process" else os.killpg)(run.pid, signal.SIGTERM)
        assert run.wait(60) == 143, (tmp_path / "log").read_text()
        deadline = time.monotonic() + 20
        while (left := processes(mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
