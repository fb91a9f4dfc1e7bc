"""Runs a study of configs/studies: its stages for each seed, and what they say about its claims.

Run: make study NAME=grpo-bias, or python configs/studies/run_study.py NAME [--jobs 2]

``study.yml`` in the study's folder names the seeds, the arms and the claims. The YAML files are numbered and say what
is run, NN-<verb>-<what>.yaml, by ``python -m modules <verb>``. Those before the last are run once for each seed, the
last one once for each arm and seed, with the arm's arguments. A ``measures`` file is a script whose function
``measure`` takes the folder of the last stage before the arms, beside which the arms' folders lie, and a seed, and
returns numbers. What is done is kept in runs/NAME and skipped, until it is deleted. Each claim ends in a line
``study: NAME CLAIM shown`` or ``not shown``, with its numbers. The exit status is 1 if a run fails, and 0 whatever the
claims.
"""

import argparse
import csv
import json
import math
import os
import runpy
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).parents[2]
LOADED = ["modules.cli.command", "datamodules", "callbacks", "transformers.models.llama.modeling_llama"]
# Of Student's distribution, two-sided 95 %, by degrees of freedom.
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
LATE = 5  # a curve's value is the mean over its last fifth

Runs = Mapping[str, Sequence[Mapping[str, list[float]]]]  # arm -> a run per seed: metric -> its curve


@dataclass(frozen=True)
class StudyClaim:
    """What a study claims of an arm's metric: of its value, or of its difference to another arm on the same seeds.

    It is shown when the 95 % interval of the mean over the seeds (Student) lies within the bounds.

    Raises:
        ValueError: no bound is set.
    """

    name: str
    metric: str  # as logged; its value is the mean over the last fifth of the run
    of: str  # the arm
    than: str | None = None  # the arm that is subtracted; None = none
    at_least: float = -math.inf
    at_most: float = math.inf

    def __post_init__(self) -> None:
        if math.isinf(self.at_least) and math.isinf(self.at_most):
            raise ValueError(f"claim '{self.name}': set at_least or at_most")

    def check(self, runs: Runs) -> tuple[bool, str]:
        """Return whether the claim is shown, and its numbers.

        Raises:
            ValueError: an arm or a metric is not known.
        """
        values = [take_late_value(self.read_curve(run)) for run in self.find(runs, self.of)]
        words = f"{self.metric} of {self.of}"
        if self.than is not None:
            others = [take_late_value(self.read_curve(run)) for run in self.find(runs, self.than)]
            values = [value - other for value, other in zip(values, others, strict=True)]
            words += f" - {self.than}"
        mean, low, high = find_interval(values)
        bounds = [f"at least {self.at_least:g}"] if math.isfinite(self.at_least) else []
        bounds += [f"at most {self.at_most:g}"] if math.isfinite(self.at_most) else []
        said = f"{words}: {mean:.3g} [{low:.3g}, {high:.3g}], {' and '.join(bounds)}, {len(values)} seeds"
        return self.at_least <= low and high <= self.at_most, said

    def find(self, runs: Runs, arm: str) -> Sequence[Mapping[str, list[float]]]:
        """Return the runs of an arm."""
        if arm not in runs:
            raise ValueError(f"claim '{self.name}': there is no arm {arm}, only {', '.join(runs)}")
        return runs[arm]

    def read_curve(self, run: Mapping[str, list[float]]) -> list[float]:
        """Return the metric's numbers in a run."""
        if not run.get(self.metric):
            raise ValueError(f"claim '{self.name}': no {self.metric} was logged; there is {', '.join(sorted(run))}")
        return run[self.metric]


def take_late_value(curve: Sequence[float]) -> float:
    """Return the mean over the last fifth of a curve, at least its last number."""
    return fmean(curve[-max(1, len(curve) // LATE) :])


def find_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95 % interval; without a second value the ends are infinite.

    Raises:
        ValueError: there are more than ten values.
    """
    if len(values) < 2:
        return values[0], -math.inf, math.inf
    if len(values) - 1 not in QUANTILES:
        raise ValueError(f"a study has at most {max(QUANTILES) + 1} seeds, got {len(values)}")
    margin = QUANTILES[len(values) - 1] * stdev(values) / math.sqrt(len(values))
    return fmean(values), fmean(values) - margin, fmean(values) + margin


def read_curves(file: Path) -> dict[str, list[float]]:
    """Read the curve of each metric from a CSV logger's file; numbers that are not finite are left out."""
    curves: dict[str, list[float]] = {}
    with file.open(encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            for name, value in row.items():
                if value and math.isfinite(float(value)):
                    curves.setdefault(name, []).append(float(value))
    return curves


def run_stage(verb: str, arguments: Sequence[str], out: Path) -> Path:
    """Run ``python -m modules VERB`` in this process, with what it prints in ``out.log``; return its file of numbers.

    Raises:
        RuntimeError: the run fails; the message holds the end of what it printed.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log")
    speak_into(log)
    try:
        from modules.__main__ import main as run_modules

        run_modules([verb, *arguments, f"--out={out}", "--logger=csv", "--trainer.enable_progress_bar=false"])
    except SystemExit as end:
        if end.code not in (None, 0):
            raise RuntimeError(f"{out} failed: {log.read_text()[-2000:]}") from end
    out.with_suffix(".done").touch()
    return out / "metrics.csv"


def run_measure(script: Path, start: Path, seed: int, file: Path) -> Path:
    """Call ``measure`` of a study's script and write the numbers that it returns."""
    speak_into(file.with_suffix(".log"))
    found = runpy.run_path(str(script))["measure"](start, seed)
    file.write_text(json.dumps(found))
    return file


def speak_into(log: Path) -> None:
    """Write all that this process prints into a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


def move_paths(path: Path, name: str, seed: int) -> Path:
    """Write a YAML of the study whose runs lie in ``runs/name/seed-SEED`` and not in ``runs/name``."""
    folder = Path("runs") / name / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / path.name
    copy.write_text(path.read_text(encoding="utf-8").replace(f"runs/{name}/", f"{folder}/"), encoding="utf-8")
    return copy


class Study:
    """The runs of a study, in the present folder.

    Args:
        folder: holds ``study.yml`` and the numbered YAML files.
        jobs: runs at once.

    Raises:
        ValueError: the file has other keys.
    """

    def __init__(self, folder: Path, jobs: int) -> None:
        import yaml

        self.folder, self.name = folder, folder.name
        settings = yaml.safe_load((folder / "study.yml").read_text(encoding="utf-8"))
        unknown = settings.keys() - {"seeds", "arms", "claims", "measures", "figure"}
        if unknown:
            raise ValueError(f"{folder}/study.yml: there is no {', '.join(sorted(unknown))}; see run_study.py")
        self.seeds: list[int] = settings["seeds"]
        self.arms: dict[str, list[str]] = settings["arms"]
        self.claims = [StudyClaim(**claim) for claim in settings.get("claims", [])]
        self.measures: dict[str, str] = settings.get("measures", {})
        self.figure: list[dict[str, str]] = settings.get("figure", [])
        *self.starts, self.last = sorted(folder.glob("[0-9]*.yaml"))
        context = get_context("forkserver")
        context.set_forkserver_preload(LOADED)
        self.pool = ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1)

    def place(self, seed: int, run: str) -> Path:
        """Return the folder of a run."""
        return Path("runs") / self.name / f"seed-{seed}" / run

    def run_yaml(self, path: Path, seed: int, run: str, arguments: Sequence[str] = ()) -> "Future[Path]":
        """Run a YAML for a seed, unless it is done."""
        config = move_paths(path, self.name, seed)
        given = [f"--config={config}", f"--seed_everything={seed}", *arguments]
        out = self.place(seed, run)
        return self.do_once(out / "metrics.csv", run_stage, path.stem.split("-")[1], given, out)

    def do_once(self, file: Path, work: Any, *arguments: Any) -> "Future[Path]":
        """Do the work that makes a file, unless it was done."""
        done = file.parent.with_suffix(".done") if file.name == "metrics.csv" else file
        if done.exists():
            future: Future[Path] = Future()
            future.set_result(file)
            return future
        return self.pool.submit(work, *arguments)

    def run(self) -> dict[str, list[dict[str, list[float]]]]:
        """Make all runs and return their curves by arm, one for each seed."""
        for path in self.starts:
            self.finish([self.run_yaml(path, seed, path.stem.split("-", 2)[2]) for seed in self.seeds])
        work: dict[str, list[Future[Path]]] = {}
        for arm, arguments in self.arms.items():
            work[arm] = [self.run_yaml(self.last, seed, arm, arguments) for seed in self.seeds]
        self.finish([future for futures in work.values() for future in futures])  # measures read their numbers
        made = max(future.result().stat().st_mtime for futures in work.values() for future in futures)
        start = self.starts[-1].stem.split("-", 2)[2]
        for name, script in self.measures.items():
            files = [self.place(seed, f"{name}.json") for seed in self.seeds]
            for file in files:
                if file.exists() and file.stat().st_mtime < made:  # an arm was run again
                    file.unlink()
            work[name] = [
                self.do_once(file, run_measure, self.folder / script, self.place(seed, start), seed, file)
                for file, seed in zip(files, self.seeds, strict=True)
            ]
        self.finish([future for futures in work.values() for future in futures])
        return {name: [read_numbers(future.result()) for future in futures] for name, futures in work.items()}

    def finish(self, futures: Sequence["Future[Path]"]) -> None:
        """Wait for runs; the first that fails ends the study."""
        try:
            for future in futures:
                future.result()
        except BaseException:
            self.pool.shutdown(cancel_futures=True)
            raise


def read_numbers(file: Path) -> dict[str, list[float]]:
    """Read what a fit logged, or what a measure returned."""
    if file.suffix == ".csv":
        return read_curves(file)
    return {name: [value] for name, value in json.loads(file.read_text(encoding="utf-8")).items()}


def draw_study(panels: Sequence[Mapping[str, str]], arms: Sequence[str], runs: Runs, file: Path) -> None:
    """Draw one panel for each ``{metric, label}``: every seed's curve by arm, or late values where there is no curve.

    Curves are drawn over the share of the run that is done, smoothed. With ``over`` and ``over_label`` a panel draws
    them over another metric that is logged as often, and as they are.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * len(panels), 4.0), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, arm in enumerate(arms):
            curves = [run.get(panel["metric"], []) for run in runs[arm]]
            label: str | None = arm
            for seed, curve in enumerate(curves):
                if "over" in panel:
                    distances = runs[arm][seed].get(panel["over"], [])
                    axes.plot(
                        distances, curve, ".-", color=f"C{number}", linewidth=1, label=label if seed == 0 else None
                    )
                elif len(curve) < 4 * LATE:
                    axes.plot([number], [take_late_value(curve)] if curve else [math.nan], "o", color=f"C{number}")
                else:
                    smooth = [fmean(curve[max(0, i - 4) : i + 1]) for i in range(len(curve))]
                    done = [(i + 1) / len(curve) for i in range(len(curve))]
                    axes.plot(done, smooth, color=f"C{number}", linewidth=1, label=label if seed == 0 else None)
        if axes.get_legend_handles_labels()[0]:
            axes.set(xlabel=panel.get("over_label", panel.get("over", "share of the run")))
            axes.legend()
        else:
            axes.set_xticks(range(len(arms)), arms, rotation=20)
        axes.set(ylabel=panel["label"])
    figure.savefig(file, dpi=80)


def main() -> int:
    """Run a study and print what it shows."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("name", help="a folder beside this file, or the path of another")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    study = Study(Path(__file__).parent / arguments.name, arguments.jobs)
    try:
        runs = study.run()
        found = [(claim.name, *claim.check(runs)) for claim in study.claims]
    except Exception as error:
        print(f"study: {study.name} failed: {error}", file=sys.stderr)
        return 1
    finally:
        study.pool.shutdown()
    folder = Path("runs") / study.name
    if study.figure:
        draw_study(study.figure, list(study.arms), runs, folder / f"{study.name}.png")
        print(f"figure: {folder / f'{study.name}.png'}")
    print(f"{sum(map(len, runs.values()))} runs, {time.perf_counter() - start:.0f} s")
    for name, shown, said in found:
        print(f"study: {study.name} {name} {'shown' if shown else 'not shown'} {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
