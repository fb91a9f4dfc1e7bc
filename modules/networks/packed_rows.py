"""Whether a model keeps the documents of a packed row apart."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modules.trainer.modes import evaluating

PROBE = ((3, 1, 4, 1, 5), (10, 8, 11, 8, 12), (9, 2, 6))  # two documents that may stand first, and the one behind them


def flattens(model: PreTrainedModel) -> bool:
    """Whether packed rows are laid end to end in one: flash attention kernels keep documents apart in a single row
    only.
    """
    return "flash" in (model.config._attn_implementation or "")


@torch.no_grad()
def check_packing(path: str, model: PreTrainedModel, logprobs: Callable[[Tensor, Tensor], Tensor]) -> None:
    """ValueError for models that mix documents (state-space and convolution layers, positions counted by column).

    A document's log-probabilities must not move by 1e-5 nats when another one of the same length stands in front of it,
    nor by 1e-3 when it is alone (0.1 with a flash attention kernel, which computes in 16 bits).

    Args:
        path: names the model.
        logprobs: ids and position ids, int [1, T] -> log-probabilities [1, T] of all tokens.
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
            "log-probabilities are off by "
            f"{max(leak, shift):.2g} nats; use data without packing, or another model"
        )


def _row(documents: Sequence[Sequence[int]], model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    ids = [token % model.config.vocab_size for document in documents for token in document]
    positions = [place for document in documents for place in range(len(document))]
    return torch.tensor([ids], device=model.device), torch.tensor([positions], device=model.device)
