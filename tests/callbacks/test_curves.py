"""Curves of a real GRPO run: one panel each, every phase once, also after a resume, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer, seed_everything
from matplotlib.image import imread

from callbacks import Curves
from datamodules import Chains, VerifiableDataModule
from modules import GRPOModule
from modules.rewards import ExactMatch, RegexFormat, WeightedSum
from modules.rollout import Sampling

METRICS = {"form": "train/rewards/format/mean", "tokens": "train/completions/mean_length"}


def fit(folder: Path, curves: Curves, epochs: int = 2, **options: Any) -> Trainer:
    seed_everything(0)
    module = GRPOModule(
        "tiny",
        WeightedSum([ExactMatch(), RegexFormat(".*")]),
        num_generations=2,
        sampling=Sampling(max_completion_length=4),
    )
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[curves], default_root_dir=folder, logger=False, **options
    )
    trainer.fit(module, VerifiableDataModule(module.tokenizer, Chains(8), prompts_per_phase=2))
    return trainer


def test_every_phase_is_drawn_once_also_after_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = Curves(METRICS)
    trainer = fit(tmp_path, curves)
    assert [row["phase"] for row in curves.history] == [0.0, 1.0]
    assert curves.history[-1]["tokens"] == float(trainer.callback_metrics["train/completions/mean_length"])
    assert f"figure: {tmp_path / 'curves.png'}" in capsys.readouterr().out
    assert imread(tmp_path / "curves.png").shape[:2] == (320, 720)  # 4 x 9 inches of 80 dots
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    longer = Curves(METRICS, str(tmp_path / "new/longer.png"))
    resumed = Trainer(accelerator="cpu", max_epochs=3, callbacks=[longer], default_root_dir=tmp_path, logger=False)
    module = GRPOModule(
        "tiny",
        WeightedSum([ExactMatch(), RegexFormat(".*")]),
        num_generations=2,
        sampling=Sampling(max_completion_length=4),
    )
    data = VerifiableDataModule(module.tokenizer, Chains(8), prompts_per_phase=2)
    resumed.fit(module, data, ckpt_path=str(tmp_path / "two.ckpt"))
    assert longer.history[:2] == curves.history and [row["phase"] for row in longer.history] == [0.0, 1.0, 2.0]
    assert (tmp_path / "new/longer.png").is_file()


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Curves needs at least one metric"):
        Curves({})
    with pytest.raises(ValueError, match=r"Curves cannot draw train/speed; it can draw train/completions/clipped"):
        fit(tmp_path, Curves({"speed": "train/speed"}), epochs=1)
    assert not (tmp_path / "curves.png").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Curves: .*curves.png cannot be written"):
        fit(tmp_path, Curves(METRICS, str(tmp_path / "file/curves.png")))


def test_a_fast_dev_run_draws_nothing(tmp_path: Path) -> None:
    fit(tmp_path, Curves(METRICS), fast_dev_run=True)
    assert not (tmp_path / "curves.png").exists()
