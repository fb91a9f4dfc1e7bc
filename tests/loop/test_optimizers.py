"""The optimizer's way of updating on CPUs: one pass over memory, the same weights, and what the user chose stays."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import SGD, AdamW

from datamodules import Addition, InstructionDataModule
from modules import SFTModule


def fit(optimizer, **settings) -> tuple[SFTModule, dict]:
    """Train a few steps; return the module, and the first group of its optimizer."""
    seed_everything(0)
    module = SFTModule("tiny", optimizer=optimizer)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=4, gradient_clip_val=1.0, **quiet, **settings)
    trainer.fit(module, InstructionDataModule(module.tokenizer, Addition(16), batch_size=4))
    return module, trainer.optimizers[0].param_groups[0]


def flatten(module: SFTModule) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


def test_a_fused_adam_gives_the_weights_of_a_plain_one():
    adam = partial(AdamW, lr=1e-2, weight_decay=0.1)
    fused, group = fit(adam)
    plain, other = fit(partial(adam, fused=False))
    assert group["fused"] and not other["fused"]
    start = flatten(SFTModule("tiny"))
    moved, gap = (flatten(fused) - start).norm(), (flatten(fused) - flatten(plain)).norm()
    assert moved > 1 and gap < 1e-4 * moved  # both took every step


@pytest.mark.parametrize("chosen", [{"foreach": True}, {"fused": False}], ids=["foreach", "not fused"])
def test_what_the_user_chose_stays(chosen):
    _, group = fit(partial(AdamW, lr=1e-3, **chosen))
    assert {name: group[name] for name in chosen} == chosen
    assert not group["fused"]


def test_another_optimizer_is_left_alone():
    _, group = fit(partial(SGD, lr=1e-3))
    assert group["fused"] is None


def test_gradients_are_clipped_before_a_fused_step_with_a_scaler():
    """Lightning refuses to clip for an optimizer that unscales by itself; ours does not."""
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    module, group = fit(partial(AdamW, lr=1e-3), plugins=[scaled])
    assert group["fused"] and scaled.scaler.get_scale() == 2.0**8
    assert flatten(module).isfinite().all() and (flatten(module) != flatten(SFTModule("tiny"))).any()
