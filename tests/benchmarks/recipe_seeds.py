"""Runs a recipe for several seeds and several kinds of CPU arithmetic: do its claims hold in each?

Run: python tests/benchmarks/recipe_seeds.py RECIPE ... [--seeds 0 1 2] [--numerics native avx2 sse41 perturbed]

A seed moves the start weights, if they are random, the order of the rows and the samples. Each run prints what its
claims printed. The last line is ``recipe-seeds: RECIPE: N of N runs hold all claims``; the exit status is 1 if a claim
of any run did not hold.
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

from modules.networks.tiny import BUILT_IN as LEARNED  # noqa: E402
from modules.networks.tiny import tiny_model, tiny_tokenizer  # noqa: E402

NUMERICS = {  # the environment of a run; perturbed: the start weights are off by a millionth
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "sse41": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "perturbed": {},
    "two-threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
}
BUILT_IN = re.compile(r"(?<=: )tiny[\w-]*$", re.MULTILINE)  # as a value
CLAIM = re.compile(r"^claim: .*", re.MULTILINE)


def make_start(name: str, folder: Path, seed: int, numerics: str) -> str | Path:
    """Return what stands for a built-in model: a folder with start weights of this run, or the name where they are
    learned and stay as they are.
    """
    if numerics != "perturbed" and LEARNED[name] is not None:
        return name
    start = folder / f"start-{name}"
    if not start.exists():
        model = tiny_model(name, seed)
        if numerics == "perturbed":
            torch.manual_seed(seed)
            for weight in model.parameters():
                weight.data *= 1 + 1e-6 * torch.randn_like(weight)
        model.save_pretrained(start)
        tiny_tokenizer().save_pretrained(start)
    return start


def run_python(*arguments: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run ``python *arguments`` in ``folder``."""
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def run_recipe(
    recipe: str, folder: Path, seed: int, numerics: str, more: dict[str, list[str]] | None = None, run: Any = run_python
) -> str:
    """Run all stages of a recipe in an empty folder and return what they printed.

    Claims that do not hold are no error here.

    Args:
        more: more arguments of a stage, by its file's name without ``.yaml``.
        run: how a stage is started, as ``run_python`` does; only a fresh start can have other numerics.

    Raises:
        RuntimeError: a stage fails for another reason; the message holds the end of what it printed.
    """
    said = ""
    for path in sorted((ROOT / "configs/recipes" / recipe).glob("*.yaml")):
        verb = path.stem.split("-")[1]
        stage_file = folder / path.name
        stage_file.write_text(
            BUILT_IN.sub(lambda name: str(make_start(name[0], folder, seed, numerics)), path.read_text())
        )
        command = ["-m", "modules", verb, f"--config={stage_file}"]
        if verb != "merge":  # which takes no Trainer
            command.insert(3, f"--config={ROOT / 'configs/recipes/shared.yaml'}")
            command += ["--trainer.enable_progress_bar=false", f"--seed_everything={seed}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | NUMERICS[numerics]
        stage = run(*command, *(more or {}).get(path.stem, []), folder=folder, environment=environment)
        if stage.returncode and "claims did not hold" not in stage.stderr:
            end = (stage.stdout + stage.stderr)[-2000:]
            raise RuntimeError(f"{path.stem} failed with seed {seed}, {numerics}: {end}")
        said += stage.stdout + stage.stderr
    return said


def main() -> int:
    """Print the claims of each run, and in how many runs all hold."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="a folder of configs/recipes")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(3))
    parser.add_argument("--numerics", nargs="+", choices=NUMERICS, default=["native", "sse41", "perturbed"])
    arguments = parser.parse_args()
    failed = 0
    for recipe in arguments.recipes:
        held = []
        for numerics in arguments.numerics:
            for seed in arguments.seeds:
                start = time.perf_counter()
                with tempfile.TemporaryDirectory() as folder:
                    claims = CLAIM.findall(run_recipe(recipe, Path(folder), seed, numerics))
                held.append(bool(claims) and not any(": NOT held (" in claim for claim in claims))
                print(
                    f"== {recipe}, seed {seed}, {numerics}, {time.perf_counter() - start:.0f} s",
                    *claims,
                    sep="\n",
                    flush=True,
                )
        print(f"recipe-seeds: {recipe}: {sum(held)} of {len(held)} runs hold all claims", flush=True)
        failed += len(held) - sum(held)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
