"""Prints what the doctor finds on the planted faults and the healthy runs of its tests, for seeds 0 to 4.

Run: python tests/benchmarks/doctor_seeds.py (5 minutes). A row ends in how often the right cause came first.
"""

import logging
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path[:0] = [str(Path(__file__).parents[1] / "callbacks"), str(Path(__file__).parents[2])]

from doctor_cases import HEALTHY, ILL, examine  # noqa: E402

SEEDS = range(5)


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    cases = ILL | {f"healthy: {name}": ("", build) for name, build in HEALTHY.items()}
    for name, (cause, build) in cases.items():
        found = []
        for seed in SEEDS:
            with TemporaryDirectory() as folder:
                found.append([finding.cause for finding in examine(build(seed, Path(folder))).findings or ()])
        right = sum(causes[:1] == ([cause] if cause else []) for causes in found)
        listed = " | ".join(", ".join(causes) or "-" for causes in found)
        print(f"{name:46} {listed:80} {right} of {len(SEEDS)}", flush=True)


if __name__ == "__main__":
    main()
