"""The contracts of the phase loader, on a toy policy in a real Trainer."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

from datamodules.loaders.phase_loader import PhaseLoader, select, split
from modules.types import Record


class Toy(LightningModule):
    """A policy with one table; the batch of a phase is a function of the phase and of the weights."""

    def __init__(self, groups: int = 4, per_group: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Linear(3, 1)
        self.drop = torch.nn.Dropout(0.5)
        self.drop.eval()  # a part that was in eval mode before must stay so
        self.groups, self.per_group = groups, per_group
        self.record = Record()
        self.seen: list[dict[str, Any]] = []
        self.collected: list[tuple[int, int]] = []
        self.modes: list[tuple[bool, bool, bool]] = []
        self.updates: list[int] = []  # of the last phase's prompts

    def collect(self, prompts: dict[str, Any]) -> dict[str, torch.Tensor]:
        self.collected.append((self.current_epoch, self.global_step))
        self.updates = prompts.get("update", [])
        self.modes.append((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        rows = self.groups * self.per_group
        generator = torch.Generator().manual_seed(1000 + self.current_epoch)
        lengths = torch.randint(1, 6, (rows,), generator=generator)
        mask = torch.arange(5)[None] < lengths[:, None]
        index = torch.arange(self.groups).repeat_interleave(self.per_group)
        inputs = torch.randn(rows, 1, 3, generator=generator)  # three dimensions: not a per-token field
        return {
            "prompt_ids": torch.arange(self.groups)[:, None],
            "prompt_mask": torch.ones(self.groups, 1, dtype=torch.bool),
            "prompt_index": index,
            "completion_mask": mask,
            "inputs": inputs,
            "old": self.table(inputs)[:, 0, 0].detach().float(),
            "row": torch.arange(rows),
            "row_count": mask.sum(1).float(),
            "active": torch.ones(rows, dtype=torch.bool),
        }

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append({"rows": batch["row"].tolist(), "denominator": float(batch["denominator"])})
        error = (self.table(batch["inputs"])[:, 0, 0] - batch["old"] - 1) ** 2 * batch["completion_mask"].sum(1)
        return error.sum() / batch["denominator"] * self.trainer.accumulate_grad_batches

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class ToyData(LightningDataModule):
    def __init__(self, **settings: int) -> None:
        super().__init__()
        self.settings = settings

    def train_dataloader(self) -> PhaseLoader:
        uids = [str(number) for number in range(self.trainer.lightning_module.groups)]
        return PhaseLoader(self.trainer, lambda phase: {"uid": uids}, **self.settings)  # type: ignore[arg-type, return-value]


def fit(
    module: Toy,
    accumulate: int = 1,
    callbacks: tuple[Callback, ...] = (),
    phases: int = 2,
    precision: str = "32-true",
    **settings: int,
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=phases,
        accumulate_grad_batches=accumulate,
        precision=precision,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=ToyData(**settings))
    return trainer


def test_a_phase_is_an_epoch_and_is_collected_with_the_weights_of_its_start():
    module = Toy()
    trainer = fit(module, accumulate=2, updates_per_phase=3, phases=3)
    assert module.collected == [(0, 0), (1, 3), (2, 6)]  # (epoch, optimiser steps before it): no update is stale
    assert trainer.global_step == 9
    assert len(module.seen) == 3 * 3 * 2


def test_every_row_is_used_once_per_pass_and_the_denominator_counts_the_whole_update():
    module = Toy(groups=5)
    fit(module, accumulate=2, updates_per_phase=4, inner_epochs=2, phases=1)
    tokens = Toy(groups=5).collect({})["row_count"]
    for inner in range(2):
        part = module.seen[inner * 4 : inner * 4 + 4]
        assert sorted(row for micro in part for row in micro["rows"]) == list(range(15))
        for update in (part[:2], part[2:]):
            rows = [row for micro in update for row in micro["rows"]]
            assert {micro["denominator"] for micro in update} == {float(tokens[rows].sum())}
    assert module.seen[:4] != module.seen[4:]  # each pass is shuffled anew


@pytest.mark.parametrize("inner_epochs", [1, 2])
def test_collection_knows_the_update_that_trains_on_each_prompt(inner_epochs):
    module = Toy(groups=5)
    fit(module, accumulate=2, updates_per_phase=2 * inner_epochs, inner_epochs=inner_epochs, phases=1)
    assert module.updates == [0, 0, 0, 1, 1]  # five prompts in two updates of a pass
    for number in range(0, 4 * inner_epochs, 2):
        rows = [row for micro in module.seen[number : number + 2] for row in micro["rows"]]
        assert len({module.updates[row // 3] for row in rows}) == 1  # three completions a prompt
        assert len(rows) in (9, 6)
    first = [row for micro in module.seen[:2] for row in micro["rows"]]
    assert {module.updates[row // 3] for row in first} == {0}  # the first pass takes the updates in order


@pytest.mark.parametrize("accumulate", [2, 3, 12])
def test_micro_batches_change_no_result(accumulate):
    """With equal seed and rows per update only the order of a sum differs. Twelve micro-batches have one row each."""
    whole, cut = Toy(), Toy()
    fit(whole, updates_per_phase=1)
    fit(cut, accumulate=accumulate, updates_per_phase=1)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_collect_runs_without_gradients_in_eval_mode_and_puts_the_modes_back():
    module = Toy()
    fit(module)
    assert module.modes == [(False, False, False)] * 2
    assert module.training
    assert not module.drop.training


def test_collect_runs_in_the_trainers_precision():
    module = Toy()
    fit(module, precision="bf16-mixed")
    assert [autocast for _, _, autocast in module.modes] == [True, True]


def test_length_is_updates_times_accumulation_and_validation_runs_once_a_phase():
    class Length(Callback):
        found: int = 0

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.found = int(trainer.num_training_batches)

    length = Length()
    fit(Toy(), accumulate=3, callbacks=(length,), updates_per_phase=2)
    assert length.found == 6


class Validated(Toy):
    """Counts its validations."""

    def __init__(self) -> None:
        super().__init__()
        self.validated: list[tuple[int, int]] = []

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated.append((self.current_epoch, self.global_step))


class ValidatedData(ToyData):
    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(torch.zeros(1))


def test_validation_runs_once_a_phase_behind_its_updates():
    module = Validated()
    trainer = Trainer(
        max_epochs=2,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=ValidatedData(updates_per_phase=2))
    assert module.validated == [(0, 2), (1, 4)]


class Disagreeing(SingleDeviceStrategy):
    """Plays another rank, whose phase has one micro-batch more."""

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        return torch.stack([tensor, tensor + 1])


def test_ranks_with_phases_of_different_lengths_are_refused():
    trainer = Trainer(
        strategy=Disagreeing("cpu"), max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(ValueError, match=r"the ranks disagree on the micro-batches of a phase: \[2, 3\]"):
        trainer.fit(Toy(), datamodule=ToyData(updates_per_phase=2))


class Interrupted(Toy):
    """Fails while it samples the second phase."""

    def collect(self, prompts: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.current_epoch == 1:
            raise RuntimeError("engine lost")
        return super().collect(prompts)


def test_an_interrupted_collection_leaves_the_finished_phase_behind():
    module = Interrupted()
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(RuntimeError, match="engine lost"):
        trainer.fit(module, datamodule=ToyData(updates_per_phase=2))
    loader = trainer.train_dataloader
    assert (loader.phase, loader.position) == (0, 2)
    assert loader.snapshot()["ranks"][0]["micro_batches"] == []  # nothing of phase 0 can pass for phase 1


@pytest.mark.parametrize(
    ("settings", "accumulate", "sentence"),
    [
        (
            {"updates_per_phase": 3, "inner_epochs": 2},
            1,
            r"updates_per_phase \(3\) must be a positive multiple of inner_epochs \(2\)",
        ),
        ({"updates_per_phase": 0}, 1, r"updates_per_phase \(0\)"),
        ({"updates_per_phase": 4}, 4, "4 prompts and 12 completions .* cannot make 4 updates of 4 micro-batches"),
    ],
)
def test_impossible_splits_name_the_numbers(settings, accumulate, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit(Toy(), accumulate=accumulate, **settings)


def phase_of(lengths: list[list[int]], active: list[bool]) -> dict[str, torch.Tensor]:
    flat = torch.tensor([n for group in lengths for n in group])
    return {
        "prompt_ids": torch.arange(len(lengths) * 2).view(-1, 2),
        "prompt_mask": torch.tensor([[True, i % 2 == 0] for i in range(len(lengths))]),
        "prompt_index": torch.tensor([i for i, group in enumerate(lengths) for _ in group]),
        "completion_mask": torch.arange(int(flat.max()))[None] < flat[:, None],
        "active": torch.tensor(active),
        "row_count": flat.float(),
    }


def test_split_balances_tokens_and_keeps_groups_whole():
    batch = phase_of([[9, 9], [1, 1], [5, 5], [4, 4]], [True] * 8)
    parts = split(batch, torch.arange(8), 2)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]  # 18 + 2 tokens against 10 + 8


def test_split_leaves_out_rows_without_gradient_unless_a_part_would_be_empty():
    batch = phase_of([[3, 3], [2, 1]], [True, True, False, False])
    assert [part.tolist() for part in split(batch, torch.arange(4), 1)] == [[0, 1]]
    assert sorted(part.tolist() for part in split(batch, torch.arange(4), 3)) == [
        [0],
        [1],
        [3],
    ]  # the shortest idle row
    idle = phase_of([[3, 3], [2, 1]], [False] * 4)
    assert [part.tolist() for part in split(idle, torch.arange(4), 2)] == [[2], [3]]  # a whole update without gradient


def test_select_takes_only_the_prompts_and_columns_that_are_used():
    batch = phase_of([[4], [2], [3]], [True] * 3) | {"update": torch.tensor([0, 0, 1])}
    chosen = select(batch, torch.tensor([1]), torch.tensor(9.0))
    assert chosen["prompt_index"].tolist() == [0]
    assert chosen["prompt_ids"].tolist() == [[2]]  # prompt 1 has one token
    assert chosen["completion_mask"].tolist() == [[True, True]]
    assert float(chosen["denominator"]) == 9.0
    assert not {"row_count", "active", "update"} & set(chosen)  # of a whole phase
