"""The seed of the run, and the seeds that are derived from it."""

import hashlib
import os


def run_seed(seed: int | None = None) -> int:
    """The seed, or the run's where it is None: what ``seed_everything`` was last given, 0 where it was not called.

    Lightning keeps the run's seed, whether from ``--seed_everything`` or from Python, in the environment variable
    ``PL_GLOBAL_SEED``, which the processes that it starts inherit.
    """
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


def derive_seed(seed: int, phase: str, uid: str) -> int:
    """Return the seed of a prompt's first completion, in [0, 2**62).

    It depends on the run's seed, the phase and the prompt, and on no rank or batch.
    """
    digest = hashlib.blake2b(f"{seed}/{phase}/{uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
