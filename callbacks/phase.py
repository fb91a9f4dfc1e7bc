"""The base of the callbacks that watch rollouts: one measurement per phase and a figure every few phases."""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from math import fsum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from modules.trainer.ranks import log_equal, weighted_means
from modules.types import HasRecord, Record, Rollout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 30  # with more points than this, a curve is drawn as means
MAX_PHASES = 1000  # with more phases than this, a history is thinned


class Mean(NamedTuple):
    """A mean, kept as a total and a weight that add up over ranks. So k ranks log what one rank would."""

    total: float
    weight: float  # number of values, or their total weight; 0 = there is nothing to average

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Return the plain mean of ``values``, which may be empty."""
        return cls(fsum(values), len(values))


@runtime_checkable
class LogsSteps(Protocol):
    """A method of ours, or one that derives from our base."""

    @property
    def log_step(self) -> Any:
        """What logs the numbers of a step."""


def record_of(pl_module: LightningModule) -> Record:
    """Return the record that the module keeps for callbacks. Raises ValueError when it keeps none."""
    if not isinstance(pl_module, HasRecord):
        raise ValueError(
            f"{type(pl_module).__name__} has no record (modules.types.Record) for callbacks: remove the callbacks that "
            "read rollouts, or give the module a record"
        )
    return pl_module.record


def require_samples(pl_module: LightningModule, who: str, or_held_out: bool = False) -> None:
    """Refuse a method of ours that samples nothing for ``who``. Raises ValueError.

    Args:
        pl_module: the method; one of a user's own may fill its record in any way.
        who: the callback.
        or_held_out: answers to held-out rows suffice.
    """
    has_answers = or_held_out and record_of(pl_module).held_out is not None
    if isinstance(pl_module, LogsSteps) and not hasattr(pl_module, "collect") and not has_answers:
        raise ValueError(
            f"{who} reads what a method samples, and {type(pl_module).__name__} samples nothing: remove the callback"
        )


def find_tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """Return the TensorBoard loggers to draw into; none on ranks other than zero."""
    return (
        [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.is_global_zero
        else []
    )


def require_period(name: str, period: int) -> None:
    """Check a number of phases or epochs. Raises ValueError when ``period`` is below 1."""
    if period < 1:
        raise ValueError(f"{name} must be at least 1, got {period}.")


def new_figure() -> "Figure":
    """Return an empty figure outside pyplot's global list. So no figure leaks and no display is needed."""
    from matplotlib.figure import Figure

    return Figure(figsize=(9.0, 4.0), layout="constrained")


def draw_series(axes: Any, x: Sequence[float], y: Sequence[float], label: str | None = None, marker: str = "o") -> None:
    """Plot a series so that many points stay readable.

    Up to ``MAX_POINTS`` points are joined in the order given. More points are drawn faintly. A line then joins the
    means of ``MAX_POINTS`` stretches of ``x`` that hold equally many points.
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
    """Logs ``train/<name>/<measure>`` after every phase and draws the history in TensorBoard every few phases.

    The history is kept in the checkpoint. Beyond ``MAX_PHASES`` phases every second one is dropped; the first phase
    always stays.

    Args:
        every_n_phases: phases between figures. One more figure is drawn at the end of the fit.

    Raises:
        ValueError: ``every_n_phases`` is below 1.
    """

    name: str  # metrics are logged as train/<name>/...

    def __init__(self, every_n_phases: int = 10) -> None:
        require_period("every_n_phases", every_n_phases)
        self.every_n_phases = every_n_phases
        self.history: list[dict[str, float]] = []  # one row per phase: "phase" and the measures
        self.drawn_phase = -1.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a fit that samples nothing."""
        if stage == "fit":
            require_samples(pl_module, type(self).__name__)

    @abstractmethod
    def measure(self, rollouts: Sequence[Rollout]) -> dict[str, Mean]:
        """Return this rank's part of each measure, always under the same names. ``rollouts`` may be empty."""

    @abstractmethod
    def draw(self, figure: "Figure") -> None:
        """Fill an empty figure from ``self.history``, which has at least one row."""

    def derive(self, values: dict[str, float]) -> dict[str, float]:
        """Return what to log and keep, from the means over all ranks. A mean of no values is missing in ``values``."""
        return values

    def series(self, name: str, over: str = "phase") -> tuple[list[float], list[float]]:
        """Return (x, y) of the phases that have both measures, in order."""
        rows = [row for row in self.history if name in row and over in row]
        return [row[over] for row in rows], [row[name] for row in rows]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log; draw every n phases."""
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
        """Draw the last phase, unless it is drawn already."""
        if self.history and self.history[-1]["phase"] != self.drawn_phase:
            self._publish(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.history = state_dict["history"]

    def _publish(self, trainer: Trainer) -> None:
        for logger in find_tensorboards(trainer):
            figure = new_figure()
            self.draw(figure)
            logger.experiment.add_figure(f"train/{self.name}", figure, global_step=trainer.global_step)
        self.drawn_phase = self.history[-1]["phase"]
