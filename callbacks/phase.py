"""What the callbacks that watch rollouts share: one measurement per phase, equal on all ranks, and a figure now and
then.
"""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from math import fsum
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from modules.trainer.ranks import log_equal, weighted_means
from modules.types import HasRecord, Record, Rollout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 30  # of a curve that are joined
MAX_PHASES = 1000  # of history; a longer one is thinned


class Mean(NamedTuple):
    """A mean as the two numbers that add up over ranks, so that k ranks log what one would."""

    total: float
    weight: float  # how many values, or their weight; 0 = there is nothing to average

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """The plain mean of ``values``, which may be none."""
        return cls(fsum(values), len(values))


def record_of(pl_module: LightningModule) -> Record:
    """What the module leaves for callbacks. Raises ValueError for a module that leaves nothing."""
    if not isinstance(pl_module, HasRecord):
        raise ValueError(
            f"{type(pl_module).__name__} leaves no record (modules.types.Record) for callbacks: remove those that read "
            "rollouts, or give it one"
        )
    return pl_module.record


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The TensorBoard loggers to draw into: none on ranks other than zero."""
    return (
        [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.is_global_zero
        else []
    )


def require_period(name: str, period: int) -> None:
    """Raises ValueError unless ``period``, a number of phases or epochs, is at least 1."""
    if period < 1:
        raise ValueError(f"{name} must be at least 1, got {period}.")


def new_figure() -> "Figure":
    """An empty figure, outside pyplot's global list of figures, so that nothing leaks and no display is needed."""
    from matplotlib.figure import Figure

    return Figure(figsize=(9.0, 4.0), layout="constrained")


def draw_series(axes: Any, x: Sequence[float], y: Sequence[float], label: str | None = None, marker: str = "o") -> None:
    """Draw measurements so that many of them stay readable.

    Up to ``MAX_POINTS`` they are joined as they come. Beyond, they are faint points, and a line goes through the means
    of as many stretches of ``x``, each with equally many of them.
    """
    if len(x) <= MAX_POINTS:
        axes.plot(x, y, marker=marker, markersize=3, linewidth=1, label=label)
        return
    (points,) = axes.plot(x, y, marker, markersize=2, alpha=0.25)
    ordered = sorted(zip(x, y, strict=True))
    cuts = [place * len(ordered) // MAX_POINTS for place in range(MAX_POINTS + 1)]
    means = [[fsum(values) / len(values) for values in zip(*ordered[a:b], strict=True)] for a, b in pairwise(cuts)]
    axes.plot(*zip(*means, strict=True), linewidth=2, color=points.get_color(), label=label)


class PhaseCallback(Callback):
    """Logs ``train/<name>/<measure>`` after every rollout phase and draws one figure of the history through
    TensorBoard.

    The history is in the checkpoint. Beyond ``MAX_PHASES`` phases every second one is dropped; the first phase always
    stays.

    Args:
        every_n_phases: phases between figures; one more is drawn at the end of the fit.

    Raises:
        ValueError: ``every_n_phases`` below 1.
    """

    name: str  # of the measurement: metrics are train/<name>/...

    def __init__(self, every_n_phases: int = 10) -> None:
        require_period("every_n_phases", every_n_phases)
        self.every_n_phases = every_n_phases
        self.history: list[dict[str, float]] = []  # one row per phase: "phase" and what was measured
        self.drawn_phase = -1.0

    @abstractmethod
    def measure(self, rollouts: Sequence[Rollout]) -> dict[str, Mean]:
        """This rank's part of each measure, always under the same names; ``rollouts`` may be empty."""

    @abstractmethod
    def draw(self, figure: "Figure") -> None:
        """Fills an empty figure from ``self.history``, which has at least one row."""

    def derive(self, values: dict[str, float]) -> dict[str, float]:
        """What is logged and kept, from the means over all ranks (undefined ones are missing)."""
        return values

    def series(self, name: str, over: str = "phase") -> tuple[list[float], list[float]]:
        """(x, y) of the phases that have both measures, in order."""
        rows = [row for row in self.history if name in row and over in row]
        return [row[over] for row in rows], [row[name] for row in rows]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, log and, every n phases, draw."""
        values = self.derive(weighted_means(self.measure(record_of(pl_module).rollouts)))
        if not values:
            return
        log_equal(pl_module, {f"train/{self.name}/{name}": value for name, value in values.items()})
        self.history.append({"phase": float(trainer.current_epoch), **values})
        if len(self.history) > MAX_PHASES:
            self.history = self.history[::2]
        if (trainer.current_epoch + 1) % self.every_n_phases == 0:
            self._publish(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last phase."""
        if self.history and self.history[-1]["phase"] != self.drawn_phase:
            self._publish(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The part that a resumed run or a validation needs."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""
        self.history = state_dict["history"]

    def _publish(self, trainer: Trainer) -> None:
        for logger in tensorboards(trainer):
            figure = new_figure()
            self.draw(figure)
            logger.experiment.add_figure(f"train/{self.name}", figure, global_step=trainer.global_step)
        self.drawn_phase = self.history[-1]["phase"]
