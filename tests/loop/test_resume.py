"""GRPO in a real Trainer: bitwise resume from every step, mid-phase too, on 1 and 2 ranks; ranks and accumulation change nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from datamodules import Addition, VerifiableDataModule
from modules import GRPOModule
from modules.objectives import Clipped, ConstantNorm, SequenceMean, TokenMean
from modules.rewards import RegexFormat
from modules.rollout.engine import Sampling

REWARD = r"[\x00-\x7f]*"  # plain ASCII: an untrained model fulfils it now and then, so that advantages are not all zero


def grpo(**settings) -> GRPOModule:
    settings = {"num_generations": 4, "sampling": Sampling(max_completion_length=4), "measure_kl": True} | settings
    settings = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)} | settings
    return GRPOModule("tiny", RegexFormat(REWARD), **settings)


class States(Callback):
    """The model after each optimiser step, what each phase collected, and the first log-probs of each phase."""

    def __init__(self) -> None:
        self.after: dict[int, list[torch.Tensor]] = {}
        self.rollouts: dict[int, list] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.after[trainer.global_step] = [parameter.detach().clone() for parameter in pl_module.parameters()]
        self.rollouts[trainer.current_epoch] = list(pl_module.rollouts)


def fit(module: GRPOModule, folder: Path, accumulate: int = 2, resume: Path | None = None, updates: int = 2, **limit: int) -> States:
    states = States()
    every_step = ModelCheckpoint(folder, filename="step{step}", auto_insert_metric_name=False, every_n_train_steps=1, save_top_k=-1)
    every_phase = ModelCheckpoint(folder, filename="phase{epoch}", auto_insert_metric_name=False, save_on_train_epoch_end=True, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        callbacks=[states] if resume else [states, every_step, every_phase],
        enable_checkpointing=resume is None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": 3} | limit),
    )
    data = VerifiableDataModule(module.tokenizer, Addition(40), prompts_per_phase=4, updates_per_phase=updates, inner_epochs=updates)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return states


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 6, "max_epochs": -1}], ids=["max_epochs", "max_steps"])
def test_resume_is_bitwise_from_every_checkpoint(tmp_path, limit):
    straight = fit(grpo(), tmp_path, **limit)
    assert max(straight.after) == 6
    assert not equal(straight.after[1], straight.after[2])  # the policy does learn: the comparison below is not of constants
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 6 + 3
    for checkpoint in checkpoints:
        resumed = fit(grpo(), tmp_path, resume=checkpoint, **limit)
        for step, parameters in resumed.after.items():
            assert equal(parameters, straight.after[step]), (checkpoint.name, step)
        for phase, rollouts in resumed.rollouts.items():
            assert rollouts == straight.rollouts[phase], (checkpoint.name, phase)
        done = torch.load(checkpoint, weights_only=True)["global_step"]
        assert set(resumed.after) == set(range(done + 1, 7)) | ({done} if resumed.after and min(resumed.after) == done else set())


@pytest.mark.parametrize("aggregation", [TokenMean(), SequenceMean(), ConstantNorm(4)], ids=lambda a: type(a).__name__)
def test_accumulation_changes_no_result(tmp_path, aggregation):
    runs = []
    for n in (1, 4):
        # SGD, whose step is proportional to the gradient: Adam's first one is its sign, in which rounding near zero would show
        module = grpo(objective=Clipped(aggregation=aggregation), beta=0.1, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        runs.append(fit(module, tmp_path / str(n), accumulate=n, updates=1, max_epochs=1).after[1])
    start = list(grpo().parameters())
    for whole, cut, first in zip(*runs, start, strict=True):
        torch.testing.assert_close(whole, cut, atol=2e-5, rtol=0)
        assert not torch.equal(whole, first)


class FirstMicroBatch(Callback):
    """Contract 7: what the trainer computes on the first micro-batch is what was frozen at collection."""

    gaps: list[float]

    def on_fit_start(self, trainer, pl_module) -> None:
        self.gaps = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 0:
            scores = pl_module.policy.completion_scores(batch, pl_module.sampling.temperature)
            self.gaps.append(float((scores.logprobs - batch["old_logprobs"]).abs().max().detach()))
            self.gaps.append(float((scores.logprobs - batch["sampler_logprobs"]).abs().max().detach()))


def test_first_micro_batch_has_the_old_logprobs(tmp_path):
    first = FirstMicroBatch()
    module = grpo(sampling=Sampling(max_completion_length=4, temperature=0.7))
    trainer = Trainer(accelerator="cpu", max_epochs=3, callbacks=[first], logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, VerifiableDataModule(module.tokenizer, Addition(40), prompts_per_phase=4))
    assert len(first.gaps) == 6
    assert max(first.gaps) < 1e-5
    assert abs(module.phase_metrics["kl"]) > 0  # the weights did move


def run_cli(config: dict, folder: Path, *args: str) -> dict:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "modules", "fit", "--config", str(file), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "last.ckpt", weights_only=True)


def config_for(folder: Path, devices: int, accumulate: int) -> dict:
    checkpoint = {"dirpath": str(folder), "filename": "step{step}", "auto_insert_metric_name": False, "every_n_train_steps": 1}
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": devices,
            "strategy": {"class_path": "DDPStrategy", "init_args": {"process_group_backend": "gloo"}} if devices > 1 else "auto",
            "accumulate_grad_batches": accumulate,
            "max_epochs": 2,
            "default_root_dir": str(folder),
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": checkpoint | {"save_top_k": -1, "save_last": True}}],
        },
        "model": {
            "class_path": "GRPOModule",
            "init_args": {
                "policy": "tiny",
                "reward": {"class_path": "RegexFormat", "init_args": {"pattern": REWARD}},
                "num_generations": 4,
                "sampling": {"max_completion_length": 4},
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}},
            },
        },
        "data": {
            "class_path": "VerifiableDataModule",
            "init_args": {
                "train": {"class_path": "Addition", "init_args": {"num_examples": 40}},
                "prompts_per_phase": 8,
                "updates_per_phase": 2,
                "inner_epochs": 2,
            },
        },
    }


def test_two_ranks_resume_bitwise_mid_phase_and_equal_one_rank(tmp_path):
    straight, resumed, alone = (tmp_path / name for name in ("straight", "resumed", "alone"))
    for folder in (straight, resumed, alone):
        folder.mkdir()
    end = run_cli(config_for(straight, 2, 1), straight)
    assert sorted(path.name for path in straight.glob("step*.ckpt")) == [f"step{n}.ckpt" for n in (1, 2, 3, 4)]
    middle = torch.load(straight / "step3.ckpt", weights_only=True)
    ranks = middle["VerifiableDataModule"]["phase_loader"]["ranks"]
    assert [part["position"] for part in ranks] == [1, 1]
    assert ranks[0]["rollouts"] != ranks[1]["rollouts"]
    again = run_cli(config_for(resumed, 2, 1), resumed, "--ckpt_path", str(straight / "step3.ckpt"))
    for name, value in end["state_dict"].items():
        assert torch.equal(value, again["state_dict"][name]), name
        assert not torch.equal(value, middle["state_dict"][name]), name
    one = run_cli(config_for(alone, 1, 2), alone)
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(value, end["state_dict"][name], atol=1e-5, rtol=0)


def test_another_number_of_ranks_is_refused_inside_a_phase(tmp_path):
    fit(grpo(), tmp_path, max_epochs=1)
    checkpoint = torch.load(tmp_path / "step1.ckpt", weights_only=True)
    ranks = checkpoint["VerifiableDataModule"]["phase_loader"]["ranks"]
    checkpoint["VerifiableDataModule"]["phase_loader"]["ranks"] = ranks * 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="inside a phase on 2 ranks and cannot go on with 1"):
        fit(grpo(), tmp_path, resume=tmp_path / "two.ckpt")
