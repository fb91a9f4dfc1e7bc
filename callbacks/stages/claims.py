"""Do the metrics of a run support what its recipe claims?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.stages.comparison import Comparison
from callbacks.stages.summary import PROMPTS, Summary

HERE = "this run"  # name of the model that is measured now


@dataclass(frozen=True)
class Claim:
    """A bound on a metric: either ``at_least`` or ``at_most``.

    The bound is a number or the name of an earlier model. A name stands for that model's value of the same metric.
    Earlier models are the columns of the ``Comparison`` beside ``Claims``. The model ``before`` holds the values before
    training from the ``Summary`` beside it.

    Args:
        words: what is claimed, such as ``DPO answers more sums right than its start``.
        metric: the metric as logged, such as ``val/pass@1``.
        at_least: the lowest value that is allowed.
        at_most: the highest value that is allowed.
        of: the earlier model whose value is judged; by default the model of this run.
        standard_errors: by how many standard errors of the difference the value must clear the bound, >= 0.
        required: whether the run fails if the claim does not hold. A claim that is not required is printed as shown or
            not shown; an unknown metric is always an error.

    Raises:
        ValueError: neither or both of the bounds are set, or ``standard_errors`` is below 0.
    """

    words: str
    metric: str
    at_least: float | str | None = None
    at_most: float | str | None = None
    of: str = HERE
    standard_errors: float = 0.0
    required: bool = True

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"claim '{self.words}': set either at_least or at_most")
        if self.standard_errors < 0:
            raise ValueError(f"claim '{self.words}': standard_errors must be >= 0, got {self.standard_errors}")

    def check(self, models: Mapping[str, Mapping[str, float]]) -> tuple[bool, str]:
        """Return whether the claim holds, and the numbers, such as ``0.86 >= 0.71 + 2 x 0.030, 400 prompts``."""
        bound = self.at_most if self.at_least is None else self.at_least
        judged = [name for name in (self.of, bound) if isinstance(name, str)]
        values = [self.value(models, name) for name in judged]
        limit = values[1] if isinstance(bound, str) else float(bound)  # type: ignore[arg-type]
        sign, word = (1, ">=") if self.at_most is None else (-1, "<=")
        said = f"{values[0]:.4g} {word} {limit:.4g}"
        margin = 0.0
        if self.standard_errors:
            error = math.hypot(*(find_standard_error(models[name], self.metric, self.words) for name in judged))
            margin = self.standard_errors * error
            counts = {int(models[name][PROMPTS]) for name in judged if PROMPTS in models[name]}
            said += f" {'+' if sign > 0 else '-'} {self.standard_errors:g} x {error:.3f}"
            said += "".join(f", {count} prompts" for count in sorted(counts))
        return sign * (values[0] - limit) >= margin, said

    def value(self, models: Mapping[str, Mapping[str, float]], name: str) -> float:
        """Return the metric of a model. Raises ValueError when the model or the metric is not known."""
        if name not in models:
            raise ValueError(f"claim '{self.words}': there are no numbers of {name}, only of {', '.join(models)}")
        if self.metric not in models[name]:
            raise ValueError(
                f"claim '{self.words}': {name} has no {self.metric}; it has {', '.join(sorted(models[name]))}"
            )
        return models[name][self.metric]


def find_standard_error(found: Mapping[str, float], metric: str, words: str) -> float:
    """Return the standard error of a metric: the logged one, else sqrt(p (1 - p) / n) for a share p of n prompts.

    n counts prompts and not completions, because completions of one prompt are not independent. With several
    completions per prompt this is an upper bound. Raises ValueError when no error was logged and the metric is not a
    share of a known number of prompts.
    """
    if f"{metric}_standard_error" in found:
        return found[f"{metric}_standard_error"]
    if PROMPTS not in found or not 0 <= found[metric] <= 1:
        raise ValueError(
            f"claim '{words}': {metric} has no standard error: none was logged, and it is not a share of a known "
            "number of prompts; set standard_errors to 0"
        )
    return math.sqrt(found[metric] * (1 - found[metric]) / found[PROMPTS])


class Claims(Callback):
    """Checks the claims of a recipe, and prints each as held or not; one that does not hold fails the run (exit status
    1).

    A claim with ``required: false`` is printed as shown or not shown, and never fails the run. It reads the last
    validation of ``fit``, or the one of ``validate``; a ``fast_dev_run`` is not checked. List it after ``Summary`` and
    ``Comparison``, so that their tables are printed and kept first.

    Args:
        claims: what must hold.

    Raises:
        ValueError: at the end of the run, with the claims that failed; or when a claim names an unknown model or
            metric.
    """

    def __init__(self, claims: list[Claim]) -> None:
        self.claims = claims
        self.found: dict[str, float] = {}  # metrics of the last validation
        self.failed: list[str] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics; check them at once in ``validate``."""
        if not trainer.sanity_checking:
            self.found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if trainer.state.fn == "validate":
            self.check(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the last validation of the fit."""
        self.check(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fail if a claim did not hold, after other callbacks have printed their results."""
        if self.failed:
            raise ValueError(f"{len(self.failed)} of {len(self.claims)} claims did not hold: {'; '.join(self.failed)}")

    def check(self, trainer: Trainer) -> None:
        """Check every claim and print it as held or not, or as shown or not."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Trainer sets it without declaring it
            return
        models = find_earlier(trainer) | {HERE: self.found}
        self.failed = []
        for claim in self.claims:
            holds, figures = claim.check(models)
            if trainer.is_global_zero:
                yes, no = ("held", "NOT held") if claim.required else ("shown", "not shown")
                print(f"claim: {claim.words}: {yes if holds else no} ({figures})", flush=True)
            if claim.required and not holds:
                self.failed.append(f"{claim.words} ({figures})")


def find_earlier(trainer: Trainer) -> dict[str, dict[str, float]]:
    """Return the metrics by model that the callbacks beside ``Claims`` know."""
    models: dict[str, dict[str, float]] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Summary) and callback.before:
            models["before"] = callback.before
        if isinstance(callback, Comparison):
            models |= callback.models()
    return models
