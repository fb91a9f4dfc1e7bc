"""Tuning on new facts to convergence loses known facts outside the tuning set; without new facts nothing is lost.

Source: arXiv 2405.05904.
"""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from datamodules import Facts, InstructionDataModule
from modules import SFTModule
from modules.rewards import ExactMatch
from modules.rollout.sampling import Sampling

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
KNOWN = TUNED = NEW = 16  # facts 0 to 31 are taught; the last 16 of them, and 16 new ones behind them, are tuned on


def fit(policy: str, lr: float, first: int, num_facts: int, steps: int) -> SFTModule:
    """Return a model after ``steps`` updates on a range of facts."""
    seed_everything(0)
    module = SFTModule(
        policy,
        reward=ExactMatch(),
        sampling=Sampling(temperature=0.0, max_completion_length=5),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=40),
    )
    data = InstructionDataModule(module.tokenizer, Facts(num_facts, first), batch_size=8)
    Trainer(max_steps=steps, gradient_clip_val=1.0, **QUIET).fit(module, data)
    return module


def accuracy(module: SFTModule, first: int, num_facts: int) -> float:
    """Return the share of right greedy answers."""
    data = InstructionDataModule(
        module.tokenizer, Facts(num_facts, first), val=Facts(num_facts, first), batch_size=num_facts
    )
    (logged,) = Trainer(**QUIET).validate(module, data, verbose=False)
    return logged["val/reward"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("start"))
    module = fit("tiny", 2e-3, 0, KNOWN + TUNED, 320)
    assert accuracy(module, 0, KNOWN) > 0.9
    assert accuracy(module, KNOWN + TUNED, NEW) == 0.0
    module.policy.save_pretrained(folder)
    return folder


def test_new_facts_cost_known_ones(start: str) -> None:
    everything, known = (fit(start, 3e-4, KNOWN, num_facts, 160) for num_facts in (TUNED + NEW, TUNED))
    assert accuracy(everything, KNOWN + TUNED, NEW) > 0.9  # converged: the new facts are learned
    assert accuracy(known, 0, KNOWN) > 0.9
    assert accuracy(everything, 0, KNOWN) < accuracy(known, 0, KNOWN) - 0.2
