"""Noise on the embeddings of a language model during training (NEFTune, arXiv 2310.05914)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modules.types import InstructionBatch


@contextmanager
def embedding_noise(
    model: PreTrainedModel, batch: InstructionBatch, alpha: float, generator: torch.Generator
) -> Iterator[None]:
    """Add noise to the embeddings of the batch's tokens inside the ``with`` block.

    The noise is uniform in +- alpha / sqrt(L x width), where L is the number of tokens of the token's document.

    Args:
        model: the language model.
        batch: the rows that the model computes inside the block.
        alpha: size of the noise, >= 0.
        generator: random numbers on the CPU, so that every device draws the same.
    """
    scale = alpha * (batch["attention_mask"] * document_lengths(batch).clamp(min=1).rsqrt())[..., None]  # [N, T, 1]

    def add(module: Any, inputs: Any, embeddings: Tensor) -> Tensor:
        noise = torch.rand(embeddings.shape, generator=generator).to(embeddings) * 2 - 1
        size = (scale * embeddings.shape[-1] ** -0.5).to(embeddings)
        return embeddings + noise * size.reshape(*embeddings.shape[:-1], 1)  # the rows may come as one long row

    hook = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def document_lengths(batch: InstructionBatch) -> Tensor:
    """Return, for each token, the number of tokens of its document: float [N, T], 0 on padding."""
    mask = batch["attention_mask"]
    if "position_ids" not in batch:
        return mask * mask.sum(1, keepdim=True).float()
    document = (batch["position_ids"] == 0).cumsum(1) - 1  # [N, T], number of the document in its row
    counts = torch.zeros(mask.shape, device=mask.device).scatter_add(1, document, mask.float())
    return mask * counts.gather(1, document)
