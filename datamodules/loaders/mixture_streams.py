"""The streams of a mixture and which weights make one."""

from dataclasses import dataclass
from math import isfinite

from datamodules.formats.table import check_mapping
from datamodules.sources import Source
from datamodules.sources.held_out import parse_share
from datamodules.tokens.encoding import LossOn


@dataclass(frozen=True)
class Stream:
    """One source of rows in a mixture, text or instructions.

    Args:
        train: training rows: a source, or a file, a folder or a hub id.
        weight: share of the mixture, relative to the other streams' weights; 0 = not drawn.
        decay_weight: the same from ``decay.start`` on; None = ``weight``.
        val: held-out rows, a domain of the stream's name.
        loss_on: what is learned of its conversations; None = as the mixture says.
        columns: our name of a column -> its name in the data.
    """

    train: str | Source
    weight: float | None = None
    decay_weight: float | None = None
    val: str | Source | None = None
    loss_on: LossOn | None = None
    columns: dict[str, str] | None = None


@dataclass(frozen=True)
class DecayPhase:
    """The end of training, in which the streams' ``decay_weight`` holds."""

    start: int  # >= 0, optimiser step from which it holds
    # >= 0, steps over which the shares change linearly: the step start + k is (k + 1) / (ramp_steps + 1) of the way
    ramp_steps: int = 0

    def progress(self, step: int) -> float:
        """How far the shares have changed at an optimiser step, in [0, 1]."""
        return 0.0 if step < self.start else min(1.0, (step - self.start + 1) / (self.ramp_steps + 1))

    @property
    def end(self) -> int:
        """The first step at which the shares have changed completely."""
        return self.start + self.ramp_steps


def check_streams(streams: dict[str, Stream], num_steps: int, cap: int | None, decay: DecayPhase | None) -> None:
    """Refuse weights that make no mixture, with a ValueError that names the stream."""
    if not streams:
        raise ValueError("streams is empty; name at least one, such as {text: {train: text.jsonl, weight: 1.0}}")
    below = decay is not None and min(decay.start, decay.ramp_steps) < 0
    if num_steps < 1 or below or (cap is not None and cap < 1):
        raise ValueError("num_steps and cap must be at least 1, decay.start and decay.ramp_steps at least 0")
    weighted = [name for name, stream in streams.items() if stream.weight is not None]
    for name, stream in streams.items():
        check_mapping(stream.columns or {}, "instruction")
        if parse_share(stream.val) is not None:
            raise ValueError(f"stream {name}: val {stream.val} is a share; name held-out rows, such as a file")
        for weight in (stream.weight, stream.decay_weight):
            if weight is not None and not (weight >= 0 and isfinite(weight)):
                raise ValueError(f"stream {name}: a weight must be a number from 0 on, got {weight}")
        if weighted and stream.weight is None:
            raise ValueError(
                f"stream {name} has no weight and {weighted[0]} has one; give every stream a weight, or none"
            )
        if stream.weight is None and stream.decay_weight is not None:
            raise ValueError(
                f"stream {name} has a decay_weight and no weight; weights in proportion to the rows do not change"
            )
    if weighted and cap is not None:
        raise ValueError("cap limits streams that have no weights; leave the cap out or the weights")
    phases = (
        [
            stream.weight if stream.decay_weight is None or not decays else stream.decay_weight
            for stream in streams.values()
        ]
        for decays in (0, 1)
    )
    if weighted and not all(any(weights) for weights in phases):
        raise ValueError("all weights of a phase are 0, so nothing would be drawn")
    changes = any(stream.decay_weight is not None for stream in streams.values())
    if changes != (decay is not None):
        raise ValueError(
            "decay.start and decay_weight belong together: the one says when, the other what the shares become"
        )
