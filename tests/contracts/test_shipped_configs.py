"""Every shipped YAML runs: its own method and data, on the tiny model, one batch of each loader."""

from pathlib import Path

import pytest

from modules.__main__ import main

ROOT = Path(__file__).parents[2]
STAGES = sorted((ROOT / "configs/recipes").rglob("*.yaml"))
OVERLAYS = sorted((ROOT / "configs/overlays").glob("*.yaml"))
ONE_BATCH = ["--trainer.fast_dev_run", "true", "--trainer.enable_progress_bar", "false", "--model.policy", "tiny"]


def run(command: str, *arguments: str, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # exports and logs of a config go to runs/ below the current folder
        main([command, *arguments])


@pytest.mark.parametrize("path", STAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_stages_of_recipes_run(tmp_path, path):
    number, command, *_ = path.stem.split("-")
    assert number.isdigit()
    checkpoint = ["--ckpt_path", "null"] if command == "validate" else []
    run(command, "--config", str(path), *ONE_BATCH, *checkpoint, folder=tmp_path)


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_methods_run_on_one_process(tmp_path, method):
    overlay = str(ROOT / "configs/overlays/cpu_tiny.yaml")
    run("fit", "--config", str(ROOT / f"configs/{method}.yaml"), "--config", overlay, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["runs"])


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_overlays_change_where_and_not_what(path):
    keys = {line.split(":")[0] for line in path.read_text().splitlines() if line and line[0] not in "# "}
    assert keys == {"trainer"}
