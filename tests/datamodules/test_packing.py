"""Best-fit decreasing, packed rows, and that packing changes no loss: alone, over ranks, or under accumulation."""

import random
import time
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from test_instruction_resume import Unigram, fit

from datamodules import Addition, InstructionDataModule
from datamodules.instruction import InstructionDataset
from datamodules.loaders.step_sampler import MicroBatch
from datamodules.tokens.encoding import Tokens
from datamodules.tokens.packing import best_fit_decreasing, pack, split_long
from modules import SFTModule
from modules.networks.tiny import tiny_tokenizer


def tokens(*ids: int) -> Tokens:
    return Tokens(list(ids), [True] * len(ids))


def ids_and_documents(rows: list[Tokens]) -> list[tuple[list[int], tuple[int, ...]]]:
    return [(row.ids, row.documents) for row in rows]


EXAMPLE = [
    tokens(1, 2, 3, 4, 5),
    tokens(6, 7),
    tokens(8, 9, 10),
    tokens(11),
]  # of trl.data_utils.pack_dataset, seq_length 4


def test_the_example_of_trl() -> None:
    split = [piece for document in EXAMPLE for piece in split_long(document, 4)]
    assert ids_and_documents(pack(split, 4)) == [([1, 2, 3, 4], (4,)), ([8, 9, 10, 5], (3, 1)), ([6, 7, 11], (2, 1))]
    cut = [tokens(*EXAMPLE[0].ids[:4]), *EXAMPLE[1:]]
    assert ids_and_documents(pack(cut, 4)) == [([1, 2, 3, 4], (4,)), ([8, 9, 10, 11], (3, 1)), ([6, 7], (2,))]
    with pytest.raises(ValueError, match="document 0 has 5 tokens and a row 4; drop or split it"):
        pack(EXAMPLE, 4)


def test_ties_keep_their_order() -> None:
    assert best_fit_decreasing([2, 2, 2, 2, 2], 4) == [[0, 1], [2, 3], [4]]
    assert best_fit_decreasing([3, 3, 1, 1], 4) == [
        [0, 2],
        [1, 3],
    ]  # of two rows with room 1 the first opened is filled first
    assert best_fit_decreasing([5, 6, 3, 4], 10) == [
        [1, 3],
        [0, 2],
    ]  # 4 fits both 6 and 5 and goes where it leaves less room


def naive(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack by looking at every open row; of rows with equal room, take the one that had it first."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room, when the row came to it
    for turn, index in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        fitting = [(room, when, row) for row, (room, when) in enumerate(rooms) if room >= lengths[index]]
        if fitting:
            room, _, row = min(fitting)
            rows[row].append(index)
            rooms[row] = (room - lengths[index], turn)
        else:
            rows.append([index])
            rooms.append((capacity - lengths[index], turn))
    return rows


def test_against_a_search_of_all_rows() -> None:
    for seed in range(20):
        lengths = random.Random(seed).choices(range(1, 33), k=150)
        assert best_fit_decreasing(lengths, 32) == naive(lengths, 32)
    assert best_fit_decreasing([], 4) == []


def test_a_hundred_thousand_documents_take_seconds() -> None:
    draw = random.Random(0)
    lengths = [min(4096, 1 + int(draw.lognormvariate(5.5, 1))) for _ in range(100_000)]
    start = time.process_time()
    rows = best_fit_decreasing(lengths, 4096)
    assert time.process_time() - start < 5  # about one; looking through all rows would take an hour
    assert sorted(index for row in rows for index in row) == list(range(100_000))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 4096
    assert len(rows) <= 1.01 * sum(lengths) / 4096


def test_the_first_token_of_a_document_is_never_learned() -> None:
    (row,) = pack([Tokens([1, 2, 3], [False, True, True]), Tokens([4, 5], [True, True])], 8)
    assert row == Tokens([1, 2, 3, 4, 5], [False, True, True, False, True], (3, 2))
    assert [piece.supervised for piece in split_long(tokens(1, 2, 3, 4, 5), 3)] == [[False, True, True], [False, True]]


def test_positions_start_anew_and_padding_stands_alone() -> None:
    rows = [
        Tokens([7, 8, 9, 7, 8], [False, True, True, False, True], (3, 2)),
        Tokens([5, 6], [False, True], (2,)),
        Tokens([5, 6], [False, True]),
    ]
    dataset = InstructionDataset(rows, pad_id=0)
    batch = dataset[MicroBatch((0, 1, 2), 5)]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 2, 2]
    assert "position_ids" in dataset[MicroBatch((1,), 1)]
    assert "position_ids" not in dataset[MicroBatch((2,), 1)]


def data(packing: bool, batch_size: int, rows: int = 40, max_length: int = 48) -> InstructionDataModule:
    return InstructionDataModule(
        tiny_tokenizer(), Addition(rows), max_length=max_length, packing=packing, batch_size=batch_size, seed=1
    )


def test_packed_rows_learn_as_many_tokens() -> None:
    plain, packed = data(False, 8), data(True, 8)
    plain.setup("fit")
    packed.setup("fit")
    assert sum(sum(row.supervised) for row in plain.train_rows) == sum(sum(row.supervised) for row in packed.train_rows)
    assert sum(len(row.ids) for row in plain.train_rows) == sum(len(row.ids) for row in packed.train_rows)
    assert len(packed.train_rows) < len(plain.train_rows) / 2
    assert sum(len(row.documents) for row in packed.train_rows) == len(plain.train_rows)


class Noted(SFTModule):
    """Keeps the gradients of the last step."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.gradients = [parameter.grad.clone() for parameter in self.parameters() if parameter.grad is not None]


def one_step(module: InstructionDataModule, **settings: Any) -> tuple[float, Noted]:
    model = Noted("tiny")
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_steps=1, enable_checkpointing=False, **quiet, **settings)
    trainer.fit(model, datamodule=module)
    return float(trainer.callback_metrics["train/loss"]), model


def test_a_step_has_the_same_loss_and_gradients_with_packing() -> None:
    plain, reference = one_step(data(False, 40))
    packed, model = one_step(data(True, 40))  # one step of all packed rows, fewer than 40
    assert packed == pytest.approx(plain, abs=1e-6)
    for mine, theirs in zip(model.gradients, reference.gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
    accumulated, _ = one_step(data(True, 5), accumulate_grad_batches=8)
    assert accumulated == pytest.approx(plain, abs=1e-6)


def weights_after(batch_size: int, accumulate: int, devices: int = 1) -> torch.Tensor:
    model = Unigram().double()
    limits: dict[str, Any] = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
    fit(model, data(True, batch_size), accumulate_grad_batches=accumulate, max_epochs=2, **limits)
    return model.scores.weight.detach()


def test_accumulation_and_ranks_change_nothing_of_packed_rows() -> None:
    reference = weights_after(4, 1)
    assert torch.allclose(weights_after(1, 4), reference, rtol=0, atol=1e-9)
    assert torch.allclose(weights_after(1, 2, devices=2), reference, rtol=0, atol=1e-9)
    assert not torch.allclose(weights_after(2, 1), reference, rtol=0, atol=1e-3)
