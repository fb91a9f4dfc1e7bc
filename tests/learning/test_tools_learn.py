"""A model that learns to call a tool gets right what it cannot work out in its head; without the tool it does not."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from datamodules import InstructionDataModule, ProductCalls, Products, VerifiableDataModule
from modules import GRPOModule
from modules.generation import Validation
from modules.networks.tiny import tiny_tokenizer
from modules.rewards import ExactMatch
from modules.rollout import Calculator, Environment, Sampling

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def trained_pass_rate(environment: Environment | None, seed: int) -> tuple[float, float]:
    """Return pass@1 on held-out products, before and after 10 phases of 8 prompts x 8 completions."""
    seed_everything(seed)
    module = GRPOModule(
        "tiny-calculator",
        ExactMatch(),
        environment=environment,
        validation=Validation(generations=4),
        sampling=Sampling(max_completion_length=64),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
    )
    val = Products(40, held_out=True)
    data = VerifiableDataModule(module.tokenizer, Products(500), val=val, prompts_per_phase=8)
    trainer = Trainer(max_epochs=10, check_val_every_n_epoch=10, gradient_clip_val=1.0, **QUIET)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    return before["val/pass@1"], float(trainer.callback_metrics["val/pass@1"])


@pytest.mark.parametrize("seed", [0, 1])
def test_with_the_tool_far_more_is_right(seed):
    with_tool, without = (trained_pass_rate(tool, seed) for tool in (Environment(Calculator, max_turns=2), None))
    assert 0.2 < with_tool[0] < 0.7
    assert with_tool[1] > with_tool[0] + 0.2
    assert max(without) < 0.1


def test_conversations_teach_the_call_and_not_its_result():
    data = InstructionDataModule(tiny_tokenizer(), ProductCalls(20, calls=1.0, seed=0), batch_size=20)
    data.setup("fit")
    for row in data.train_rows:
        text = data.tokenizer.decode([token for token, learned in zip(row.ids, row.supervised, strict=True) if learned])
        call, answer, _ = text.split("<|im_end|>")
        assert call.startswith('calculate("') and Calculator().calculate(call[11:-2]) == answer
