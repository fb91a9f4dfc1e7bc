"""A stream of earlier texts in the mixture keeps the model from forgetting them."""

import torch
from lightning.pytorch import Trainer, seed_everything

from callbacks import Forgetting
from datamodules import Addition, MixtureDataModule, NumberTexts, Stream
from modules import SFTModule

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}


def train(policy: str, streams: dict[str, Stream], steps: int) -> tuple[SFTModule, dict[str, float]]:
    seed_everything(0)
    module = SFTModule(policy, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0))
    trainer = Trainer(
        **QUIET,
        max_steps=steps,
        callbacks=[Forgetting()],
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
    )
    trainer.fit(
        module,
        MixtureDataModule(
            module.tokenizer, streams, num_steps=steps, max_length=160, batch_size=4, loss_on="assistant"
        ),
    )
    return module, {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_replay_keeps_what_was_learned_before(tmp_path):
    counting = NumberTexts(200, subject="counting")
    held_out = NumberTexts(10, subject="counting", seed=1)
    before, _ = train("tiny", {"counting": Stream(counting, weight=1.0, val=held_out)}, 60)
    before.policy.save_pretrained(tmp_path)

    def forgotten(replay: float) -> float:
        streams = {
            "counting": Stream(counting, weight=replay, val=held_out),
            "sums": Stream(Addition(500), weight=1.0 - replay),
        }
        return train(str(tmp_path), streams, 40)[1]["val/forgetting/counting"]

    without, with_replay = forgotten(0.0), forgotten(0.2)
    assert without > 0.2  # nats a token
    assert with_replay < without / 4
