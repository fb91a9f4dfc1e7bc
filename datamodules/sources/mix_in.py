"""Mixes a few rows of one source into all rows of another.

Uses: safety demonstrations among instructions (arXiv 2309.07875), replay of earlier data.
"""

import random

from datamodules.sources.files import read_rows
from datamodules.sources.source import Row, Source
from modules.trainer.seeds import run_seed


class MixIn(Source):
    """Returns all rows of ``base``, then rows of ``extra`` drawn without replacement. Every row keeps its source name.

    For a fraction f of the mix and n base rows, round(n f / (1 - f)) rows are drawn. Example: 500 safety demonstrations
    in 20,500 rows are f = 0.0244.

    Args:
        base: a source, or a file, folder or hub id.
        extra: a source, or a file, folder or hub id.
        num: rows of ``extra``, >= 0.
        fraction: share of ``extra`` in the mix, in [0, 1), in place of ``num``.
        seed: seed of the draw; None = the run's.

    Raises:
        ValueError: not exactly one of ``num`` and ``fraction`` is set, or one is out of range.
    """

    def __init__(
        self,
        base: str | Source,
        extra: str | Source,
        num: int | None = None,
        fraction: float | None = None,
        seed: int | None = None,
    ) -> None:
        if (num is None) == (fraction is None):
            raise ValueError(f"set either num or fraction, got num {num} and fraction {fraction}")
        if num is not None and num < 0:
            raise ValueError(f"num must be at least 0, got {num}")
        if fraction is not None and not 0 <= fraction < 1:
            raise ValueError(f"fraction must lie in [0, 1), got {fraction}")
        self.base, self.extra, self.num, self.fraction, self.seed = base, extra, num, fraction, run_seed(seed)

    def rows(self) -> list[Row]:
        """Return the base rows in their order, then the drawn ones. Raises ValueError if ``extra`` has too few rows."""
        base, extra = read_rows(self.base), read_rows(self.extra)
        num = round(len(base) * self.fraction / (1 - self.fraction)) if self.fraction is not None else self.num
        assert num is not None
        if num > len(extra):
            asked = (
                f"num is {num}"
                if self.fraction is None
                else f"fraction {self.fraction} of a mix with {len(base)} base rows is {num} rows"
            )
            raise ValueError(f"{asked}, but extra has only {len(extra)} (from {extra[0].origin} on)")
        return base + random.Random(self.seed).sample(extra, num)
