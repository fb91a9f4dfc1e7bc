"""Estimates, before the first step, how much memory training takes."""

import os
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MB = 1e6
# Bytes that a piece of a micro-batch may keep for its backward pass. On a CPU twice as much was no faster for SFT.
PIECE_BYTES = 0.75e9
GPU_SHARE = 0.4  # share of the GPU memory that weights, gradients and optimizer states leave free
SIXTEEN_BITS, ADAPTERS = 0.65, 1.35  # factors for activations: under autocast; with adapters on every layer (measured)
# Most tensors of the size of a chunk of logits that live at one time (measured): logits, log-softmax, entropy terms.
LOGIT_TENSORS = 7


def estimate_memory(
    weights: Iterable[Tensor], optimizer: Optimizer, max_logits: int, activations: float = 0.0
) -> dict[str, float]:
    """Estimate the memory that training needs on each device, in MB (10^6 bytes).

    Not counted are the second copy of the gradients that ``DistributedDataParallel`` keeps, and what the allocator
    wastes.

    Args:
        weights: every tensor that stays in memory, of the model and of a reference; a shared one counts once.
        optimizer: the optimizer of the trained parameters.
        max_logits: number of entries of the largest chunk of logits, in float32.
        activations: bytes that are kept from the forward to the backward pass.

    Returns:
        MB by purpose: ``weights``, ``gradients``, ``optimizer``, ``activations``, ``logits``.
    """
    return {
        "weights": _count_bytes({id(weight): weight for weight in weights}.values()) / MB,
        "gradients": sum(_count_bytes(group["params"]) for group in optimizer.param_groups) / MB,
        "optimizer": sum(_count_bytes(group["params"]) * count_states(group) for group in optimizer.param_groups) / MB,
        "activations": activations / MB,
        "logits": LOGIT_TENSORS * max_logits * 4 / MB,
    }


def estimate_peak(memory: dict[str, float], used: float, most: float, stepped: bool, samples: bool) -> float:
    """Estimate the most memory that a fit takes at one time, in MB, from what it takes before its first step.

    It is the largest of three: the memory taken so far, to load models or to sample; the memory in use now plus what a
    step adds; and, if later phases are sampled, the memory taken so far plus the optimizer's states.

    Args:
        memory: what ``estimate_memory`` returned.
        used: MB in use before the first step: libraries, weights, a reference, data.
        most: MB that were in use at one time so far.
        stepped: whether the optimizer has its states already, as in a resumed run.
        samples: whether completions are sampled again in later phases.
    """
    states = 0.0 if stepped else memory["optimizer"]
    step = memory["gradients"] + memory["activations"] + memory["logits"]
    return max(most + (states if samples else 0.0), used + states + step)


def measure_used(device: torch.device) -> tuple[float, float]:
    """Measure the MB that this process has in use now, and the most that it had: on CUDA of the device, else of the
    machine.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MB, torch.cuda.max_memory_allocated(device) / MB
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MB
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not on Linux
        return most, most
    return pages * resource.getpagesize() / MB, most


def find_capacity(device: torch.device) -> float:
    """Return the MB that the device, or the machine, has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / MB
    return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize() / MB


def count_activation_bytes(
    config: Any, autocast: bool = False, adapters: bool = False, recomputes: bool = False
) -> float:
    """Estimate how many bytes a language model keeps of one token from its forward to its backward pass.

    A layer keeps about 11 vectors of the hidden size and 4 of the width between the two parts of its feed-forward: the
    inputs of its norms, products and activations, in float32. Logits are not counted.

    Args:
        config: of a Hugging Face model.
        autocast: the forward pass runs in 16 bits where that is safe.
        adapters: low-rank adapters lie on the layers.
        recomputes: layers are computed again in the backward pass, one after another, and keep their input alone.
    """
    config = config.get_text_config()
    hidden = config.hidden_size
    width = getattr(config, "intermediate_size", None) or 4 * hidden
    if getattr(config, "moe_intermediate_size", None):
        width = config.moe_intermediate_size * config.num_experts_per_tok
    share = (SIXTEEN_BITS if autocast else 1.0) * (ADAPTERS if adapters else 1.0)
    layer, layers = (11 * hidden + 4 * width) * share, config.num_hidden_layers
    return 4.0 * (layer + layers * hidden if recomputes else layers * layer)


def choose_piece_bytes(device: torch.device, needed: float) -> float:
    """Choose how many bytes of activations may be kept at one time.

    It is a constant, or on CUDA a share of the device's memory. It depends on nothing that changes during a run or when
    the run resumes.

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


def write_memory_line(memory: dict[str, float], peak: float) -> str:
    """Write what ``estimate_memory`` and ``estimate_peak`` returned as one line."""
    parts = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "optimizer states",
        "activations": "activations",
        "logits": "logits",
    }
    listed = ", ".join(f"{words} {memory[name]:,.0f} MB" for name, words in parts.items())
    rest = max(0.0, peak - sum(memory.values()))
    return f"memory: about {peak:,.0f} MB at most ({listed}, all else {rest:,.0f} MB)"


def _count_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
