"""How much memory training will take, as far as it is known before the first step."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

MB = 1e6
LOGIT_TENSORS = (
    7  # as large as a chunk of logits and alive at a time, at most (measured): logits, log-softmax, what entropies need
)


def training_memory(weights: Iterable[Tensor], optimizer: Optimizer, max_logits: int) -> dict[str, float]:
    """MB (10^6 bytes) that training needs on each device, by what for: ``weights``, ``gradients``, ``optimizer``,
    ``logits``.

    Activations are left out: they grow with micro-batch x length. So are the second gradients of
    ``DistributedDataParallel``, the 16-bit weights of autocast, and what the allocator wastes.

    Args:
        weights: [any shape] each, all tensors that stay: the model's, a reference's; one that is shared counts once.
        optimizer: of the parameters that are trained.
        max_logits: entries of the largest chunk of logits, in float32.
    """
    return {
        "weights": _bytes({id(weight): weight for weight in weights}.values()) / MB,
        "gradients": sum(_bytes(group["params"]) for group in optimizer.param_groups) / MB,
        "optimizer": sum(_bytes(group["params"]) * states(group) for group in optimizer.param_groups) / MB,
        "logits": LOGIT_TENSORS * max_logits * 4 / MB,
    }


def states(group: dict[str, Any]) -> int:
    """Tensors of its own size that a PyTorch optimizer keeps for a parameter [any shape], told from the settings of its
    ``group``.

    Adam and its kin 2, with ``amsgrad`` 3; Adadelta and Rprop 2; RMSprop and Adagrad 1; 1 more for momentum; SGD none.
    """
    if "betas" in group:
        return 2 + bool(group.get("amsgrad"))
    if "rho" in group or "etas" in group:
        return 2
    squares = "alpha" in group or "initial_accumulator_value" in group
    return squares + bool(group.get("centered")) + (group.get("momentum", 0) > 0)


def memory_line(memory: dict[str, float]) -> str:
    """What ``training_memory`` found, [MB] by name, as a sentence."""
    parts = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "optimizer states",
        "logits": "logits at most",
    }
    listed = ", ".join(f"{words} {memory[name]:,.0f} MB" for name, words in parts.items())
    return f"memory: {sum(memory.values()):,.0f} MB before activations ({listed}); activations come on top, with micro-batch x length"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
