"""``--seed_everything`` is the default of every seed: equal seeds give equal exports, other seeds do not."""

import inspect
import json
from pathlib import Path

import pytest
import yaml
from few_rows import few_rows
from safetensors.torch import load_file

import datamodules
import modules
from modules.__main__ import main
from modules.trainer.seeds import run_seed

CONFIGS = Path(__file__).parents[2] / "configs"
FEW = ["--data.prompts_per_phase=4", "--model.num_generations=4", "--data.train.num_examples=40"]
METHODS = {
    "sft": ["--data.train.num_examples=16", "--data.batch_size=8"],
    "reward": ["--data.train.num_examples=16", "--data.batch_size=8", "--data.val.num_examples=8"],
    "dpo": ["--data.train.num_examples=16", "--data.batch_size=8", "--data.val=null"],
    "grpo": FEW,
    "ppo": FEW,
    "online_dpo": FEW,
    "distill": [*FEW, "--data.updates_per_phase=1", "--model.on_policy=0.5"],
}
SHORT = ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


def export_of(method: str, seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Return the weights that a fit of two steps exports."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    export = [{"class_path": "Export", "init_args": {"folder": "export"}}]
    main(
        [
            "fit",
            f"--config={few_rows(method)}",
            *SHORT,
            *METHODS[method],
            f"--trainer.callbacks={json.dumps(export)}",
            "--trainer.enable_checkpointing=false",
            "--trainer.num_sanity_val_steps=0",
            "--trainer.limit_val_batches=0",
            f"--seed_everything={seed}",
        ]
    )
    return load_file(folder / "export/model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_exports_differ_between_seeds_and_agree_for_equal_ones(tmp_path, monkeypatch, method):
    exports = [export_of(method, seed, tmp_path / str(run), monkeypatch) for run, seed in enumerate((0, 0, 1))]
    first, second, other = exports
    assert all(first[name].equal(second[name]) for name in first)
    assert not all(first[name].equal(other[name]) for name in first)
    (saved,) = (tmp_path / "2").rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["seed_everything"] == 1


def test_the_run_is_seeded_with_0_by_default(monkeypatch):
    assert run_seed() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert (run_seed(), run_seed(0), run_seed(5)) == (3, 0, 5)
    assert datamodules.Addition(10).rows() == datamodules.Addition(10, seed=3).rows()


def test_no_class_that_a_config_names_has_a_seed_of_its_own():
    classes = [vars(package)[name] for package in (modules, datamodules) for name in package.__all__]
    seeds = {kind: inspect.signature(kind).parameters.get("seed") for kind in classes}
    assert [kind.__name__ for kind, seed in seeds.items() if seed is not None and seed.default is not None] == []
    assert sum(seed is not None for seed in seeds.values()) > 10
