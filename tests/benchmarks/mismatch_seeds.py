"""Prints what the mismatch panel says of planted faults and of healthy runs, for several seeds.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/mismatch_seeds.py (10 minutes on one core).
"""

import logging
import sys
import time
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "callbacks"), str(Path(__file__).parents[2])]

from mismatch_cases import FAULTS, HEALTHY, watch  # noqa: E402

SEEDS = range(5)


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cases = {name: (None, build) for name, build in HEALTHY.items()} | FAULTS
    for name, (words, build) in cases.items():
        if sys.argv[1:] and not any(part in name for part in sys.argv[1:]):
            continue
        right, lines, start = 0, [], time.perf_counter()
        for seed in SEEDS:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                panel = watch(build(seed))
            said = [str(one.message) for one in caught if str(one.message).startswith("engine_mismatch")]
            kls = [row["fresh_kl"] for row in panel.history]
            right += not said if words is None else words in "".join(said[:1])
            lines.append(f"{list(panel.told)} kl {kls[0]:.1e} .. {kls[-1]:.1e}, at most {max(kls):.1e}")
        print(f"{name:40} {right} of {len(SEEDS)}, {time.perf_counter() - start:.0f} s", flush=True)
        for line in lines:
            print(f"    {line}", flush=True)
        if said:
            print("    " + said[0], flush=True)


if __name__ == "__main__":
    main()
