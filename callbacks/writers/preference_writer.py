"""Writes the labels of a judge as preference rows. A killed run continues where it stopped."""

from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer

from callbacks.writers.resumable_jsonl import Labels, ResumableJsonl


@runtime_checkable
class Judges(Labels, Protocol):
    """A module that labels by asking a judge."""

    def usage(self) -> dict[str, float]:
        """Return what labelling has cost so far."""


class PreferenceWriter(ResumableJsonl):
    """Writes JSONL, one line per labelled row in the order of the data: uid, prompt, completions, ranks (0 = best),
    scores.

    A killed run that is started again asks the judge no question twice, see :class:`ResumableJsonl`. The report beside
    the file covers all starts. It holds counts, position bias, consistency, agreement with given labels, requests and
    cost.

    Args:
        path: the file; its parent folders are made, and an earlier file is replaced at the end. None =
            ``preferences.jsonl`` in the run's folder, or the next free name there.

    Raises:
        ValueError: see :class:`ResumableJsonl`.
    """

    reads = Judges
    module = "LabelModule"
    begun_with = "another judge or other rows"
    file = "preferences.jsonl"

    def usage(self, pl_module: Any) -> dict[str, float]:
        """Return what the judge has cost so far."""
        used: dict[str, float] = pl_module.usage()
        return used

    def report(self, trainer: Trainer, report: dict[str, float]) -> str:
        """Return the report in one line."""
        parts = [f"{report['rows']:.0f} rows, {report['ties']:.0f} ties, {report['invalid']:.0f} invalid left out"]
        if "position_bias" in report:
            parts.append(f"position bias {report['position_bias']:+.2f}")
        if "agreement" in report:
            parts.append(f"agreement {report['agreement']:.2f} with {report['given']:.0f} given labels")
        if "cost" in report:
            parts.append(f"cost {report['cost']:.2f}")
        return ", ".join(parts)
