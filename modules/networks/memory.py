"""Estimates, before the first step, how much memory training takes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MB = 1e6
# What a piece of a micro-batch may keep for its backward pass. On a CPU larger pieces are not faster (measured).
PIECE_BYTES = 0.75e9
GPU_SHARE = 0.4  # of what an accelerator's memory has left beside weights, gradients and optimizer states
SIXTEEN_BITS, ADAPTERS = 0.65, 1.35  # of the activations, under autocast and with adapters on every layer (measured)
# Most tensors of the size of a chunk of logits that live at one time (measured): logits, log-softmax, entropy terms.
LOGIT_TENSORS = 7


def estimate_memory(weights: Iterable[Tensor], optimizer: Optimizer, max_logits: int) -> dict[str, float]:
    """Estimate the memory that training needs on each device, in MB (10^6 bytes).

    Not counted are activations, which grow with micro-batch x length; the second copy of the gradients that
    ``DistributedDataParallel`` keeps; the 16-bit weights of autocast; and what the allocator wastes.

    Args:
        weights: every tensor that stays in memory, of the model and of a reference; a shared one counts once.
        optimizer: the optimizer of the trained parameters.
        max_logits: number of entries of the largest chunk of logits, in float32.

    Returns:
        MB by purpose: ``weights``, ``gradients``, ``optimizer``, ``logits``.
    """
    return {
        "weights": _count_bytes({id(weight): weight for weight in weights}.values()) / MB,
        "gradients": sum(_count_bytes(group["params"]) for group in optimizer.param_groups) / MB,
        "optimizer": sum(_count_bytes(group["params"]) * count_states(group) for group in optimizer.param_groups) / MB,
        "logits": LOGIT_TENSORS * max_logits * 4 / MB,
    }


def count_activation_bytes(config: Any, autocast: bool = False, adapters: bool = False) -> float:
    """Estimate how many bytes a language model keeps of one token from its forward to its backward pass.

    A layer keeps about 11 vectors of the hidden size and 4 of the width between the two parts of its feed-forward: the
    inputs of its norms, products and activations, in float32. Logits are not counted.

    Args:
        config: of a Hugging Face model.
        autocast: the forward pass runs in 16 bits where that is safe.
        adapters: low-rank adapters lie on the layers.
    """
    config = config.get_text_config()
    hidden = config.hidden_size
    width = getattr(config, "intermediate_size", None) or 4 * hidden
    if getattr(config, "moe_intermediate_size", None):
        width = config.moe_intermediate_size * config.num_experts_per_tok
    share = (SIXTEEN_BITS if autocast else 1.0) * (ADAPTERS if adapters else 1.0)
    return 4.0 * config.num_hidden_layers * (11 * hidden + 4 * width) * share


def choose_piece_bytes(device: torch.device, needed: float) -> float:
    """Choose how many bytes of activations may be kept at one time.

    It is a constant, or on CUDA a share of the device's memory, and depends on nothing that changes while a run is on or
    between a run and its resumption.

    Args:
        device: of the model.
        needed: bytes of weights, gradients and optimizer states.
    """
    if device.type != "cuda":
        return PIECE_BYTES
    return max(PIECE_BYTES, GPU_SHARE * (torch.cuda.get_device_properties(device).total_memory - needed))


def count_states(group: dict[str, Any]) -> int:
    """Return how many tensors of a parameter's size a PyTorch optimizer keeps for it, judged by the options of
    ``group``.

    Adam and its variants keep 2, with ``amsgrad`` 3. Adadelta and Rprop keep 2, RMSprop and Adagrad 1, SGD none.
    Momentum and ``centered`` add 1 each.
    """
    if "betas" in group:
        return 2 + bool(group.get("amsgrad"))
    if "rho" in group or "etas" in group:
        return 2
    squares = "alpha" in group or "initial_accumulator_value" in group
    return squares + bool(group.get("centered")) + (group.get("momentum", 0) > 0)


def write_memory_line(memory: dict[str, float]) -> str:
    """Write what ``estimate_memory`` returned as one line."""
    parts = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "optimizer states",
        "logits": "logits at most",
    }
    listed = ", ".join(f"{words} {memory[name]:,.0f} MB" for name, words in parts.items())
    return (
        f"memory: {sum(memory.values()):,.0f} MB before activations ({listed}); activations come on top, with "
        "micro-batch x length"
    )


def _count_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
