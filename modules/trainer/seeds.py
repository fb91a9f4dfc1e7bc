"""The seed of the run, which every ``seed`` left at None takes."""

import os


def run_seed(seed: int | None = None) -> int:
    """The seed, or the run's where it is None: what ``seed_everything`` was last given, 0 where it was not called.

    Lightning keeps the run's seed, whether from ``--seed_everything`` or from Python, in the environment variable
    ``PL_GLOBAL_SEED``, which the processes that it starts inherit.
    """
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
