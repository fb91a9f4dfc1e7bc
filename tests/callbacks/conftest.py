"""A real module that carries hand-made rollouts through a real Trainer, one list per phase."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from modules.rollout import Sampling
from modules.types import Completion, Credit, Record, Rollout


def make_rollout(
    reward: float | None = 1.0,
    token_ids: list[int] | None = None,
    text: str = "4",
    group: int = 0,
    finish: str = "stop",
    entropy: float | None = None,
    kl: float | None = None,
) -> Rollout:
    tokens = [1, 2] if token_ids is None else token_ids
    completion = Completion(tokens, [-1.0] * len(tokens), text, finish)  # type: ignore[arg-type]
    rewards = {"exact": reward}
    return Rollout(f"row{group}", "2 + 2 = ?", [1], "4", completion, group, rewards, reward, entropy=entropy, kl=kl)


class Scripted(LightningModule):
    """Carries ``phases[p]`` in phase p, from first micro-batch to end; one weight, two micro-batches a phase."""

    keeps_logprobs, importance, sampling = True, None, Sampling(max_completion_length=8)

    def __init__(self, phases: list[list[Rollout]], credits: list[Credit] | None = None, lr: float = 0.1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.phases, self.lr = phases, lr
        self.record = Record(credits=credits)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.record.rollouts = self.phases[self.trainer.current_epoch]
        return (self.weight * batch).sum()

    def on_train_epoch_end(self) -> None:
        self.record.rollouts = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Events:
    """Reads what a run wrote to TensorBoard back from its files."""

    def __init__(self, folder: Path) -> None:
        self.accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0, "scalars": 0})
        self.accumulator.Reload()

    def scalars(self, name: str) -> list[float]:
        return (
            [event.value for event in self.accumulator.Scalars(name)]
            if name in self.accumulator.Tags()["scalars"]
            else []
        )

    def names(self, prefix: str) -> set[str]:
        return {tag for tag in self.accumulator.Tags()["scalars"] if tag.startswith(prefix)}

    def images(self, name: str) -> list[tuple[int, int, int]]:
        """Return (step, width, height) of each figure."""
        events = self.accumulator.Images(name) if name in self.accumulator.Tags()["images"] else []
        return [(event.step, event.width, event.height) for event in events]

    def texts(self, name: str) -> list[tuple[int, str]]:
        tag = f"{name}/text_summary"
        events = self.accumulator.Tensors(tag) if tag in self.accumulator.Tags()["tensors"] else []
        return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


@pytest.fixture
def make() -> Callable[..., Rollout]:
    """Give make(reward, token_ids, text, group, finish, entropy, kl), which makes one rollout."""
    return make_rollout


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., Events]:
    """Give fit(callback, phases, ...), which trains over the phases and returns what TensorBoard got."""
    runs = 0

    def run(
        callback: Callback,
        phases: list[list[Rollout]],
        ckpt_path: Path | None = None,
        save: Path | None = None,
        credits: list[Credit] | None = None,
        lr: float = 0.1,
    ) -> Events:
        nonlocal runs
        runs += 1
        logger = TensorBoardLogger(tmp_path, name=f"run{runs}", version="")
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=len(phases),
            callbacks=[callback],
            logger=logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        data: DataLoader[torch.Tensor] = DataLoader([torch.ones(1)] * 2)  # type: ignore[arg-type]
        trainer.fit(Scripted(phases, credits, lr), data, ckpt_path=ckpt_path)
        if save is not None:
            trainer.save_checkpoint(save)
        return Events(Path(logger.log_dir))

    return run
