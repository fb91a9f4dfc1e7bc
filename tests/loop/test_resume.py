"""GRPO in a real Trainer: bitwise resume from every step, also within a phase, on 1 and 2 ranks; ranks and accumulation
change nothing.
"""

import warnings
from functools import partial
from pathlib import Path

import fixed_runs
import pytest
import resumes
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from programs import run_program, run_ranks
from resumes import check_resumes

import modules
from callbacks import GroupBias
from datamodules import Addition, InstructionDataModule, VerifiableDataModule
from modules import GRPOModule
from modules.losses import Clipped, ConstantNorm, SequenceMean, TokenMean
from modules.networks.lora import Lora
from modules.rewards import RegexFormat
from modules.rollout.sampling import Sampling

# starts in plain ASCII: an untrained model fulfils it half of the time, so that advantages are not all zero
REWARD = r"[\x00-\x7f].*"


def grpo(**settings) -> GRPOModule:
    settings = {"num_generations": 4, "sampling": Sampling(max_completion_length=4), "measure_kl": True} | settings
    settings = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)} | settings
    return GRPOModule("tiny-small", RegexFormat(REWARD), **settings)


class States(Callback):
    """Keeps the model after each optimiser step, the batch of each phase, and everything that was logged, by step."""

    def __init__(self) -> None:
        self.after: dict[int, list[torch.Tensor]] = {}
        self.rollouts: dict[int, list] = {}
        self.logged: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.after[trainer.global_step] = [parameter.detach().clone() for parameter in pl_module.parameters()]
        self.rollouts[trainer.current_epoch] = list(pl_module.record.rollouts)


class Records(Logger):
    """Keeps what a run logs, except wall times."""

    name, version = "records", 0

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[int, str], float] = {}

    def log_metrics(self, metrics, step=None) -> None:
        self.found |= {
            (step, name): value for name, value in metrics.items() if "time" not in name and "second" not in name
        }

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass


def fit(
    module: GRPOModule,
    folder: Path,
    accumulate: int = 2,
    resume: Path | None = None,
    updates: int = 2,
    extra=(),
    saves: bool = True,
    **settings,
) -> States:
    """Run phases of ``updates`` updates with their own rows; if it saves, a checkpoint follows each step and phase."""
    states, records = States(), Records()
    every_step = ModelCheckpoint(
        folder, filename="step{step}", auto_insert_metric_name=False, every_n_train_steps=1, save_top_k=-1
    )
    every_phase = ModelCheckpoint(
        folder, filename="phase{epoch}", auto_insert_metric_name=False, save_on_train_epoch_end=True, save_top_k=-1
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        callbacks=[states, GroupBias(), *((every_step, every_phase) if saves else ()), *extra],
        enable_checkpointing=saves,
        logger=records,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": 3} | settings),
    )
    val = (
        Addition(6, held_out=True)
        if "check_val_every_n_epoch" in settings or "val_check_interval" in settings
        else None
    )
    data = VerifiableDataModule(module.tokenizer, Addition(40), val=val, prompts_per_phase=4, updates_per_phase=updates)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    states.logged = records.found
    return states


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_goes_on(resumed: States, straight: States, what: object) -> None:
    """Assert that a resumed run did and logged the same as the uninterrupted one, up to the same end."""
    for step, parameters in resumed.after.items():
        assert equal(parameters, straight.after[step]), (what, step)
    for phase, rollouts in resumed.rollouts.items():
        assert rollouts == straight.rollouts[phase], (what, phase)
    assert resumed.logged, what
    for key, value in resumed.logged.items():
        assert value == straight.logged[key], (what, key)
    last = max(step for step, _ in straight.logged)
    assert (last, "train/reward") in resumed.logged, what


VALIDATED = {"check_val_every_n_epoch": 2}
LIMITS = {
    "max_epochs": {"max_epochs": 3, **VALIDATED},
    "max_steps": {"max_steps": 6, "max_epochs": -1},
    "inside": {"val_check_interval": 2},
}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_resume_is_bitwise_from_every_checkpoint(tmp_path, limit):
    straight = fit(grpo(), tmp_path / "straight", **limit)
    assert max(straight.after) == 6
    assert not equal(
        straight.after[1], straight.after[2]
    )  # the policy does learn: the comparison below is not of constants
    checkpoints = sorted((tmp_path / "straight").glob("*.ckpt"))
    assert len(checkpoints) == 6 + 3
    for checkpoint in checkpoints:
        folder = tmp_path / checkpoint.stem
        resumed = fit(grpo(), folder, resume=checkpoint, saves=False, **limit)
        done = torch.load(checkpoint, weights_only=True)["global_step"]
        assert set(range(done + 1, 7)) <= set(resumed.after) <= set(range(done, 7))
        if done < 6 or (checkpoint.stem == "step6" and "max_steps" not in limit):  # else nothing is left to do
            assert_goes_on(resumed, straight, checkpoint.name)


def test_a_second_resume_goes_on_where_the_first_stopped(tmp_path):
    straight = fit(grpo(), tmp_path / "straight")
    for first in ("step1", "phase0", "step3"):
        fit(grpo(), tmp_path / first, resume=tmp_path / "straight" / f"{first}.ckpt", max_epochs=2)
        for second in sorted((tmp_path / first).glob("*.ckpt")):
            assert_goes_on(
                fit(grpo(), tmp_path / first / second.stem, resume=second, saves=False), straight, (first, second.name)
            )


class SaveInside(Callback):
    """Saves a checkpoint after a given micro-batch of the run."""

    def __init__(self, micro_batch: int, path: Path) -> None:
        self.micro_batch, self.path, self.seen = micro_batch, path, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen += 1
        if self.seen == self.micro_batch:
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_inside_an_accumulation_resumes_from_the_last_step(tmp_path):
    paths = {micro_batch: tmp_path / f"inside{micro_batch}.ckpt" for micro_batch in (1, 3, 5, 7)}
    straight = fit(grpo(), tmp_path, extra=[SaveInside(*place) for place in paths.items()], saves=False)
    for micro_batch, path in paths.items():
        assert_goes_on(fit(grpo(), tmp_path, resume=path, saves=False), straight, micro_batch)


def test_a_phase_of_one_update_resumes_from_everywhere_with_what_it_had_measured(tmp_path):
    """Also from inside the accumulation whose forward passes measure what the record lacks."""
    one = {"updates": 1, "accumulate": 3}
    inside = [SaveInside(number, tmp_path / f"inside{number}.ckpt") for number in (1, 5)]
    straight = fit(grpo(), tmp_path / "straight", extra=inside, **one)
    assert max(straight.after) == 3 and not equal(straight.after[1], straight.after[3])
    checkpoints = [each.path for each in inside] + sorted((tmp_path / "straight").glob("*.ckpt"))
    for checkpoint in [each for each in checkpoints if each.stem not in ("phase2", "step3")]:
        resumed = fit(grpo(), tmp_path / checkpoint.stem, resume=checkpoint, saves=False, **one)
        assert_goes_on(resumed, straight, checkpoint.name)
    assert all(rollout.entropy is not None for rollouts in straight.rollouts.values() for rollout in rollouts)


@pytest.mark.parametrize("aggregation", [TokenMean(), SequenceMean(), ConstantNorm(4)], ids=lambda a: type(a).__name__)
def test_accumulation_changes_no_result(tmp_path, aggregation):
    runs = []
    for n in (1, 4):
        # SGD, whose step is proportional to the gradient: Adam's first one is its sign, in which rounding near zero
        # would show
        module = grpo(
            objective=Clipped(aggregation=aggregation),
            beta=0.1,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        )
        runs.append(fit(module, tmp_path / str(n), accumulate=n, updates=1, max_epochs=1, saves=False).after[1])
    start = list(grpo().parameters())
    for whole, cut, first in zip(*runs, start, strict=True):
        torch.testing.assert_close(whole, cut, atol=2e-5, rtol=0)
        assert not torch.equal(whole, first)


class FirstMicroBatch(Callback):
    """Checks contract 7: the trainer's log-probs on the first micro-batch equal those frozen at collection."""

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
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[first],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    data = VerifiableDataModule(module.tokenizer, Addition(40), prompts_per_phase=4, updates_per_phase=2)
    trainer.fit(module, data)
    assert len(first.gaps) == 6
    assert max(first.gaps) < 1e-5
    assert abs(float(trainer.callback_metrics["train/kl"])) > 0  # the weights did move


@pytest.mark.parametrize("name", fixed_runs.RUNS)
def test_every_method_goes_on_from_every_stop_bit_for_bit(tmp_path, name):
    check_resumes(name, tmp_path)


def test_two_ranks_go_on_from_every_stop_bit_for_bit(tmp_path):
    run_ranks(resumes.__file__, str(tmp_path), *fixed_runs.RUNS, folder=tmp_path, timeout=500)


def test_two_ranks_go_on_in_phases_of_one_update(tmp_path):
    once = ["--data.updates_per_phase=1", "--trainer.max_epochs=6"]
    run_ranks(resumes.__file__, str(tmp_path), "grpo", "online_dpo", *once, folder=tmp_path, timeout=500)


def run_cli(config: dict, folder: Path, *args: str) -> dict:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    done = (run_ranks if config["trainer"]["devices"] == 2 else run_program)(
        "-m", "modules", "fit", "--config", str(file), *args, folder=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "last.ckpt", weights_only=True)


def config_for(folder: Path, devices: int, accumulate: int) -> dict:
    checkpoint = {
        "dirpath": str(folder),
        "filename": "step{step}",
        "auto_insert_metric_name": False,
        "every_n_train_steps": 1,
    }
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": devices,
            "strategy": {"class_path": "DDPStrategy", "init_args": {"process_group_backend": "gloo"}}
            if devices > 1
            else "auto",
            "accumulate_grad_batches": accumulate,
            "max_epochs": 2,
            "default_root_dir": str(folder),
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "ModelCheckpoint", "init_args": checkpoint | {"save_top_k": -1, "save_last": True}}
            ],
        },
        "model": {
            "class_path": "GRPOModule",
            "init_args": {
                "policy": "tiny-small",
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
            },
        },
    }


def test_two_ranks_resume_bitwise_from_every_step_and_equal_one_rank(tmp_path):
    folders = {name: tmp_path / name for name in ("straight", "alone", "step1", "step2", "step3")}
    for folder in folders.values():
        folder.mkdir()
    straight = folders["straight"]
    end = run_cli(config_for(straight, 2, 1), straight)
    assert sorted(path.name for path in straight.glob("step*.ckpt")) == [f"step{n}.ckpt" for n in (1, 2, 3, 4)]
    middle = torch.load(straight / "step3.ckpt", weights_only=True)
    ranks = middle["VerifiableDataModule"]["phase_loader"]["ranks"]
    assert [part["position"] for part in ranks] == [1, 1]  # of a phase's two updates: its middle
    assert ranks[0]["rollouts"] != ranks[1]["rollouts"]
    for step in ("step1", "step2", "step3"):
        again = run_cli(config_for(folders[step], 2, 1), folders[step], "--ckpt_path", str(straight / f"{step}.ckpt"))
        for name, value in end["state_dict"].items():
            assert torch.equal(value, again["state_dict"][name]), (step, name)
            assert not torch.equal(value, middle["state_dict"][name]), name
    one = run_cli(config_for(folders["alone"], 1, 2), folders["alone"])
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(value, end["state_dict"][name], atol=1e-5, rtol=0)


DISTILLED = {
    "own": {"condition": "{prompt}{answer} {prompt}", "ema": 0.3, "on_policy": 0.5},
    "cached": {"teacher": "tiny-addition", "on_policy": 0.0, "top_k": 9, "objective": {"class_path": "ForwardKL"}},
}


@pytest.mark.parametrize("name", DISTILLED)
def test_two_ranks_distil_as_one(tmp_path, name):
    """They draw who answers by the prompt, share the work on the cache, and divide by the tokens of both."""
    ends = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        settings = DISTILLED[name] | ({"teacher_cache": str(folder / "cache")} if name == "cached" else {})
        config = config_for(folder, ranks, 3 - ranks)
        sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
        init = {"policy": "tiny-small", "sampling": {"max_completion_length": 4}, "optimizer": sgd, **settings}
        config["model"] = {"class_path": "DistillModule", "init_args": init}
        config["data"]["init_args"]["train"]["init_args"]["num_examples"] = 200
        ends.append(run_cli(config, folder))
    one, two = ({**end["state_dict"], **end.get("teacher", {})} for end in ends)
    assert len(one) > 20
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], atol=1e-5, rtol=0)
    if name == "cached":
        files = [sorted(file.name for file in (tmp_path / ranks / "cache").iterdir()) for ranks in "12"]
        assert files[0] == files[1] and len(files[0]) == 4  # 64 of 200 to a file


def test_another_number_of_ranks_is_refused_inside_a_phase(tmp_path):
    fit(grpo(), tmp_path, max_epochs=1)
    checkpoint = torch.load(tmp_path / "step1.ckpt", weights_only=True)
    ranks = checkpoint["VerifiableDataModule"]["phase_loader"]["ranks"]
    checkpoint["VerifiableDataModule"]["phase_loader"]["ranks"] = ranks * 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="inside a phase on 2 ranks and cannot go on with 1"):
        fit(grpo(), tmp_path, resume=tmp_path / "two.ckpt")


def test_what_a_resumed_run_does_not_use_is_said(tmp_path: Path) -> None:
    def fit(rows: list[str], lr: float, epochs: int, checkpoint: Path | None = None) -> list[str]:
        (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{row}", "completion": "{row}"}}\n' for row in rows))
        module = modules.SFTModule("tiny", optimizer=partial(torch.optim.AdamW, lr=lr))
        data = InstructionDataModule(train=str(tmp_path / "rows.jsonl"), batch_size=2)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=tmp_path, **quiet)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, data, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        texts = [str(warning.message) for warning in caught]
        return [text for text in texts if text.startswith(("lr ", "the training rows"))]

    assert fit(["a", "b", "c", "d"], 1e-3, 1) == []
    assert fit(["a", "b", "c", "d"], 1e-3, 2, tmp_path / "last.ckpt") == []
    assert fit(["a", "b", "c", "d"], 2e-3, 3, tmp_path / "last.ckpt") == [
        "lr of the optimizer stays 0.001, as in the checkpoint, and 0.002 has no effect; to change it, start a new run "
        "from the export"
    ]
    assert fit(["a", "b", "c", "e"], 1e-3, 4, tmp_path / "last.ckpt") == [
        "the training rows are not those that the checkpoint was trained on; the run goes on at the same place in "
        "these rows"
    ]


def test_a_run_does_not_go_on_from_another_start(tmp_path):
    """The KL would be to another model."""
    other = GRPOModule("tiny-small", RegexFormat(REWARD))
    with torch.no_grad():
        next(other.policy.parameters()).add_(0.1)
    other.save_pretrained(tmp_path / "other")
    fit(grpo(), tmp_path, max_epochs=1)
    settings = {"num_generations": 4, "sampling": Sampling(max_completion_length=4), "measure_kl": True}
    moved = GRPOModule(str(tmp_path / "other"), RegexFormat(REWARD), **settings)
    with pytest.raises(ValueError, match="began with other weights than model.policy"):
        fit(moved, tmp_path, resume=tmp_path / "step1.ckpt", max_epochs=2)


def test_adapters_do_not_go_on_at_another_scale(tmp_path):
    fit(grpo(lora=Lora(r=2, alpha=4.0)), tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match="lora.alpha / lora.r is 4 and was 2 in the checkpoint"):
        fit(grpo(lora=Lora(r=2, alpha=8.0)), tmp_path, resume=tmp_path / "step1.ckpt", max_epochs=2)
