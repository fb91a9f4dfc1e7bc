"""Tokenised rows as padded batches of tensors: what a micro-batch of a plan becomes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loaders.step_sampler import MicroBatch
from datamodules.tokens.encoding import Tokens
from modules.types import InstructionBatch, PreferenceBatch


class InstructionDataset(Dataset[InstructionBatch]):
    """Tokenised rows; indexed by a MicroBatch it gives the padded batch.

    Packed rows come with ``position_ids``, which start at 0 in every document; each padding token is a document of its
    own.
    """

    def __init__(self, rows: list[Tokens], pad_id: int) -> None:
        self.rows = rows
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, batch: MicroBatch) -> InstructionBatch:
        rows = [self.rows[index] for index in batch.indices]
        ids, attention_mask = pad_right([row.ids for row in rows], self.pad_id)
        loss_mask, _ = pad_right([row.supervised for row in rows], False)
        padded = InstructionBatch(
            input_ids=ids,
            attention_mask=attention_mask,
            loss_mask=loss_mask.bool() & batch.counts,
            denominator=torch.tensor(float(batch.denominator)),
        )
        if any(row.documents for row in rows):
            positions = [
                [place for length in row.documents or [len(row.ids)] for place in range(length)] for row in rows
            ]
            padded["position_ids"], _ = pad_right(positions, 0)
        return padded


@dataclass(frozen=True)
class PreferenceTokens:
    """A tokenised example."""

    prompt: list[int]
    completions: list[list[int]]  # each up to and including its end token
    ranks: list[int]  # 0 = best; of a single, labelled completion: 0 = desirable, 1 = undesirable
    margin: float | None
    origin: str

    @property
    def num_tokens(self) -> int:
        """Of the prompt, once, and all completions."""
        return len(self.prompt) + sum(len(ids) for ids in self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion."""
        return len(self.prompt) + max(len(ids) for ids in self.completions)


class PreferenceDataset(Dataset[PreferenceBatch]):
    """Tokenised examples; indexed by a MicroBatch it gives the padded batch, its completions in the order of their
    examples.

    ``margin`` is in every batch when any example has one, 0 for the others.
    """

    def __init__(self, rows: Sequence[PreferenceTokens], pad_id: int) -> None:
        self.rows = rows
        self.pad_id = pad_id
        self.offsets = [
            0,
            *accumulate(len(row.completions) for row in rows),
        ]  # number of each example's first completion
        self.has_margin = any(row.margin is not None for row in rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, batch: MicroBatch) -> PreferenceBatch:
        rows = [self.rows[index] for index in batch.indices]
        counts = torch.tensor([len(row.completions) for row in rows])
        prompt_ids, prompt_mask = pad_right([row.prompt for row in rows], self.pad_id)
        completion_ids, completion_mask = pad_right([ids for row in rows for ids in row.completions], self.pad_id)
        made = PreferenceBatch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=completion_ids,
            completion_mask=completion_mask,
            prompt_index=torch.arange(len(rows)).repeat_interleave(counts),
            rank=torch.tensor([rank if batch.counts else -1 for row in rows for rank in row.ranks]),
            row=torch.tensor(
                [self.offsets[index] + k for index in batch.indices for k in range(len(self.rows[index].completions))]
            ),
            denominator=torch.tensor(float(batch.denominator)),
        )
        if self.has_margin:
            made["margin"] = torch.tensor([row.margin or 0.0 for row in rows])
        return made


def pad_right(rows: Sequence[Sequence[Any]], fill: int) -> tuple[Tensor, Tensor]:
    """Int [N, T] and its keep-mask bool [N, T], built from the lengths; T is the longest row."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    padded = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.long)
    return padded, torch.arange(width) < lengths[:, None]
