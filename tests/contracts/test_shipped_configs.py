"""Shipped YAML runs on one process with its own method and data, on the tiny model.

The file test_two_ranks.py runs methods and recipes.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from few_rows import BATCHES, ROWS, few_rows, lower

from modules.__main__ import main

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    path for kind in ("recipes", "studies") for path in (ROOT / "configs" / kind).iterdir() if path.is_dir()
)
SHARED = str(ROOT / "configs/recipes/shared.yaml")
OVERLAYS = sorted((ROOT / "configs/overlays").glob("*.yaml"))
ONE_BATCH = ["--trainer.limit_val_batches=1", "--trainer.limit_predict_batches=1"]
VALIDATION = {"val_batch_size": 16}  # a predict needs more rows, of which some are right
QUIET = ["--trainer.enable_progress_bar=false"]


def run(command: str, *arguments: str, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # exports and logs of a config go to runs/ below the current folder
        main([command, *arguments])


def write_preferences(folder: Path) -> None:
    """Write transcripts like those of HH-RLHF, which the user of a recipe provides."""
    folder.mkdir(parents=True)
    turns = [f"\n\nHuman: Is {number} odd?\n\nAssistant: " for number in range(40)]
    rows = [json.dumps({"chosen": f"{turn}Ask.", "rejected": f"{turn}No idea."}) + "\n" for turn in turns]
    (folder / "train.jsonl").write_text("".join(rows))
    (folder / "val.jsonl").write_text("".join(rows[:8]))


def write_problems(folder: Path) -> None:
    """Write problems like those of GSM8K, with a thought, with the number alone, and with a worked solution."""
    folder.mkdir(parents=True)
    answers = {"thoughts": "<think>1 + 1 = 2</think>2", "answers": "2", "val": "1 + 1 = 2\n#### 2"}
    for name, answer in answers.items():
        rows = [json.dumps({"question": f"{number} and 1?", "answer": answer}) + "\n" for number in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(rows))


def shrunk(path: Path, folder: Path) -> str:
    """Copy the YAML with few rows, small batches and a built-in model; it then validates every epoch or every step."""
    text = lower(path.read_text(), ROWS | BATCHES if "-predict-" in path.name else ROWS | BATCHES | VALIDATION)
    text = re.sub(r"runs/\S+\.gguf", "tiny-addition", text)
    text = re.sub(r"(check_val_every_n_epoch|val_check_interval): \d+", r"\1: 1", text)
    text = text.replace(r"\.{3,8}", r"\.*")  # dots that few rows do not teach
    copy = folder / path.name
    copy.write_text(text)
    return str(copy)


def stages(recipe: Path, folder: Path, epochs: int) -> Iterator[tuple[Path, list[str]]]:
    """Return the stages of a recipe and their command lines on the tiny model, few rows and ``epochs`` epochs of one batch.

    The data that a user provides are written into the folder. A model that has learned sums replaces a start that would
    have to learn them.
    """
    paths = sorted(recipe.glob("*.yaml"))
    if any("runs/hh/" in path.read_text() for path in paths):
        write_preferences(folder / "runs/hh")
    if any("runs/gsm8k/" in path.read_text() for path in paths):
        write_problems(folder / "runs/gsm8k")
    for path in paths:
        command, text = path.stem.split("-")[1], path.read_text()
        if command == "merge":  # takes no Trainer
            yield path, [command, "--config", str(path)]
            continue
        changes = []
        if "Addition" in text and "policy: tiny\n" in text:
            changes += ["--model.policy", "tiny-addition"]
        if command == "predict" and "-smollm" in recipe.name:  # the built-in model gets nothing right: any text is
            changes += ["--model.reward=RegexFormat", "--model.reward.pattern=.*", "--model.sampling.temperature=9"]
        if "unknown: drop" in text:  # after so short a start everything is unknown
            changes += ["--data.unknown=keep"]
        if "prompts: true" in text:  # prompts of both modes, which stand one behind the other
            changes += ["--trainer.limit_val_batches=1.0"]
        if command == "fit":  # one with a checkpoint goes on behind the epochs of the stage before
            last = 2 * epochs if "ckpt_path:" in text else epochs
            changes = ["--trainer.limit_train_batches=1", f"--trainer.max_epochs={last}", *changes]
        shared = ["--config", SHARED] if recipe.parent.name == "recipes" else []
        yield path, [command, *shared, "--config", shrunk(path, folder), *ONE_BATCH, *changes]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_stages_of_a_recipe_are_numbered(recipe):  # tests/contracts/test_two_ranks.py runs them one after the other
    numbers = {int(path.stem.split("-")[0]) for path in recipe.glob("*.yaml")}
    assert sorted(numbers) == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("method", ["sft", "reward", "dpo", "online_dpo", "grpo", "distill"])
def test_methods_run_on_one_process(tmp_path, method):
    overlay = str(ROOT / "configs/overlays/cpu_tiny.yaml")
    run("fit", "--config", few_rows(method), "--config", overlay, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["runs"])


@pytest.mark.parametrize("method", ["reward", "dpo", "online_dpo", "grpo", "distill"])
def test_methods_run_with_adapters(tmp_path, method):
    overlays = [
        argument
        for name in ("cpu_tiny", "lora")
        for argument in ("--config", str(ROOT / f"configs/overlays/{name}.yaml"))
    ]
    run("fit", "--config", few_rows(method), *overlays, folder=tmp_path)


def test_a_judge_labels_a_file(tmp_path, chat_server, rules):
    (tmp_path / "my.jsonl").write_text('{"prompt": "Say hello.", "completions": ["Hi", "Hello there"]}\n')
    url = f"--model.judge.client.base_url={chat_server(rules['longer wins']).url}"
    run("predict", "--config", str(ROOT / "configs/label.yaml"), *QUIET, "--data.train=my.jsonl", url, folder=tmp_path)
    (row,) = (tmp_path / "runs/label/preferences.jsonl").read_text().splitlines()
    assert json.loads(row)["ranks"] == [1, 0]


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_overlays_change_where_and_not_what(path):
    keys = {line.split(":")[0] for line in path.read_text().splitlines() if line and line[0] not in "# "}
    others = {"lora": {"model"}, "compile": {"torch_compile"}}
    assert keys - {"ckpt_path", "out"} == others.get(path.stem, {"trainer"})
    assert path.stem != "lora" or path.read_text().split("model:")[1].split()[:2] == ["init_args:", "lora:"]
