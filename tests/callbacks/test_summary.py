"""Summary over a real fit, its checkpoint, and a validation of that checkpoint."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import Summary


class Counter(LightningModule):
    """Logs val/pass@1 = 0.25 + optimiser steps so far / 4, and val/reward as its opposite."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return -self.steps.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        # Batches 0 and 2 average to 1: a check of one batch would read 0 of it.
        self.log("val/pass@1", batch.mean() * (0.25 + self.steps.sum() / 4), batch_size=1)

    def on_validation_epoch_end(self) -> None:
        self.log("val/reward", -self.steps.sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def loader(*values: float) -> DataLoader[Tensor]:
    return DataLoader([torch.tensor([value]) for value in values])  # type: ignore[arg-type]


def summary() -> Summary:
    return Summary(title="toy", headline="val/pass@1", metrics=["val/reward"])


def trainer(folder: Path, callback: Summary, epochs: int = 3, sanity: int = -1, log: bool = True) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=[callback, ModelCheckpoint(folder / "ckpt", filename="{epoch}", save_top_k=-1)],
        logger=TensorBoardLogger(folder / "my logs") if log else False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=sanity,
        log_every_n_steps=1,
    )


def fit(folder: Path, epochs: int = 3, sanity: int = -1) -> None:
    trainer(folder, summary(), epochs, sanity).fit(Counter(), loader(1.0), loader(0.0, 2.0))


def validate(folder: Path, epoch: int, capsys: pytest.CaptureFixture[str], log: bool = True) -> list[str]:
    capsys.readouterr()
    trainer(folder, summary(), log=log).validate(
        Counter(), loader(0.0, 2.0), ckpt_path=folder / "ckpt" / f"epoch={epoch}.ckpt"
    )
    return capsys.readouterr().out.rstrip("\n").split("\n")


def rows(lines: list[str]) -> list[list[str]]:
    """Return the cells of the last table that was printed."""
    cells = [
        [cell.strip(" \u2503") for cell in line.strip("\u2502\u2503").replace("\u2503", "\u2502").split("\u2502")]
        for line in lines
    ]
    start = max(i for i, row in enumerate(cells) if row[0] == "metric")
    return [row for row in cells[start:] if len(row) > 1]


def test_table_command_and_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path)
    lines = validate(tmp_path, 2, capsys)
    assert lines[-1] == "toy: pass@1 0.25 -> 1.00"
    assert lines[-2] == f"tensorboard --logdir '{tmp_path / 'my logs'}'"
    assert rows(lines) == [
        ["metric", "before", "after"],
        ["val/pass@1", "0.25", "1.00"],
        ["val/reward", "0.00", "-3.00"],
    ]


def test_before_survives_safe_loading(tmp_path: Path) -> None:
    fit(tmp_path)
    states = torch.load(tmp_path / "ckpt" / "epoch=0.ckpt", weights_only=True)["callbacks"]
    assert states["Summary"] == {"before": {"val/pass@1": 0.25, "val/reward": 0.0}}


def test_resume_keeps_the_first_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, epochs=1)
    resumed = trainer(tmp_path, summary(), epochs=3)
    resumed.fit(Counter(), loader(1.0), loader(0.0, 2.0), ckpt_path=tmp_path / "ckpt" / "epoch=0.ckpt")
    assert validate(tmp_path, 2, capsys)[-1] == "toy: pass@1 0.25 -> 1.00"


@pytest.mark.parametrize("sanity", [0, 1])
def test_without_a_whole_validation_before_only_after_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sanity: int
) -> None:
    fit(tmp_path, sanity=sanity)
    lines = validate(tmp_path, 2, capsys, log=False)
    assert lines[-1] == "toy: pass@1 1.00"
    assert lines[-2] == f"tensorboard --logdir {tmp_path}"
    assert "num_sanity_val_steps -1" in lines[-3]
    assert rows(lines)[:2] == [["metric", "after"], ["val/pass@1", "1.00"]]


def test_nothing_is_printed_by_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path)
    assert "toy:" not in capsys.readouterr().out


def test_a_fit_after_validate_does_not_print_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = trainer(tmp_path, summary())
    module = Counter()
    shared.validate(module, loader(0.0, 2.0))
    shared.fit(module, loader(1.0), loader(0.0, 2.0))
    assert capsys.readouterr().out.count("toy:") == 1


def test_a_misspelt_metric_is_named_before_training(tmp_path: Path) -> None:
    module = Counter()
    callback = Summary(title="toy", headline="val/pass@1", metrics=["val/rewards"])
    with pytest.raises(ValueError, match=r"\['val/rewards'\].*\['val/pass@1', 'val/reward'\]"):
        trainer(tmp_path, callback).fit(module, loader(1.0), loader(0.0, 2.0))
    assert module.steps.item() == 0.0
