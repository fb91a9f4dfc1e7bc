"""The seed of the run, and seeds that are derived from it."""

import hashlib
import os

import torch


def run_seed(seed: int | None = None) -> int:
    """Return the seed, or the seed of the run where it is None.

    The run's seed is what ``seed_everything`` was last given, and 0 without a call. Lightning keeps it in the
    environment variable ``PL_GLOBAL_SEED``, which the processes that it starts inherit.
    """
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


def derive_seed(seed: int, phase: str, uid: str) -> int:
    """Return the seed of a prompt's first completion, in [0, 2**62).

    It depends on the run's seed, the phase and the prompt, and on no rank or batch.
    """
    digest = hashlib.blake2b(f"{seed}/{phase}/{uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def seed_device(seed: int, device: torch.device) -> None:
    """Seed PyTorch's random numbers on the CPU and on ``device``, as ``torch.manual_seed`` does on all devices.

    ``torch.manual_seed`` would record a call stack for each missing kind of device, in each step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed_all(seed)
