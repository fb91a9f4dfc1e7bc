"""A user's own loss: one file in their folder, named by class path; a plain function serves as an advantage."""

import math
from pathlib import Path

import pytest
import yaml

from modules.__main__ import main

TINY = Path(__file__).parents[2] / "configs" / "tiny"
FILE = """
from modules.functional.masked import aggregate
from modules.losses import PolicyObjective, TokenMean


class Reinforce(PolicyObjective):
    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.aggregation = scale, TokenMean()

    def __call__(self, logprobs, batch):
        losses = -self.scale * batch["advantages"] * logprobs
        return aggregate(losses, batch["completion_mask"], batch["denominator"]), {"scale": logprobs.new_tensor(self.scale)}


def centered(rewards, group):
    return rewards - rewards.mean()
"""
SHORT = [
    "--trainer.max_steps=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.callbacks=null",
    "--trainer.log_every_n_steps=1",
    "--trainer.logger=CSVLogger",
    "--trainer.logger.save_dir=.",
    "--model.policy=tiny",
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Give run(file name, arguments): the first logged step of ``fit`` with losses from a file of that name."""

    def fit(name: str, *arguments: str) -> dict[str, float]:
        (tmp_path / f"{name}.py").write_text(FILE)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        main(["fit", *arguments, *SHORT])
        (metrics,) = tmp_path.rglob("metrics.csv")
        names, row = metrics.read_text().splitlines()[:2]
        (config,) = tmp_path.rglob("config.yaml")
        assert f"{name}." in str(yaml.safe_load(config.read_text())["model"]["init_args"]["objective"])
        values = zip(names.split(","), row.split(","), strict=True)
        return {key: float(value) for key, value in values if value}

    return fit


def test_a_policy_loss_and_an_advantage(run):
    logged = run(
        "own_policy_loss",
        f"--config={TINY / 'grpo.yaml'}",
        "--model.objective=own_policy_loss.Reinforce",
        "--model.objective.scale=2",
        "--model.advantage=own_policy_loss.centered",
        "--data.prompts_per_phase=4",
    )
    assert logged["train/scale"] == 2 and math.isfinite(logged["train/policy_loss"])
