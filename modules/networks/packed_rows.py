"""Checks that a model keeps the documents of a packed row apart."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modules.trainer.modes import evaluating

PROBE = ((3, 1, 4, 1, 5), (10, 8, 11, 8, 12), (9, 2, 6))  # two alternative first documents, and the second document


def flattens(model: PreTrainedModel) -> bool:
    """Return whether packed rows must be joined into one long row.

    Flash attention kernels keep documents apart in a single row only.
    """
    return "flash" in (model.config._attn_implementation or "")


@torch.no_grad()
def check_packing(path: str, model: PreTrainedModel, logprobs: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Refuse a model that mixes the documents of a packed row.

    State-space and convolution layers mix them, and so do positions that are counted by column. The log-probabilities
    of a document may move by at most 1e-5 nats when another document of the same length stands before it. They may move
    by at most 1e-3 when it stands alone (0.1 with a flash attention kernel, which computes in 16 bits).

    Args:
        path: names the model in messages.
        model: the model.
        logprobs: ids and position ids, int [1, T] -> log-probabilities [1, T] of all tokens.

    Raises:
        ValueError: the log-probabilities move by more.
    """
    first, other, second = PROBE
    with evaluating(model), torch.autocast(model.device.type, enabled=flattens(model)):
        found = [
            logprobs(*_row(documents, model))[0, -len(second) :]
            for documents in ((first, second), (other, second), (second,))
        ]
    leak, shift = (float((found[0] - moved).abs().max()) for moved in found[1:])
    if not (leak <= 1e-5 and shift <= (0.1 if flattens(model) else 1e-3)):
        raise ValueError(
            f"policy: '{path}' ({model.config.model_type}) mixes the documents of a packed row: their "
            f"log-probabilities are off by {max(leak, shift):.2g} nats; turn packing off or use another model"
        )


def _row(documents: Sequence[Sequence[int]], model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    ids = [token % model.config.vocab_size for document in documents for token in document]
    positions = [place for document in documents for place in range(len(document))]
    return torch.tensor([ids], device=model.device), torch.tensor([positions], device=model.device)
