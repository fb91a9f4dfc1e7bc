"""A copy of a model's weights in 16 bits, to sample faster from: bf16 linear layers, and an output head in 32 bits."""

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from modules.rollout.decoding.decode_products import linear_layers

ROWS = 32  # of the matrix products that are timed
LAYERS = 8  # at most so many layers' weights are timed, since a single layer's may stay in the processor's cache
ROUNDS = 5


@torch.no_grad()
def make_shadow(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model that ``decode.supports`` accepts.

    The linear layers of its blocks, adapters included, are in bf16, and so is an embedding that is not the head. Head
    and norms keep their precision. There is never a second copy of all weights in 32 bits.
    """
    linears = [part for layer in model.model.layers for part in linear_layers(layer)]
    halves = {id(weight) for part in linears for weight in part.parameters()}
    if model.get_input_embeddings().weight is not model.lm_head.weight:
        halves.add(id(model.get_input_embeddings().weight))
    twins = {
        id(weight): nn.Parameter(
            weight.detach().to(torch.bfloat16 if id(weight) in halves else weight.dtype, copy=True), requires_grad=False
        )
        for weight in model.parameters()
    }
    shadow: PreTrainedModel = copy.deepcopy(model, twins)
    return shadow.eval()


@torch.no_grad()
def refresh_shadow(shadow: PreTrainedModel, model: PreTrainedModel) -> None:
    """Copy today's weights into a shadow of the model."""
    for mine, theirs in zip(shadow.parameters(), model.parameters(), strict=True):
        mine.copy_(theirs)


def count_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of all weights."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


@torch.inference_mode()
def measure_gain(model: PreTrainedModel) -> float:
    """Time the matrix products of a decode step, and return how many times as fast they are in bf16.

    The products have the shapes of the model's own layers. The cast of activations counts; head and attention do not.
    """
    linears = [part for layer in model.model.layers[:LAYERS] for part in linear_layers(layer)]
    weights = [next(part.parameters()).detach() for part in linears]
    halves = [weight.bfloat16() for weight in weights]
    inputs = {size: torch.ones(ROWS, size, device=model.device) for size in {weight.shape[1] for weight in weights}}

    def multiply(matrices: list[Tensor]) -> None:
        for matrix in matrices:
            F.linear(inputs[matrix.shape[1]].to(matrix.dtype), matrix)

    full, half = [], []
    for _ in range(ROUNDS):
        full.append(take_seconds(lambda: multiply(weights), model.device))
        half.append(take_seconds(lambda: multiply(halves), model.device))
    return min(full) / min(half)


def take_seconds(work: Callable[[], None], device: torch.device) -> float:
    """Return how long some work takes on a device, in seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start
