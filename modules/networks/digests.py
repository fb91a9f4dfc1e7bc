"""Hashes weights, so that a short text tells one set of weights from another."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def hash_samples(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of names, shapes and a sample of each weight, at most 1023 numbers evenly spaced, as float32.

    Names of layers with adapters count as those of the plain layers.
    """
    found = hashlib.blake2b(digest_size=8)
    for name, weight in weights:
        few = weight.flatten()[:: max(1, weight.numel() // 512)].float().cpu()
        found.update(f"{name.replace('.base_layer', '')} {tuple(weight.shape)}".encode())
        found.update(few.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def hash_base(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return the ``hash_samples`` of a model's weights without those of its adapters."""
    return hash_samples((name, weight) for name, weight in weights if "lora_" not in name)
