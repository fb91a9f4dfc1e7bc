"""Numbers of a step reach callbacks and loggers in each step and epoch, and seeds are those of ``torch.manual_seed``."""

import csv

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from modules.trainer.ranks import log_equal
from modules.trainer.seeds import seed_device


class CountsSteps(LightningModule):
    """Logs 10 x its step, from the hook in which methods log, and the epoch at its end."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def on_before_optimizer_step(self, optimizer):
        log_equal(self, {"train/ten": 10.0 * self.global_step})
        log_equal(self, {"ten": 10.0 * self.global_step}, prog_bar=True, logger=False)

    def on_train_epoch_end(self):
        log_equal(self, {"train/epochs": float(self.current_epoch)})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sees(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        metrics, bar = trainer.callback_metrics, trainer.progress_bar_metrics
        self.seen.append((float(metrics["train/ten"]), float(bar["ten"])))


def test_each_step_logs_its_own_number(tmp_path):
    sees, logger = Sees(), CSVLogger(tmp_path, name="", version="")
    settings = {"accelerator": "cpu", "enable_model_summary": False, "enable_checkpointing": False}
    Trainer(max_epochs=2, log_every_n_steps=1, logger=logger, callbacks=[sees], **settings).fit(
        CountsSteps(), DataLoader(torch.ones(3, 1))
    )
    assert sees.seen == [(10.0 * step, 10.0 * step) for step in range(6)]
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train/ten"]) for row in rows if row["train/ten"]] == [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]
    assert [float(row["train/epochs"]) for row in rows if row["train/epochs"]] == [0.0, 1.0]


def test_a_device_is_seeded_as_torch_seeds_all():
    torch.manual_seed(2**40 + 7)
    expected, seed = torch.rand(3), torch.initial_seed()
    torch.manual_seed(0)
    seed_device(2**40 + 7, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected) and torch.initial_seed() == seed
