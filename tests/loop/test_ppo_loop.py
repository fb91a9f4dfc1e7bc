"""PPO in a real Trainer: bitwise resume with all that it keeps between phases, averaged weights, and ranks that change
nothing.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from programs import run_program
from test_resume import Records, SaveInside, States, assert_goes_on, equal

from callbacks import AveragedWeights, Export
from datamodules import Addition, NumberTexts, PtxStream, VerifiableDataModule
from modules import PPOModule
from modules.losses import GAE, KL, AdaptiveKL, Incentives
from modules.networks.critic import Value
from modules.networks.lora import Lora
from modules.networks.policy import Policy
from modules.rewards import RegexFormat
from modules.rollout.sampling import Sampling

REWARD = r"[\x00-\x7f].*"  # starts in plain ASCII: an untrained model fulfils it half of the time
DECAY = 0.9


def ppo(**settings: Any) -> PPOModule:
    """Make a PPO run with everything it can keep: a critic that warms up for a phase, a KL weight that moves, texts."""
    settings = {
        "num_generations": 2,
        "sampling": Sampling(max_completion_length=4),
        "value": Value(lr=3e-3, warmup_phases=1),
    } | settings
    settings = {
        "kl": KL(0.5, AdaptiveKL(target=1.0, gain=1.0)),
        "incentives": Incentives(ptx=0.5),
        "gae": GAE(whiten_rewards=True),
    } | settings
    settings = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)} | settings
    return PPOModule("tiny-small", RegexFormat(REWARD), **settings)


class AtValidation(Callback):
    """Keeps the module's weights at each validation, by step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self.weights[trainer.global_step] = {name: value.clone() for name, value in pl_module.state_dict().items()}


def fit(
    module: PPOModule, folder: Path, resume: Path | None = None, before: Any = (), after: Any = (), **settings: Any
) -> States:
    """Run phases of two updates of two micro-batches, with a checkpoint after each step and each phase.

    ``before`` and ``after`` are callbacks.
    """
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
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[*before, states, every_step, every_phase, *after],
        logger=records,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": 3} | settings),
    )
    val = Addition(4, held_out=True) if "check_val_every_n_epoch" in settings else None
    ptx = PtxStream(NumberTexts(20, subject="counting"), rows_per_update=4, max_length=16)
    data = VerifiableDataModule(
        module.tokenizer, Addition(40), val=val, prompts_per_phase=4, updates_per_phase=2, ptx=ptx
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    states.logged = records.found
    return states


VALIDATED = {"check_val_every_n_epoch": 2}
STEPS = 6  # three phases of two updates


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[States, Path]:
    folder = tmp_path_factory.mktemp("straight")
    return fit(ppo(), folder, after=[SaveInside(5, folder / "inside.ckpt")], **VALIDATED), folder


def test_the_run_has_all_that_a_resume_must_bring_back(straight):
    states, folder = straight
    assert max(states.after) == STEPS
    coefficients = [value for (_, name), value in sorted(states.logged.items()) if name == "train/kl_coef"]
    # the warm-up phase moves nothing; the KL of phase 1, which an unchanged policy samples, is 0 and lowers the weight
    # by a fifth
    assert coefficients == pytest.approx([0.5, 0.5, 0.4])
    first, second = (torch.load(folder / f"step{step}.ckpt", weights_only=True) for step in (1, 2))
    moved = {name for name, value in second["state_dict"].items() if not torch.equal(value, first["state_dict"][name])}
    assert moved == {"critic.head.weight"}  # the policy waits for the critic
    names = {name for _, name in states.logged}
    assert {
        "train/ptx_loss",
        "train/explained_variance",
        "train/rlhf_reward",
        "train/kl_coef",
        "train/value_loss",
        "val/pass@1",
    } <= names


@pytest.mark.parametrize("checkpoint", ["step1", "phase0", "step3", "inside", "phase1", "step5"])
def test_resume_is_bitwise(straight, tmp_path, checkpoint):
    states, folder = straight
    resumed = fit(ppo(), tmp_path, resume=folder / f"{checkpoint}.ckpt", **VALIDATED)
    assert max(resumed.after) == STEPS
    assert_goes_on(resumed, states, checkpoint)


def averages(states: States) -> dict[int, list[torch.Tensor]]:
    """Return the moving average of the weights after each step: the first step's weights, then 0.9 of it and 0.1 of
    each new.
    """
    found = {1: states.after[1]}
    for step in range(2, STEPS + 1):
        found[step] = [
            DECAY * mean + (1 - DECAY) * weight
            for mean, weight in zip(found[step - 1], states.after[step], strict=True)
        ]
    return found


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[States, AtValidation, Path]:
    folder, seen = tmp_path_factory.mktemp("averaged"), AtValidation()
    return (
        fit(ppo(), folder, before=[averaging()], after=[seen, Export(str(folder / "export"))], **VALIDATED),
        seen,
        folder,
    )


def averaging() -> AveragedWeights:
    return AveragedWeights(decay=DECAY)


def own(states: States) -> States:
    """Leave out the metrics of validation, which belong to other weights."""
    kept = copy.copy(states)
    kept.logged = {key: value for key, value in states.logged.items() if not key[1].startswith("val/")}
    return kept


def test_averaging_changes_nothing_of_the_run_itself(straight, averaged):
    """Neither weights nor samples change, not even in the phase after a validation."""
    assert averaged[0].after.keys() == straight[0].after.keys()
    assert_goes_on(own(averaged[0]), straight[0], "averaged")


def test_validation_export_and_checkpoints_have_the_averaged_weights(straight, averaged):
    states, seen, folder = averaged
    means = averages(states)
    names = [name for name, _ in ppo().named_parameters()]
    assert list(seen.weights) == [4]
    checkpoint = torch.load(folder / "step6.ckpt", weights_only=True)
    exported = dict(Policy(str(folder / "export")).named_parameters())
    for place, name in enumerate(names):
        torch.testing.assert_close(seen.weights[4][name], means[4][place], atol=5e-7, rtol=0, msg=name)
        torch.testing.assert_close(checkpoint["state_dict"][name], means[STEPS][place], atol=5e-7, rtol=0, msg=name)
        assert torch.equal(checkpoint["current_model_state"][name], states.after[STEPS][place])
        if name.startswith("policy."):
            assert torch.equal(exported[name.removeprefix("policy.")], checkpoint["state_dict"][name])
            assert not torch.allclose(means[STEPS][place], states.after[STEPS][place], atol=1e-4), name
    validations = [
        [value for (_, name), value in run.logged.items() if name == "val/sequence_kl"] for run in (states, straight[0])
    ]
    assert 0 < validations[0][0] < validations[1][0]  # the average is nearer to the start


@pytest.mark.parametrize("checkpoint", ["step3", "phase1"])
def test_resume_with_averaged_weights_is_bitwise(averaged, tmp_path, checkpoint):
    states, _, folder = averaged
    resumed = fit(ppo(), tmp_path, folder / f"{checkpoint}.ckpt", before=[averaging()], **VALIDATED)
    assert_goes_on(resumed, states, checkpoint)
    ends = [torch.load(run / "step6.ckpt", weights_only=True)["state_dict"] for run in (folder, tmp_path)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_averaging_with_adapters_shares_the_reference_and_spares_the_run(tmp_path):
    """The reference is the policy's first adapters, kept once; policy and critic are adapters on one backbone."""

    def adapted() -> PPOModule:
        torch.manual_seed(0)  # of the adapters' first weights
        optimizer = partial(torch.optim.AdamW, lr=1e-2)
        return ppo(lora=Lora(r=4), value=Value(model="tiny-small", lr=3e-3), optimizer=optimizer)

    average, module = averaging(), adapted()
    kept = fit(module, tmp_path / "averaged", before=[average], max_epochs=2, check_val_every_n_epoch=1)
    plain = fit(adapted(), tmp_path / "plain", max_epochs=2, check_val_every_n_epoch=1)
    assert_goes_on(own(kept), plain, "adapters")
    assert average._average_model is not None and average._average_model.module.reference is module.reference
    assert not equal(plain.after[1], plain.after[4])
    frozen = {name: weight for name, weight in module.named_parameters() if not weight.requires_grad}
    mean = dict(average._average_model.module.named_parameters())
    assert frozen and all(
        torch.equal(mean[name], weight) for name, weight in frozen.items()
    )  # adapters of it are known by its bits


RANKS = """
import sys
from pathlib import Path
from test_ppo_loop import fit_on

if __name__ == "__main__":
    fit_on(Path(sys.argv[1]), devices=2, accumulate=1, strategy="ddp_fork")
"""


class Written(Callback):
    """Writes the weights and the logged metrics to a file."""

    def __init__(self, path: Path, records: Records) -> None:
        self.path, self.records = path, records

    def on_train_end(self, trainer, pl_module) -> None:
        if trainer.is_global_zero:
            weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
            torch.save({"weights": weights, "logged": self.records.found}, self.path)


def fit_on(path: Path, devices: int, accumulate: int, strategy: str = "auto") -> None:
    """Run two phases of two updates by plain gradient descent.

    Adam's first step is the gradient's sign, in which rounding would show.
    """
    counting = AdaptiveKL(target=1.0, gain=None, horizon=100)  # a gain that depends on the completions of all ranks
    module = ppo(
        value=Value(lr=0.05), kl=KL(0.5, counting), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5)
    )
    ptx = PtxStream(NumberTexts(20, subject="counting"), rows_per_update=4, max_length=16)
    data = VerifiableDataModule(module.tokenizer, Addition(40), prompts_per_phase=8, updates_per_phase=2, ptx=ptx)
    records = Records()
    quiet = {
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        max_epochs=2,
        gradient_clip_val=1.0,
        logger=records,
        callbacks=[Written(path, records)],
        **quiet,
    )
    trainer.fit(module, data)


def test_two_ranks_make_the_run_of_one(tmp_path):
    (tmp_path / "two_ranks.py").write_text(RANKS)
    done = run_program("two_ranks.py", "two.pt", folder=tmp_path, path=[Path(__file__).parent])
    assert done.returncode == 0, done.stderr[-3000:]
    fit_on(tmp_path / "one.pt", devices=1, accumulate=2)
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    start = ppo().state_dict()
    assert one["weights"].keys() == two["weights"].keys()
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, atol=1e-5, rtol=0)
    for name in ("critic.head.weight", "policy.model.model.embed_tokens.weight"):
        assert (one["weights"][name] - start[name]).abs().max() > 1e-3, name  # a hundred times what may differ
    assert one["logged"].keys() == two["logged"].keys()
    names = {name for _, name in one["logged"]}
    assert {
        "train/explained_variance",
        "train/rlhf_reward",
        "train/sequence_kl",
        "train/kl_coef",
        "train/ptx_loss",
        "train/ratio/var",
    } <= names
    for key, value in one["logged"].items():
        if key[1].startswith("train/engine/"):  # of each rank's own calls
            continue
        assert two["logged"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
