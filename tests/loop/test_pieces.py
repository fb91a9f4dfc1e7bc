"""Micro-batches in pieces: the same gradients, metrics and tokens as whole ones, for every method, in every precision, on
one rank and on two; bitwise resume with dropout; a step of one's own.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

import fixed_runs
import pieces_of_ranks
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from programs import run_ranks
from resumes import FEW_STOPS, check_resumes
from torch import Tensor
from transformers import AutoConfig

from datamodules import Addition, InstructionDataModule
from modules import SFTModule
from modules.base import AlignmentModule
from modules.networks import memory
from modules.networks.policy import TokenScores
from modules.trainer.pieces import cut_to_pieces
from modules.types import InstructionBatch

OF_A_TOKEN = memory.count_activation_bytes(AutoConfig.from_pretrained(fixed_runs.START))  # bytes
# one micro-batch an optimiser step, with all rows that two of two had
WHOLE = ["--trainer.accumulate_grad_batches=1", "--trainer.max_epochs=1", "--trainer.callbacks+=test_pieces.Gradients"]
BIGGER = {"sft": ["--data.batch_size=2"], **dict.fromkeys(("reward", "dpo", "kto"), ["--data.batch_size=8"])}
TEXTS = ["--data.ptx.train=texts.jsonl", "--data.ptx.rows_per_update=3", "--data.ptx.max_length=20"]
TIMES = ("time", "second", "occupancy", "memory")


class Gradients(Callback):
    """Keeps the gradients of each step, the pieces of its micro-batches, and what was logged."""

    gradients: ClassVar[list[Tensor]] = []
    pieces: ClassVar[list[int]] = []
    logged: ClassVar[dict[str, float]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.gradients.clear(), self.pieces.clear(), self.logged.clear()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(
            torch.cat([each.grad.flatten() for each in pl_module.parameters() if each.grad is not None]).clone()
        )
        self.pieces.append(pl_module.piece + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.logged |= {name: float(value) for name, value in trainer.callback_metrics.items()}


def fit(name: str, folder: Path, *arguments: str) -> tuple[list[Tensor], list[int], dict[str, float]]:
    fixed_runs.fit(name, folder, *WHOLE, *BIGGER.get(name, []), *arguments)
    return list(Gradients.gradients), list(Gradients.pieces), dict(Gradients.logged)


@pytest.mark.parametrize("name", [*fixed_runs.RUNS, "ppo with texts", "unpacked sft"])
def test_pieces_add_up_to_the_micro_batch(tmp_path, monkeypatch, name):
    settings = []
    if name == "ppo with texts":
        name, settings = "ppo", ["--model.incentives.ptx=0.5", *TEXTS]
        (tmp_path / "texts.jsonl").write_text('{"text": "a b c d e f g h i j k l m n o p q r s t u v w x y z"}\n' * 9)
        settings[1] = f"--data.ptx.train={tmp_path / 'texts.jsonl'}"
    if name == "unpacked sft":
        name, settings = "sft", ["--data.packing=false", "--data.batch_size=8"]
    of_whole, whole, logged = fit(name, tmp_path / "whole", *settings)
    assert set(whole) == {1}
    monkeypatch.setattr(memory, "PIECE_BYTES", 24 * OF_A_TOKEN)
    of_pieces, pieces, again = fit(name, tmp_path / "pieces", *settings)
    assert pieces[0] > 1
    # the first step starts from the same weights
    gap = float((of_whole[0] - of_pieces[0]).norm() / of_whole[0].norm())
    assert gap <= 1e-6, gap
    assert of_whole[0].abs().sum() > 0
    for metric, value in logged.items():
        if not any(part in metric for part in TIMES):
            assert again[metric] == pytest.approx(value, rel=2e-3, abs=2e-5, nan_ok=True), metric
    assert again["train/num_tokens"] == logged["train/num_tokens"]


def rows(*lengths: int) -> dict[str, Tensor]:
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = torch.arange(len(lengths))[:, None] * mask
    return {"input_ids": ids, "attention_mask": mask, "loss_mask": mask, "denominator": torch.tensor(9.0)}


def completions(prompts: list[int], lengths: list[tuple[int, int]], **more: Any) -> dict[str, Any]:
    """Prompts of these lengths, and completions (prompt, length)."""
    of, long = zip(*lengths, strict=True)
    read = torch.arange(max(prompts)) < torch.tensor(prompts)[:, None]
    written = torch.arange(max(long)) < torch.tensor(long)[:, None]
    number = torch.arange(len(long))
    return {
        "prompt_ids": torch.arange(len(prompts))[:, None] * read,
        "prompt_mask": read,
        "completion_ids": number[:, None] * written,
        "completion_mask": written,
        "prompt_index": torch.tensor(of),
        "row": number,
        "denominator": torch.tensor(3.0),
        **more,
    }


def test_rows_are_cut_by_hand():
    batch = rows(5, 2, 4, 1)  # 20 padded tokens
    assert cut_to_pieces(batch, 20) == [batch] == cut_to_pieces(batch, None)
    # the row of 5 alone; rows of 4 and 2 are 8 padded tokens; the row of 1 would make them 12
    pieces = cut_to_pieces(batch, 8)
    assert [piece["input_ids"][:, 0].tolist() for piece in pieces] == [[0], [1, 2], [3]]
    assert [tuple(piece["loss_mask"].shape) for piece in pieces] == [(1, 5), (2, 4), (1, 1)]
    assert pieces[1]["attention_mask"].sum(1).tolist() == [2, 4]
    assert {float(piece["denominator"]) for piece in pieces} == {9.0}
    assert [len(piece["input_ids"]) for piece in cut_to_pieces(batch, 1)] == [1, 1, 1, 1]


def test_completions_stay_with_their_prompt_where_they_fit():
    batch = completions([3, 2], [(0, 4), (1, 6), (0, 1), (1, 6)], values=torch.arange(24.0).reshape(4, 6))
    # prompt 0: 3 + 2 x 4 = 11 tokens; prompt 1: 2 + 2 x 6 = 14, more than 12, so its completions are parted
    pieces = cut_to_pieces(batch, 12, shared=True)
    assert [piece["row"].tolist() for piece in pieces] == [[1], [3], [0, 2]]
    assert [piece["prompt_ids"].tolist() for piece in pieces] == [[[1, 1]], [[1, 1]], [[0, 0, 0]]]
    assert [piece["prompt_index"].tolist() for piece in pieces] == [[0], [0], [0, 0]]
    assert pieces[2]["values"].tolist() == [[0, 1, 2, 3], [12, 13, 14, 15]]
    assert ["prompt_counts" in piece for piece in pieces] == [False, True, False]
    assert pieces[1]["prompt_counts"].tolist() == [False]
    # prompts that are computed for each completion: 2 x (3 + 4) = 14
    assert [piece["row"].tolist() for piece in cut_to_pieces(batch, 12)] == [[1], [3], [0], [2]]


def test_compared_completions_stay_together_and_texts_come_first():
    lists = {"rank": torch.tensor([0, 0, 1, 1]), "margin": torch.tensor([0.5, 2.0]), "mismatched": ["of the step"]}
    batch = completions([3, 2], [(0, 4), (1, 6), (0, 1), (1, 6)], **lists)
    first, second = cut_to_pieces(batch, 4, shared=True)
    assert [first["row"].tolist(), second["row"].tolist()] == [[1, 3], [0, 2]]
    assert [first["margin"].tolist(), second["margin"].tolist()] == [[2.0], [0.5]]
    assert [first["mismatched"], second["mismatched"]] == [["of the step"], []]
    seen = completions([3, 2], [(0, 4), (1, 6)], teacher_prompt_ids=torch.ones(2, 7), ptx=rows(5, 4))
    seen["teacher_prompt_mask"] = torch.arange(7) < torch.tensor([[7], [2]])
    texts, others, behind, last = cut_to_pieces(seen, 8)
    assert [set(texts), set(others)] == [{"ptx"}, {"ptx"}] and len(texts["ptx"]["input_ids"]) == 1
    assert [tuple(piece["teacher_prompt_ids"].shape) for piece in (behind, last)] == [(1, 2), (1, 7)]
    assert "ptx" not in last


def quiet(**settings: Any) -> Trainer:
    plain = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_steps": 1}
    shown = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**{**plain, **shown, "callbacks": [Gradients()], **settings})


def sums(module: Any, **settings: Any) -> tuple[Tensor, int]:
    """Train one step on sums; return its gradient and the pieces."""
    quiet(**settings).fit(module, InstructionDataModule(module.tokenizer, Addition(16), batch_size=8))
    return Gradients.gradients[0], Gradients.pieces[0]


PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16-mixed"},
    "fp16 with a scaler": {
        "plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))]
    },
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_pieces_are_scaled_and_keep_the_precision_of_each_operation(monkeypatch, name):
    gradients = []
    for tokens in (1000, 50):
        monkeypatch.setattr(memory, "PIECE_BYTES", tokens * 4 * 4 * (11 * 128 + 4 * 384) * memory.SIXTEEN_BITS)
        seed_everything(0)
        gradients.append(sums(SFTModule("tiny"), **PRECISIONS[name]))
    (whole, one), (of_pieces, several) = gradients
    assert one == 1 and several > 1
    # rounding of the shapes: 0.0019 and 0.0002; with a backward pass under autocast fp16 has 0.0025
    assert float((whole - of_pieces).norm() / whole.norm()) < (4e-3 if name == "bf16" else 1e-3)


class Doubled(SFTModule):
    """Changes the loss of a method, which knows nothing of pieces."""

    def training_step(self, batch: InstructionBatch, batch_idx: int) -> Tensor:
        return 2 * super().training_step(batch, batch_idx)


class Plain(AlignmentModule):
    """A method that knows nothing of pieces."""

    def training_step(self, batch: InstructionBatch, batch_idx: int) -> Tensor:
        scores = self.policy.token_scores(batch["input_ids"], batch["loss_mask"])
        self.log_step({"tokens": float(batch["attention_mask"].sum())})
        return self.step_loss(-scores.logprobs.sum() / batch["denominator"])


def test_a_step_of_ones_own_is_not_cut(monkeypatch):
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-3)

    monkeypatch.setattr(memory, "PIECE_BYTES", 50 * 4 * 4 * (11 * 128 + 4 * 384))
    found = {}
    for kind in (SFTModule, Doubled, Plain):
        seed_everything(0)
        settings = {"max_steps": 2, "accumulate_grad_batches": 2, "callbacks": [Gradients()]}
        module = kind("tiny", optimizer=sgd)
        found[kind], pieces = sums(module, **settings)
        assert (pieces > 1) == (module.piece_tokens is not None) == (kind is SFTModule)
        assert len(Gradients.gradients) == 2
    torch.testing.assert_close(found[Doubled], 2 * found[SFTModule], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[Plain], found[SFTModule], atol=1e-5, rtol=1e-5)


class FirstPieceOverflows(SFTModule):
    """Has a loss that is not finite in the first piece of the second micro-batch alone."""

    def scores(self, batch: InstructionBatch, means: bool = False) -> TokenScores:
        scores, broken = super().scores(batch, means), self.micro_batch == 1 and self.piece == 0
        return scores._replace(logprobs=scores.logprobs - torch.inf) if broken else scores

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.micro_batch = batch_idx


def test_the_guard_sees_the_loss_of_every_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PIECE_BYTES", 50 * 4 * 4 * (11 * 128 + 4 * 384))
    module = FirstPieceOverflows("tiny")
    with pytest.raises(FloatingPointError, match="the loss or gradient of step 1 is not finite"):
        sums(module, default_root_dir=tmp_path, accumulate_grad_batches=2)
    lines = [json.loads(line) for line in (tmp_path / "nonfinite-step-1.jsonl").read_text().splitlines()]
    assert [line["micro_batch"] for line in lines] == [0] * 8 + [1] * 8
    assert [line["loss"] == torch.inf for line in lines] == [False] * 8 + [True] * 8


def test_a_run_in_pieces_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PIECE_BYTES", pieces_of_ranks.FEW_TOKENS * OF_A_TOKEN * memory.ADAPTERS)
    more = ["--data.packing=false", "--data.batch_size=3", "--model.neftune_noise_alpha=5"]
    more += ["--trainer.callbacks+=test_pieces.Gradients"]
    check_resumes("sft", tmp_path, *more, stops=FEW_STOPS)  # adapters with dropout
    assert min(Gradients.pieces) > 1


def test_two_ranks_with_pieces_of_their_own(tmp_path):
    run_ranks(pieces_of_ranks.__file__, str(tmp_path), folder=tmp_path, path=[Path(__file__).parent])
    numbers = {}
    for name in pieces_of_ranks.METHODS:
        (whole, one), (of_pieces, first) = torch.load(tmp_path / f"{name}.0.pt")
        (other, _), (others, second) = torch.load(tmp_path / f"{name}.1.pt")
        assert one[0] == 1 and max(first[0], second[0]) > 1, (first, second)
        numbers[name] = first[0], second[0]
        assert torch.equal(whole, other) and torch.equal(of_pieces, others), name  # both ranks have the mean
        assert float((whole - of_pieces).norm() / whole.norm()) <= 1e-6, name
    assert numbers["sft"] == (3, 4)
