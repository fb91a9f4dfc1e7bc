"""Does the engine sample from the probabilities that the trainer computes?"""

from collections.abc import Sequence
from math import exp
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from callbacks.measures.gaps import Gaps, estimate_ratio, find_growth
from callbacks.phase import Mean, PhaseCallback, draw_series
from modules.functional.ranges import check_numbers
from modules.rollout import Sampling
from modules.trainer.ranks import from_all_ranks
from modules.types import Rollout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUARTERS = (1, 2, 3, 4)
GROWTH = 3.0  # times, see ``find_growth``
GROWTH_AT_REST = 2.0  # the same while the learning rate is 0
SURE = 5.0  # standard errors
UNRELIABLE = 0.1  # nats per token; from here on a mean of w says nothing


@runtime_checkable
class KeepsLogprobs(Protocol):
    """A module that keeps, in its rollouts, what the trainer computes for them."""

    keeps_logprobs: bool
    sampling: Sampling
    importance: Any  # with ``level`` and ``cap``, or None


class EngineMismatch(PhaseCallback):
    """Measures how far the probabilities that the engine drew from are from those that the trainer computes, and warns.

    For a sampled token, log w = log p by the trainer - log p by the sampler, both at collection and at the sampling
    temperature. Logs under ``train/engine_mismatch/``, over the tokens of the phase:

    - ``kl``: mean of w - 1 - log w, the KL of sampler and trainer in nats per token (k3; 0 where both compute alike).
      ``fresh_kl``: the same over tokens that were sampled with the weights that the trainer has at collection.
    - ``perplexity_ratio``: perplexity of the completions under the trainer / under the sampler, exp(-mean log w).
    - ``log_weight_mean``, ``log_weight_max``: mean and largest abs(log w), nats.
    - ``truncated``: share of tokens whose weight is above the cap of ``importance``, or w above 2 without it.
    - ``quarter_<n>_kl``, ``_log_weight``, ``_truncated``: ``kl``, ``log_weight_mean`` and ``truncated`` over the tokens
      in the n-th quarter of a completion's ``max_completion_length`` positions.

    It warns when ``fresh_kl``, with log w capped at 1, is above ``max_kl`` by more than two standard errors (over
    completions) for two phases in a row, and again at ten times that KL. It warns once when ``fresh_kl`` grows
    steadily, over the last ten phases or over the run in ten stretches: to three times its size, or to twice its size
    while the learning rate is 0, where nothing should change. Ten values are steady if 37 more of their 45 pairs rise
    than fall; below ``max_kl`` / 100 no growth counts. The warning names likely causes. With ``max_staleness`` only the
    first phase has a ``fresh_kl``, so it warns of no later gap.

    Args:
        max_kl: > 0, nats per token. With equal weights, 32 bits on both sides give 1e-8 or less, 16 bits on one side
            about 1e-4.
        every_n_phases: phases between figures.

    Raises:
        ValueError: a value is out of range; in ``setup``, when the method does not keep the trainer's log-probs.
    """

    name = "engine_mismatch"

    def __init__(self, max_kl: float = 1e-3, every_n_phases: int = 10) -> None:
        super().__init__(every_n_phases)
        check_numbers("EngineMismatch", max_kl=(max_kl, "(0, inf)"))
        self.max_kl = max_kl
        self.told: dict[str, float] = {}  # kind of warning -> the KL when it was given
        self.above = 0  # phases in a row with a KL above ``max_kl``
        self.moved = -1.0  # last phase with a learning rate above 0
        self._level, self._cap, self._length = "token", 2.0, 1
        self._completions: list[tuple[float, float, float]] = []  # see ``Gaps.sum_completions``, of all ranks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a method that does not compute what the engine computed."""
        if stage != "fit":
            return
        if not isinstance(pl_module, KeepsLogprobs) or not pl_module.keeps_logprobs:
            raise ValueError(
                f"EngineMismatch compares log-probs of engine and trainer, and {type(pl_module).__name__} does not compute "
                "the trainer's at collection: use it with GRPOModule, PPOModule or OnlineDPOModule, or remove it"
            )
        if pl_module.importance is not None:
            self._level, self._cap = pl_module.importance.level, pl_module.importance.cap
        self._length = pl_module.sampling.max_completion_length
        bound = getattr(getattr(pl_module, "engine", None), "max_staleness", 0)
        if bound > 0:
            rank_zero_info(
                f"EngineMismatch: with max_staleness {bound} older weights sample all phases but the first, so alarms judge "
                "the first alone; later gaps are those of engine and training together"
            )

    def measure(self, rollouts: Sequence[Rollout]) -> dict[str, Mean]:
        """Measure the tokens of this rank's rollouts; the class docstring explains the measures."""
        found = Gaps.of(rollouts)
        gaps, distances = found.log_weights, found.distances
        weights = (found.sum_gaps() if self._level == "sequence" else gaps).exp()
        over, fresh = (weights > self._cap).double(), found.ages == 0
        quarters = (4 * found.places // self._length).clamp(max=3) + 1
        self._completions = from_all_ranks(found.sum_completions(fresh))
        largest = max(from_all_ranks([float(gaps.abs().max()) if len(gaps) else 0.0]))
        measures = {
            "kl": average(distances),
            "fresh_kl": average(distances[fresh]),
            "perplexity_ratio": average(gaps),
            "log_weight_mean": average(gaps.abs()),
            "log_weight_max": Mean(largest * len(gaps), len(gaps)),
            "truncated": average(over),
        }
        for each in QUARTERS:
            here = quarters == each
            measures[f"quarter_{each}_kl"] = average(distances[here])
            measures[f"quarter_{each}_log_weight"] = average(gaps[here].abs())
            measures[f"quarter_{each}_truncated"] = average(over[here])
        return measures

    def derive(self, values: dict[str, float]) -> dict[str, float]:
        """Turn the mean log w into the ratio of perplexities."""
        ratio = {name: exp(-value) for name, value in values.items() if name == "perplexity_ratio"}
        return values | ratio

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, log and warn."""
        if any(group["lr"] > 0 for optimizer in trainer.optimizers for group in optimizer.param_groups):
            self.moved = float(trainer.current_epoch)
        phases = len(self.history)
        super().on_train_epoch_end(trainer, pl_module)
        if len(self.history) != phases and "fresh_kl" in self.history[-1]:
            self._warn_of_size(pl_module)
            self._warn_of_growth()

    def _warn_of_size(self, module: Any) -> None:
        counts, distances, _ = zip(*self._completions, strict=True)
        kl, error = estimate_ratio(distances, counts)
        self.above = self.above + 1 if kl - 2 * error > self.max_kl else 0
        if self.above > 1 and kl > 10 * self.told.get("size", 0.0):
            self.told["size"] = kl
            rank_zero_warn(
                f"engine_mismatch: the engine's probabilities are {self.history[-1]['fresh_kl']:.2g} nats a token (KL over "
                f"{sum(counts):.0f} tokens) from those of the trainer with the same weights, for the second phase surely above "
                f"{self.max_kl:g}: the gradient is not the policy's own. {self._name_causes(module)}"
            )

    def _warn_of_growth(self) -> None:
        phases, values = self.series("fresh_kl")
        grown = find_growth(values, self.max_kl / 100) if "growth" not in self.told else None
        if grown is None:
            return
        since, times = phases[grown[0]], grown[1]
        still = self.moved < since
        if times < (GROWTH_AT_REST if still else GROWTH):
            return
        self.told["growth"] = values[-1]
        why = (
            "although the learning rate is 0, so that nothing should change: the engine adds something up, or keeps what it "
            "should forget. Likely causes: weights that a sync adds to or rounds again, a cache of prompts that is not "
            "emptied"
            if still
            else "while the policy learns. Likely causes: weights that are not synced, all or some, such as adapters or a tied "
            "head; a cache of prompts that is not emptied; a 16-bit engine beside a policy that becomes sharper"
        )
        rank_zero_warn(
            f"engine_mismatch: since phase {since:.0f} the KL of engine and trainer grows steadily, to {values[-1]:.2g} nats a "
            f"token, {times:.2g} times what it was, {why}"
        )

    def _name_causes(self, module: Any) -> str:
        """Write the likely causes, by the settings or the numbers, else by whether the first phase differed already."""
        counts, distances, weights = zip(*self._completions, strict=True)
        kl, (excess, error) = sum(distances) / sum(counts), estimate_ratio(weights, counts)
        sampling, first = module.sampling, next(row["fresh_kl"] for row in self.history if "fresh_kl" in row)
        if sampling.top_k > 0 or sampling.top_p < 1:
            return (
                f"Cause: sampling.top_k {sampling.top_k} and top_p {sampling.top_p:g} cut the distribution that is drawn "
                "from, and the trainer's is whole: set 0 and 1"
            )
        if kl < UNRELIABLE and abs(excess) > max(0.01, SURE * error):
            return (
                f"Likely cause: the weights w have mean {1 + excess:.3g} and not 1, so the log-probs are not those of the "
                "distribution that the engine drew from, but raw ones, from before the temperature or a cut"
            )
        if first < self.max_kl / 100:
            return (
                f"At first both agreed ({first:.1g}), so the engine lacks what was learned since. Likely causes: weights "
                "that are not synced, all or some, such as adapters or a tied head; a cache of prompts that is not emptied"
            )
        return (
            f"They differed from the first phase on ({first:.2g}). Likely causes: another temperature; weights that never "
            "arrive; other positions, padding or prompts; a 16-bit engine"
        )

    def draw(self, figure: "Figure") -> None:
        """Plot KL and share of capped tokens over the phases, and the KL by place in the completion."""
        kl, quarters = figure.subplots(1, 2)
        for axes, names in ((kl, ["kl", "fresh_kl"]), (quarters, [f"quarter_{each}_kl" for each in QUARTERS])):
            for name in names:
                phases, values = self.series(name)
                draw_series(axes, phases, [max(value, 1e-12) for value in values], label=name)
            axes.set(xlabel="phase", ylabel="KL of sampler and trainer, nats per token", yscale="log")
            axes.axhline(self.max_kl, color="gray", linestyle="--", linewidth=0.5)
            axes.legend()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {**super().state_dict(), "told": self.told, "above": self.above, "moved": self.moved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        super().load_state_dict(state_dict)
        self.told, self.above, self.moved = (state_dict[name] for name in ("told", "above", "moved"))


def average(values: Tensor) -> Mean:
    """Return the mean of values [n]."""
    return Mean(float(values.sum()), len(values))
