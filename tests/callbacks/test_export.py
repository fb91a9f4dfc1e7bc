"""Export in a real Trainer: a folder that the Auto classes load, replaced as a whole or not at all."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from callbacks import AveragedWeights, Export
from modules.networks.tiny import tiny_model, tiny_tokenizer
from modules.trainer.exports import MARK


class Holder(torch.nn.Module):
    """Holds the tiny model and its tokenizer; saving can be told to fail after the first file."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.model, self.tokenizer, self.fails, self.num_saves = tiny_model(), tiny_tokenizer(), fails, 0

    def save_pretrained(self, folder: Path) -> None:
        self.num_saves += 1
        self.model.save_pretrained(folder)
        if self.fails:
            raise OSError("disk full")
        self.tokenizer.save_pretrained(folder)


class Tuned(LightningModule):
    def __init__(self, fails: bool = False, diverges: bool = False) -> None:
        super().__init__()
        self.policy, self.diverges = Holder(fails), diverges

    def prepare_export(self) -> None:
        self.prepared = True

    def save_pretrained(self, folder: Path) -> None:
        assert self.prepared
        self.policy.save_pretrained(folder)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.diverges:
            raise FloatingPointError("diverged")
        return self.policy.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


IDS = torch.tensor([[80, 81, 82, 83]])


def train(module: Tuned, callbacks: Sequence[Callback], epochs: int = 1, fast: bool = False, **more: Any) -> None:
    data: DataLoader[Tensor] = DataLoader([IDS[0]])  # type: ignore[arg-type]
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), fast_dev_run=fast, **options, **more).fit(
        module, data
    )  # type: ignore[arg-type]


def logits(model: torch.nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_auto_classes_load_the_trained_weights(tmp_path: Path) -> None:
    module = Tuned()
    start = logits(module.policy.model)
    train(module, [Export(str(tmp_path / "out" / "model"))])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert torch.equal(logits(loaded), logits(module.policy.model))
    assert not torch.equal(logits(loaded), start)
    text = "2 + 2 = \u00e9"
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "model")(text).input_ids == tiny_tokenizer()(text).input_ids
    assert names(tmp_path / "out") == {"model"}


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_everybody_who_may_read_one_file_may_read_all(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        train(Tuned(), [Export(str(tmp_path / "model"))])
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == {0o666 & ~mask}


def test_a_second_run_replaces_the_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    train(Tuned(), [Export(str(folder))])
    (folder / "stale.txt").write_text("from the first export")
    with (folder / MARK).open("a") as mark:
        mark.write("stale.txt\n")
    module = Tuned()
    train(module, [Export(str(folder))], epochs=2)
    assert "stale.txt" not in names(folder)
    assert names(tmp_path) == {"model"}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(module.policy.model))


def test_a_failed_export_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    train(Tuned(), [Export(str(folder))])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        train(Tuned(fails=True), [Export(str(folder))], epochs=2)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names(tmp_path) == {"model"}


def test_a_failed_fit_and_a_fast_dev_run_export_nothing(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError):
        train(Tuned(diverges=True), [Export(str(tmp_path / "model"))])
    train(Tuned(), [Export(str(tmp_path / "model"), every_n_epochs=1)], fast=True)
    assert names(tmp_path) == set()


@pytest.mark.parametrize(("every", "epochs", "saves"), [(None, 4, 1), (2, 4, 2), (3, 4, 2), (1, 4, 4)])
def test_exports_every_n_epochs_and_once_at_the_end(tmp_path: Path, every: int | None, epochs: int, saves: int) -> None:
    module = Tuned()
    train(module, [Export(str(tmp_path / "model"), every_n_epochs=every)], epochs=epochs)
    assert module.policy.num_saves == saves
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(module.policy.model))


def test_refuses_to_replace_other_things(tmp_path: Path) -> None:
    somebodys = tmp_path / "model"
    tiny_model().save_pretrained(somebodys)
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for target in (tmp_path, tmp_path / "thesis.txt", somebodys):
        with pytest.raises(ValueError, match="which is a file|which no export has written"):
            train(Tuned(), [Export(str(target))])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    train(Tuned(), [Export(str(tmp_path / "empty"))])
    assert "config.json" in names(tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"with files that no export has written \(notes.txt\)"):
        train(Tuned(), [Export(str(tmp_path / "empty"))])


def test_refuses_the_folder_of_its_own_policy(tmp_path: Path) -> None:
    train(Tuned(), [Export(str(tmp_path / "model"))])
    module = Tuned()
    module.policy.path = str(tmp_path / "model")
    with pytest.raises(ValueError, match="from which this run reads a model"):
        train(module, [Export(str(tmp_path / "other" / ".." / "model"))])


def test_an_export_without_a_mark_is_known_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export/config.json").write_text("of an earlier version")
    train(Tuned(), [Export()], default_root_dir=tmp_path)
    assert MARK in names(tmp_path / "export")


def test_broken_weights_are_not_exported(tmp_path: Path) -> None:
    train(Tuned(), [Export(str(tmp_path / "model"))])
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    module = Tuned()
    module.register_parameter("broken", torch.nn.Parameter(torch.tensor(torch.nan)))
    with pytest.raises(FloatingPointError, match="Export: the weights are not finite"):
        train(module, [Export(str(tmp_path / "model"))])
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_an_export_killed_between_its_renames_is_put_back(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    train(Tuned(), [Export(str(folder))])
    folder.rename(tmp_path / ".model.previous")
    (tmp_path / ".model.partial").mkdir()
    with pytest.raises(FloatingPointError):
        train(Tuned(diverges=True), [Export(str(folder))])
    assert "config.json" in names(folder)
    train(Tuned(), [Export(str(folder))])
    assert names(tmp_path) == {"model"}


def test_period_is_checked() -> None:
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1, got 0"):
        Export("model", every_n_epochs=0)


def test_weights_are_averaged_before_they_are_exported(tmp_path: Path) -> None:
    export, average = Export(str(tmp_path / "export")), AveragedWeights(decay=0.5)
    with pytest.raises(ValueError, match="list what averages them before Export"):
        train(Tuned(), [export, StochasticWeightAveraging(1e-3)])
    with pytest.raises(ValueError, match="list what averages them before Export"):
        train(Tuned(), [export, average])
    train(module := Tuned(), [average, export])
    start = logits(Tuned().policy.model)
    exported = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "export"))
    torch.testing.assert_close(
        exported, logits(module.policy.model), atol=1e-5, rtol=0
    )  # which ends with the average as well
    assert not torch.allclose(exported, start)
