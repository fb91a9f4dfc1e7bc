"""Online DPO: the pair of each prompt, learning, a reference that moves, resume, and pairs that stay together."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import Addition, VerifiableDataModule
from modules import OnlineDPOModule
from modules.networks.lora import Lora
from modules.online_dpo import rank_best_and_worst
from modules.rewards import RegexFormat
from modules.rollout.sampling import Sampling
from modules.types import Reward

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
ASCII = RegexFormat(r"[\x00-\x7f]*", name="ascii")  # about one in five completions of the untrained model


def online(**settings) -> OnlineDPOModule:
    seed_everything(0)
    settings = {
        "num_generations": 4,
        "sampling": Sampling(max_completion_length=4),
        "lr": 1e-3,
        "optimizer": torch.optim.AdamW,
    } | settings
    lr, optimizer = settings.pop("lr"), settings.pop("optimizer")
    return OnlineDPOModule(
        "tiny", settings.pop("reward", ASCII), optimizer=lambda parameters: optimizer(parameters, lr=lr), **settings
    )


class First(Reward):
    """A reward by which the first completion of a group is the best."""

    name = "first"

    def __call__(self, rollouts):
        return [
            float(place == 0 or rollouts[place - 1].group != rollout.group) for place, rollout in enumerate(rollouts)
        ]


def fit(module, phases: int = 4, resume=None, callbacks=(), prompts: int = 8, **settings) -> Trainer:
    trainer = Trainer(
        **QUIET, max_epochs=phases, enable_checkpointing=bool(callbacks), callbacks=list(callbacks), **settings
    )
    data = VerifiableDataModule(
        module.tokenizer, Addition(200), val=Addition(40, held_out=True), prompts_per_phase=prompts
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return trainer


def weights(module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.policy.parameters()])


def test_best_and_worst_of_a_group():
    nan = float("nan")
    rewards = torch.tensor([0.0, 2.0, 2.0, 1.0, 1.0, nan, 0.5, 0.4, nan, nan])
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    assert rank_best_and_worst(rewards, group).tolist() == [
        1,
        0,
        -1,
        -1,
        -1,
        -1,
        0,
        1,
        -1,
        -1,
    ]  # group 1 is tied, group 3 unscorable
    assert rank_best_and_worst(rewards, group, min_gap=0.5).tolist() == [1, 0, -1, -1, -1, -1, -1, -1, -1, -1]


@pytest.mark.parametrize(("lr", "learns"), [(3e-3, True), (0.0, False)])
def test_it_learns_what_is_rewarded(lr, learns):
    module = online(lr=lr, num_generations=8)
    trainer = fit(module, phases=25, check_val_every_n_epoch=25, gradient_clip_val=1.0)
    passed = float(trainer.callback_metrics["val/pass@1"])
    assert passed > 0.6 if learns else passed < 0.4


@pytest.mark.parametrize("refresh", ["fixed", "phase", "soft"])
def test_the_reference_moves_as_asked(refresh):
    module = online(refresh=refresh)
    start = torch.cat([weight.flatten().clone() for weight in module.reference.weights.values()])
    fit(module, phases=1)
    reference = torch.cat([weight.flatten() for weight in module.reference.weights.values()])
    wanted = {"fixed": start, "phase": weights(module), "soft": start.lerp(weights(module), 0.6)}[refresh]
    assert torch.equal(reference, wanted)
    assert not torch.equal(start, weights(module))


@pytest.mark.parametrize("refresh", ["fixed", "soft"])
def test_resume_is_bitwise(tmp_path, refresh):
    whole = online(refresh=refresh)
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(whole, phases=3, callbacks=[every])
    resumed = online(refresh=refresh)
    fit(resumed, phases=3, resume=tmp_path / "epoch=0.ckpt", callbacks=[ModelCheckpoint(tmp_path / "again")])
    assert torch.equal(weights(resumed), weights(whole))


def test_splits_change_nothing_and_keep_pairs_together():
    whole, split = online(optimizer=torch.optim.SGD, lr=0.1), online(optimizer=torch.optim.SGD, lr=0.1)
    fit(whole, phases=2, limit_val_batches=0)
    fit(split, phases=2, limit_val_batches=0, accumulate_grad_batches=4)
    torch.testing.assert_close(weights(split), weights(whole), atol=1e-6, rtol=0)


def test_a_phase_without_a_pair_changes_nothing():
    module = online(reward=RegexFormat(r"(?!)", name="never"), lr=1e-3)
    start = weights(module)
    fit(module, phases=1, limit_val_batches=0)
    assert torch.allclose(weights(module), start, atol=1e-4)  # weight decay alone


def test_too_few_prompts_for_the_micro_batches_are_refused():
    with pytest.raises(ValueError, match="the smallest update has 1 prompts.*raise prompts_per_phase"):
        fit(online(num_generations=2, reward=First()), prompts=1, accumulate_grad_batches=2)


SOFT_ADAPTERS = {"refresh": "soft", "lora": Lora()}  # the average of two products is no product of averages


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.0},
        {"beta": float("nan")},
        {"min_gap": -1.0},
        {"refresh_every": 0},
        SOFT_ADAPTERS,
        {"num_generations": 1},
    ],
)
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(ValueError):
        online(**settings)
