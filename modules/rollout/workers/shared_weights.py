"""Weights in memory that processes share."""

import mmap
import os
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.rollout.syncing import checksum
from modules.types import EngineError

ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class MemoryPlace:
    """Where a weight lies in the shared memory."""

    offset: int  # in bytes, a multiple of ``ALIGNMENT``
    shape: tuple[int, ...]
    dtype: torch.dtype


class SharedWeights:
    """Weights in memory without a name, which is gone when the last process that uses it ends, however it ends.

    Args:
        weights: name and value of each weight; the values are not read.

    Attributes:
        file: file descriptor of the memory, for a child process.
        places: where each weight lies, by name.
        checksums: of the weights that were written last, by name.

    Raises:
        RuntimeError: there is too little memory.
    """

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.places: dict[str, MemoryPlace] = {}
        self.checksums: dict[str, str] = {}
        size = 0
        for name, weight in weights:
            self.places[name] = MemoryPlace(size, tuple(weight.shape), weight.dtype)
            size += -(-weight.numel() * weight.element_size() // ALIGNMENT) * ALIGNMENT
        self.file = reserve_memory(max(size, 1))
        self._memory: mmap.mmap | None = mmap.mmap(self.file, 0)
        self._views = {name: view_weight(self._memory, place) for name, place in self.places.items()}

    def write(self, weights: Iterable[tuple[str, Tensor]]) -> bool:
        """Take these values, one after another, and return whether any bit is new."""
        before, self.checksums = self.checksums, {}
        for name, weight in weights:
            self.checksums[name] = checksum(weight)
            if self.checksums[name] != before.get(name):
                self._views[name].copy_(weight)
        return self.checksums != before

    def close(self) -> None:
        """Give the memory back, also where a forked process still holds the file."""
        self._views, self._memory = {}, None  # unmapped with its last view
        os.ftruncate(self.file, 0)
        os.close(self.file)


def view_weight(memory: mmap.mmap, place: MemoryPlace) -> Tensor:
    """Return the weight at a place of the shared memory, without a copy."""
    count = torch.Size(place.shape).numel()
    if not count:
        return torch.empty(place.shape, dtype=place.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.offset).view(place.shape)


def reserve_memory(size: int) -> int:
    """Return a new file of ``size`` bytes in memory that has no name, so that nothing can leave it behind.

    Raises:
        RuntimeError: there is too little memory.
    """
    try:
        file = os.memfd_create("weights") if hasattr(os, "memfd_create") else open_unnamed()
        os.ftruncate(file, size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)  # else a lack of memory would end this process at a later write
    except OSError as error:
        raise EngineError(
            f"there is no shared memory for {size / 2**20:.0f} MB of weights ({error.strerror}): free some, or leave "
            "model.engine out"
        ) from error
    return file


def open_unnamed() -> int:
    """Return a new temporary file without a name, for systems without memory files."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
