"""Measures the memory of PPO by layout: four models, a value head on the policy's states, or adapters on one backbone.

Run: python tests/benchmarks/ppo_memory.py FOLDER_OF_A_LANGUAGE_MODEL (Linux; each layout runs in its own process; MB =
10^6 bytes)
"""

import gc
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from callbacks import Export
from datamodules import Addition, AdditionPairs, PreferenceDataModule, VerifiableDataModule
from modules import PPOModule, RewardModule
from modules.networks.critic import Value
from modules.networks.lora import Lora
from modules.rewards import LearnedReward
from modules.rollout.sampling import Sampling

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
LAYOUTS = ("four", "head", "lora")


def resident() -> float:
    """Return the MB of this process that do not belong to files."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1.024e-3


class Watch(Callback):
    """Measures the peak from the second phase on, and the tensors at the end."""

    def __init__(self) -> None:
        self.start, self.peak, self.tensors = resident(), 0.0, 0.0
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while True:
            self.peak = max(self.peak, resident())
            time.sleep(0.01)

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 1:
            gc.collect()
            self.peak = 0.0

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        storages = (item.untyped_storage() for item in gc.get_objects() if isinstance(item, torch.Tensor))
        self.tensors = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) / 1e6


def reward_model(policy: str, folder: Path, lora: Lora | None) -> None:
    module = RewardModule(policy, lora=lora)
    data = PreferenceDataModule(module.tokenizer, AdditionPairs(16), val=AdditionPairs(8, held_out=True), batch_size=4)
    Trainer(max_steps=1, limit_val_batches=0, callbacks=[Export(str(folder))], **QUIET).fit(module, data)


def measure(layout: str, policy: str, folder: Path) -> None:
    watch, lora = Watch(), Lora() if layout == "lora" else None
    reward = str(folder / ("adapters" if lora else "whole"))
    value = Value() if layout == "head" else Value(model=reward)
    sampling = Sampling(max_completion_length=32)
    module = PPOModule(policy, LearnedReward(reward), num_generations=2, sampling=sampling, value=value, lora=lora)
    data = VerifiableDataModule(
        module.tokenizer, Addition(64), prompts_per_phase=8, chat=module.tokenizer.chat_template is not None
    )
    Trainer(max_epochs=3, accumulate_grad_batches=2, callbacks=[watch], **QUIET).fit(module, data)
    print(f"{layout}: weights and optimizer states {watch.tensors:.0f} MB, peak {watch.peak - watch.start:.0f} MB")


if __name__ == "__main__":
    seed_everything(0)
    if len(sys.argv) == 4:
        measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    else:
        with tempfile.TemporaryDirectory() as made:
            for name, lora in (("whole", None), ("adapters", Lora())):
                reward_model(sys.argv[1], Path(made) / name, lora)
            for layout in LAYOUTS:
                subprocess.run([sys.executable, __file__, layout, sys.argv[1], made], check=True)
