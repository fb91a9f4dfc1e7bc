"""The curve of accuracy against thinking budget, in TensorBoard and as a table."""

import json
import re
from pathlib import Path

import pytest
from conftest import Events
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import BudgetCurve
from datamodules import VerifiableDataModule
from modules import GRPOModule, SFTModule
from modules.generation import Validation
from modules.rewards import RegexFormat
from modules.rollout import Sampling, Thinking


def make(*budgets: int) -> GRPOModule:
    """A model that writes random bytes; an answer with a digit is right, which a longer thought makes more likely."""
    sampling = Sampling(max_completion_length=20, thinking=Thinking(stop_text="</think>"))
    validation = Validation(RegexFormat(r"(?s).*[0-9].*"), 2, budgets)
    return GRPOModule("tiny", RegexFormat(".*"), sampling=sampling, validation=validation, seed=0)


def test_the_curve_is_drawn_and_printed(tmp_path: Path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}<think>", "answer": "1"}) + "\n" for i in range(12)))
    module, logger = make(8, 0), TensorBoardLogger(tmp_path, name="", version="")
    trainer = Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=[BudgetCurve()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = VerifiableDataModule(module.tokenizer, str(path), val=str(path), chat=False)
    (metrics,) = trainer.validate(module, data, verbose=False)
    logger.finalize("success")
    assert [(step, width) for step, width, _ in Events(tmp_path).images("val/budget")] == [(0, 900)]
    printed = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)$", caplog.text, flags=re.MULTILINE)
    expected = [
        (
            str(budget),
            f"{metrics[f'val/budget/{budget}/accuracy']:.3f}",
            f"{metrics[f'val/budget/{budget}/accuracy_standard_error']:.3f}",
            f"{metrics[f'val/budget/{budget}/length']:.1f}",
        )
        for budget in (0, 8)
    ]
    assert printed == expected


@pytest.mark.parametrize("module", [make(), SFTModule("tiny")], ids=["no budgets", "sft"])
def test_a_module_without_budgets_is_refused(module):
    with pytest.raises(ValueError, match="there are none: set model.validation.budgets of a method that samples"):
        BudgetCurve().setup(Trainer(accelerator="cpu", logger=False), module, "validate")
