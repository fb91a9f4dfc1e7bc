"""Runs the three stages of ``make demo`` for several seeds and several kinds of CPU arithmetic: does it always learn?

Run: python tests/benchmarks/demo_seeds.py [--seeds 0 1 2 3 4] [--numerics native avx2 sse41 perturbed two-threads]

A seed moves the start weights, the order of the rows and the samples. The last line is ``demo-seeds: N of N at or above
0.85``; the exit status is 1 if a run stays below.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from modules.networks.tiny import tiny_model, tiny_tokenizer  # noqa: E402

BOUND = 0.85
NUMERICS = {  # the environment of a run; perturbed: the start weights are off by a millionth
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "sse41": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "perturbed": {},
    "two-threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
}


def run_python(*arguments: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run ``python *arguments`` in ``folder``."""
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def run_demo(folder: Path, seed: int, numerics: str, *grpo: str, run: Any = run_python) -> tuple[float, float]:
    """Run the demo in an empty folder and return pass@1 before and after GRPO.

    Claims that do not hold are no error here.

    Args:
        grpo: more arguments of the stage that trains by GRPO.
        run: how a stage is started, as ``run_python`` does; only a fresh start can have other numerics.

    Raises:
        RuntimeError: a stage fails for another reason; the message holds the end of what it printed.
    """
    model = tiny_model(seed=seed)
    if numerics == "perturbed":
        torch.manual_seed(seed)
        for weight in model.parameters():
            weight.data *= 1 + 1e-6 * torch.randn_like(weight)
    model.save_pretrained(folder / "start")
    tiny_tokenizer().save_pretrained(folder / "start")
    said = ""
    for path in sorted((ROOT / "configs/recipes/demo").glob("*.yaml")):
        command = ["-m", "modules", path.stem.split("-")[1], f"--config={path}", "--trainer.enable_progress_bar=false"]
        command += [f"--seed_everything={seed}", f"--data.seed={seed}"]
        command += [f"--model.policy={folder / 'start'}"] if "sft" in path.stem else [f"--model.seed={seed}"]
        command += grpo if path.stem == "02-fit-grpo" else ()
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | NUMERICS[numerics]
        stage = run(*command, folder=folder, environment=environment)
        said = stage.stdout + stage.stderr
        if stage.returncode and "claims did not hold" not in said:
            raise RuntimeError(f"{path.stem} failed with seed {seed}, {numerics}: {said[-2000:]}")
    found = re.search(r"^demo: pass@1 ([\d.]+) -> ([\d.]+)$", said, re.MULTILINE)
    assert found is not None, said
    return float(found[1]), float(found[2])


def main() -> int:
    """Print one line for each run, and how many runs reached the bound."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--numerics", nargs="+", choices=NUMERICS, default=list(NUMERICS))
    arguments = parser.parse_args()
    runs = [(seed, numerics) for numerics in arguments.numerics for seed in arguments.seeds]
    reached = 0
    for seed, numerics in runs:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            before, after = run_demo(Path(folder), seed, numerics)
        reached += after >= BOUND
        print(
            f"seed {seed}  {numerics:11}  warm-up {before:.2f}  pass@1 {after:.2f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    print(f"demo-seeds: {reached} of {len(runs)} at or above {BOUND}", flush=True)
    return int(reached < len(runs))


if __name__ == "__main__":
    sys.exit(main())
