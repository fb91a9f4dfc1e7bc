"""Schedules over the whole run: the Trainer tells their length, and a resumed run follows the same curve."""

import math
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau

from datamodules import Addition, InstructionDataModule
from modules import SFTModule
from modules.schedulers import ConstantWithWarmup, CosineDecay, LinearDecay


class Rates(Callback):
    """Keeps the learning rate of every update."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


class TwoGroups(SFTModule):
    """Trains its head with a learning rate of its own."""

    head_rate = 0.1

    def parameter_groups(self):
        head, *others = reversed(super().parameter_groups())
        return [{"params": others}, {"params": [head], "lr": self.head_rate}]


def fit(
    folder,
    scheduler,
    ckpt_path=None,
    callbacks=(),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    kind=SFTModule,
    **settings,
):
    module = kind("tiny", optimizer=optimizer, scheduler=scheduler)
    rows = Addition(num_examples=40)
    data = InstructionDataModule(module.tokenizer, rows, Addition(num_examples=8, held_out=True), batch_size=4)
    rates = Rates()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=folder, callbacks=[rates, *callbacks], **quiet | {"max_epochs": 2} | settings)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return rates.rates


def test_a_linear_decay_spans_epochs_accumulation_and_max_steps(tmp_path):
    # 40 rows / 4 = 10 micro-batches, 5 updates of 2 an epoch, 10 in all; warm-up ceil(0.2 * 10) = 2 updates
    rates = fit(tmp_path, lambda optimizer: LinearDecay(optimizer, warmup=0.2), accumulate_grad_batches=2)
    assert rates == pytest.approx([0.5 * f for f in (1 / 3, 2 / 3, *(1 - k / 8 for k in range(8)))])
    rates = fit(tmp_path, lambda optimizer: LinearDecay(optimizer, warmup=0), max_steps=4)
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125])


def test_cosine_and_constant(tmp_path):
    rates = fit(tmp_path, lambda optimizer: CosineDecay(optimizer, warmup=2, final=0.1), max_steps=6)
    decay = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates == pytest.approx([0.5 * f for f in (1 / 3, 2 / 3, *decay)])
    rates = fit(tmp_path, lambda optimizer: ConstantWithWarmup(optimizer, warmup=1), max_steps=3)
    assert rates == pytest.approx([0.25, 0.5, 0.5])


def test_a_resumed_run_follows_the_same_curve_and_says_where_a_longer_one_leads(tmp_path, caplog):
    schedule = lambda optimizer: LinearDecay(optimizer, warmup=0.1)  # noqa: E731
    whole = fit(tmp_path, schedule)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    fit(tmp_path, schedule, callbacks=[saver])
    assert fit(tmp_path, schedule, ckpt_path=tmp_path / "step=7.ckpt") == whole[7:]
    with caplog.at_level("INFO"):
        longer = fit(tmp_path, schedule, ckpt_path=tmp_path / "step=7.ckpt", max_epochs=3)
    assert "schedule: now over 30 updates instead of 20" in caplog.text
    assert longer[0] == pytest.approx(0.5 * (1 - 4 / 27))  # update 7 of 30, 3 of them warm-up


def test_what_a_resumed_run_asks_without_effect_is_said(tmp_path, monkeypatch):
    """Settings of a schedule, of a group of the optimizer, and of a callback, which the checkpoint brings."""

    def resume(scheduler, patience):
        saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=5)
        stop = EarlyStopping("train/loss", patience=patience)
        checkpoint = tmp_path / "step=5.ckpt"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(
                tmp_path,
                scheduler,
                checkpoint if checkpoint.exists() else None,
                [saver, stop],
                kind=TwoGroups,
                max_steps=6,
            )
        return [str(warning.message).partition(", as")[0] for warning in caught if " stays " in str(warning.message)]

    assert resume(partial(LinearDecay, warmup=0.1), 5) == []
    assert resume(partial(LinearDecay, warmup=0.1), 5) == []
    monkeypatch.setattr(TwoGroups, "head_rate", 0.2)
    assert resume(partial(LinearDecay, warmup=0.3, final=0.9), 6) == [
        "patience of EarlyStopping stays 5",
        "lr of the optimizer stays 0.1",
        "warmup of the scheduler stays 0.1",
        "final of the scheduler stays 0.0",
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scheduler": None}, r"another scheduler \(LinearDecay there, none here\): set model.scheduler as it was"),
        ({"scheduler": CosineDecay}, r"scheduler \(LinearDecay there, CosineDecay here\)"),
        (
            {"optimizer": partial(torch.optim.Adagrad, lr=0.5)},
            r"another optimizer \(SGD there, Adagrad here\): set model.optimizer as it was",
        ),
    ],
)
def test_a_run_does_not_go_on_with_another_schedule_or_optimizer(tmp_path, settings, said):
    fit(tmp_path, LinearDecay, callbacks=[ModelCheckpoint(tmp_path, "first")], max_steps=1)
    with pytest.raises(ValueError, match=said):
        fit(tmp_path, **{"scheduler": LinearDecay} | settings, ckpt_path=tmp_path / "first.ckpt")


def test_a_plateau_is_watched(tmp_path):
    rates = fit(
        tmp_path, lambda optimizer: ReduceLROnPlateau(optimizer, "val/loss", patience=0, threshold=100.0), max_epochs=3
    )
    assert rates[:10] == [0.5] * 10
    assert rates[-1] < 0.5  # the loss never falls by a factor of 100
    with pytest.raises(ValueError, match="which metric it watches"):
        fit(tmp_path, lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))


@pytest.mark.parametrize("settings", [{"warmup": 1.5}, {"warmup": -0.1}, {"warmup": math.nan}, {"final": 2.0}])
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="; set a share of"):
        LinearDecay(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), **settings)
