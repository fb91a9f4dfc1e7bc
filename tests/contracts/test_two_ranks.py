"""Every shipped YAML on two processes, with its own callbacks and progress bar: no rank waits for ever."""

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

import pytest
from test_shipped_configs import ONE_BATCH, RECIPES, ROOT, run, shrunk, stages
from two_ranks import TwoRanks

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


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_ends(two_ranks, tmp_path, recipe):
    for arguments in stages(recipe, tmp_path, epochs=2):
        if arguments[0] == "merge":  # one process alone
            run(*arguments, folder=tmp_path)
        else:
            two_ranks.run(tmp_path, *arguments, *DDP)


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
