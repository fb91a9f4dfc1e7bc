"""Every shipped YAML runs with its own method and data on the tiny model, one batch of each loader.

The stages of a recipe run one after another.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modules.__main__ import main

ROOT = Path(__file__).parents[2]
RECIPES = sorted([*(ROOT / "configs/recipes").iterdir(), *(ROOT / "configs/studies").iterdir()])
OVERLAYS = sorted((ROOT / "configs/overlays").glob("*.yaml"))
ONE_BATCH = ["--trainer.limit_val_batches=1", "--trainer.limit_predict_batches=1"]
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


def stages(recipe: Path, folder: Path, epochs: int) -> Iterator[list[str]]:
    """Return the command lines of a recipe on the tiny model, with fits of ``epochs`` short epochs.

    The data that a user provides are written into the folder.
    """
    paths = sorted(recipe.glob("*.yaml"))
    if any("runs/hh/" in path.read_text() for path in paths):
        write_preferences(folder / "runs/hh")
    for path in paths:
        command = path.stem.split("-")[1]
        text = path.read_text()
        changes = ["--model.policy", "tiny"] if ".gguf" in text else []
        if "unknown: drop" in text:  # after so short a start everything is unknown
            changes += ["--data.unknown=keep"]
        if (
            command == "predict" and "reward:" in text
        ):  # after so short a start no sum is right, and nothing could be compared
            changes += ["--model.reward=RegexFormat", "--model.reward.pattern=.[0-4].*"]
        if "judge: {class_path: ExactMatch" in text:  # likewise
            changes += ["--model.judge=RegexFormat", "--model.judge.pattern=.[0-4].*"]
        if path.stem == "01-fit-sft":  # long enough for completions to end by themselves
            changes += [f"--trainer.limit_train_batches={60 // epochs}"]
        if command == "fit":  # one with a checkpoint goes on behind the epochs of the stage before
            last = 2 * epochs if "ckpt_path:" in text else epochs
            changes = ["--trainer.limit_train_batches=1", f"--trainer.max_epochs={last}", *changes]
        yield [command, "--config", str(path), *ONE_BATCH, *changes]


def claims_may_fail(stage: Callable[[], None], capfd: pytest.CaptureFixture[str]) -> None:
    """Run a stage. After so short a training its claims need not hold, but nothing else may fail."""
    try:
        stage()
    except SystemExit:
        if "claims did not hold: " not in capfd.readouterr().err:
            raise


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_stages_of_recipes_hand_over_to_each_other(tmp_path, recipe, capfd):
    numbers = {int(path.stem.split("-")[0]) for path in recipe.glob("*.yaml")}
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    for arguments in stages(recipe, tmp_path, epochs=1):
        claims_may_fail(lambda arguments=arguments: run(*arguments, *QUIET, folder=tmp_path), capfd)


@pytest.mark.parametrize("method", ["sft", "reward", "dpo", "online_dpo", "grpo"])
def test_methods_run_on_one_process(tmp_path, method):
    overlay = str(ROOT / "configs/overlays/cpu_tiny.yaml")
    run("fit", "--config", str(ROOT / f"configs/tiny/{method}.yaml"), "--config", overlay, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["runs"])


@pytest.mark.parametrize("method", ["reward", "dpo", "online_dpo", "grpo"])
def test_methods_run_with_adapters(tmp_path, method):
    overlays = [
        argument
        for name in ("cpu_tiny", "lora")
        for argument in ("--config", str(ROOT / f"configs/overlays/{name}.yaml"))
    ]
    run("fit", "--config", str(ROOT / f"configs/tiny/{method}.yaml"), *overlays, folder=tmp_path)


def test_a_judge_labels_a_file(tmp_path, chat_server, rules):
    (tmp_path / "my.jsonl").write_text('{"prompt": "Say hello.", "completions": ["Hi", "Hello there"]}\n')
    url = f"--model.judge.client.base_url={chat_server(rules['longer wins']).url}"
    run("predict", "--config", str(ROOT / "configs/label.yaml"), *QUIET, url, folder=tmp_path)
    (row,) = (tmp_path / "runs/label/preferences.jsonl").read_text().splitlines()
    assert json.loads(row)["ranks"] == [1, 0]


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_overlays_change_where_and_not_what(path):
    keys = {line.split(":")[0] for line in path.read_text().splitlines() if line and line[0] not in "# "}
    assert keys - {"ckpt_path", "out"} == ({"model"} if path.stem == "lora" else {"trainer"})
    assert path.stem != "lora" or path.read_text().split("model:")[1].split()[:2] == ["init_args:", "lora:"]
