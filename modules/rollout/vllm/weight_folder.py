"""The weights of a policy as files that another process reads: in memory where the machine has room there."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from modules.rollout.sampling import SampledPolicy
from modules.rollout.syncing import merged_weights
from modules.types import EngineError

SHARED_MEMORY = Path("/dev/shm")
BUCKET = 2**29  # bytes of one file; a larger weight has one of its own
SPARE = 2**26  # bytes that are left free


class WeightFolder:
    """A folder with the current weights of a policy, as safetensors files of at most 512 MB with Hugging Face names.

    It is removed when it is closed, at the latest when this process ends by itself.

    Args:
        dtype: of the floating-point weights in the files.

    Attributes:
        files: in the order of the weights.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.files: list[Path] = []
        self.path: Path | None = None
        self._writes = 0

    def write(self, policy: SampledPolicy) -> None:
        """Replace the files by the weights that the policy has now, adapters merged; no file has an earlier one's name.

        Raises:
            RuntimeError: there is no room for them.
        """
        size = torch.empty((), dtype=self.dtype).element_size()
        needed = size * sum(weight.numel() for weight in policy.model.parameters()) + SPARE
        if self.path is None:
            roomy = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)
            roomy = roomy and shutil.disk_usage(SHARED_MEMORY).free > needed
            self.path = Path(tempfile.mkdtemp(prefix="policy-weights-", dir=SHARED_MEMORY if roomy else None))
            weakref.finalize(self, remove_folder, self.path, os.getpid())
        for file in self.files:
            file.unlink(missing_ok=True)
        self.files, self._writes = [], self._writes + 1
        try:
            for number, bucket in enumerate(self._buckets(policy)):
                file = self.path / f"{self._writes}-{number:05}.safetensors"
                save_file(bucket, file)
                self.files.append(file)
        except (OSError, SafetensorError) as error:
            folder = self.path.parent
            self.close()
            raise EngineError(
                f"the weights for the engine take {needed / 2**20:.0f} MB, which cannot be written to {folder} ({error}); "
                "make room there, or set TMPDIR to a folder with room"
            ) from error

    def close(self) -> None:
        """Remove the folder; the next ``write`` makes another."""
        self.files = []
        if self.path is not None:
            remove_folder(self.path, os.getpid())
            self.path = None

    def _buckets(self, policy: SampledPolicy) -> Iterator[dict[str, Tensor]]:
        """Return the weights on the CPU, file by file."""
        bucket: dict[str, Tensor] = {}
        held = 0
        for name, weight in merged_weights(policy):
            moved = weight.to("cpu", self.dtype if weight.is_floating_point() else weight.dtype).contiguous()
            if bucket and held + moved.nbytes > BUCKET:
                yield bucket
                bucket, held = {}, 0
            bucket[name] = moved
            held += moved.nbytes
        if bucket:
            yield bucket


def remove_folder(path: Path, owner: int) -> None:
    """Remove a folder, in the process that made it."""
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
