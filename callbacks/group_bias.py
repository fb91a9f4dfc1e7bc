"""Whose answers does the gradient of a group method favour?"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightning.pytorch import LightningModule, Trainer

from callbacks.phase import Mean, PhaseCallback, draw_series, record_of
from modules.functional.advantages import mixed_mean_bias
from modules.trainer.ranks import from_all_ranks
from modules.types import Credit, Rollout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIFFICULTIES = ("hard", "middle", "easy")


def name_difficulty(rate: float) -> str:
    """Return hard if at most a quarter of the answers is right, easy if at least three quarters are, else middle."""
    return DIFFICULTIES[(rate > 0.25) + (rate >= 0.75)]


class Group(NamedTuple):
    """The completions of a prompt that a phase trains on."""

    right: int
    size: int  # scored completions
    weight: float  # in the gradient, see ``Credit``

    @property
    def rate(self) -> float:
        """Share of right answers."""
        return self.right / self.size

    @property
    def difficulty(self) -> str:
        """See ``name_difficulty``."""
        return name_difficulty(self.rate)


class GroupBias(PhaseCallback):
    """Measures the biases of GRPO on the completions that a phase trains on: of length, of difficulty, of its baseline.

    Logs under ``train/group_bias/``:

    - ``advantage_decile_1`` to ``_10``: mean advantage of the shortest to the longest tenth. Completions of equal
      length share one tenth, chosen by their middle rank; a tenth without completions is left out.
    - ``gradient_share_hard``, ``_middle``, ``_easy``: share of the gradient's weight that groups of a difficulty have.
      hard: at most a quarter of the answers is right; easy: at least three quarters are. The weight is the sum of
      |advantage| x what multiplies grad log p in the loss. Dividing by the standard deviation raises the weight of both
      ends (Dr. GRPO, 2503.20783, section 3.1).
    - ``group_share_hard``, ``_middle``, ``_easy``: share of the mixed groups, those with right and wrong answers.
    - ``right_length``, ``wrong_length``: mean tokens of right and of wrong answers. A mean over completions
      (``SequenceMean``) makes long wrong answers cheap per token, so that they grow (section 3.1).
    - ``baseline_bias_hard``, ``_middle``, ``_easy``: mean of ``mixed_mean_bias`` at the observed rate over mixed
      groups: by how much the group's mean is too high as a baseline, because groups without a gradient are left out
      (dynamic sampling trains on mixed groups only). To correct this bias, 2601.08521 multiplies A by lambda exp(D |p -
      C|), with D = -sgn(A) sgn(p - C), p the share of right answers in the group and C a running mean of it over the
      phases.

    The figure shows all of them.

    Args:
        every_n_phases: phases between figures.
        right_above: a reward above this counts as a right answer; 0.5 suits rewards of 0 and 1.

    Raises:
        ValueError: in ``setup``, when the method does not say how much a completion weighs in the gradient.
    """

    name = "group_bias"

    def __init__(self, every_n_phases: int = 10, right_above: float = 0.5) -> None:
        super().__init__(every_n_phases)
        self.right_above = right_above
        self.credits: list[Credit] = []  # of this rank, in this phase

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a method that compares no groups."""
        if stage == "fit" and record_of(pl_module).credits is None:
            raise ValueError(
                f"GroupBias asks what each completion weighs in the gradient, which {type(pl_module).__name__} does "
                "not say: use it with GRPOModule, or remove it"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the phase trained on."""
        self.credits = record_of(pl_module).credits or []
        super().on_train_epoch_end(trainer, pl_module)

    def measure(self, rollouts: Sequence[Rollout]) -> dict[str, Mean]:
        """Measure the completions that all ranks train on; the class docstring explains the measures."""
        ranks = from_all_ranks([self.credits])
        scored = [credit for mine in ranks for credit in mine if credit.reward is not None]
        groups = [group for mine in ranks for group in self.find_groups(mine)]
        mixed = [group for group in groups if 0 < group.right < group.size]
        total = sum(group.weight for group in groups)
        lengths: dict[bool, list[int]] = {True: [], False: []}
        for credit in scored:
            lengths[self.is_right(credit)].append(credit.length)
        measures = {"right_length": Mean.of(lengths[True]), "wrong_length": Mean.of(lengths[False])}
        for number, advantages in enumerate(cut_deciles(scored), 1):
            measures[f"advantage_decile_{number}"] = Mean.of(advantages)
        for difficulty in DIFFICULTIES:
            mine = [group for group in mixed if group.difficulty == difficulty]
            weight = sum(group.weight for group in groups if group.difficulty == difficulty)
            biases = [mixed_mean_bias(group.rate, group.size) for group in mine]
            measures[f"gradient_share_{difficulty}"] = Mean(weight, total)
            measures[f"group_share_{difficulty}"] = Mean(len(mine), len(mixed))
            measures[f"baseline_bias_{difficulty}"] = Mean.of(biases)
        return measures

    def is_right(self, credit: Credit) -> bool:
        """Tell whether a scored completion counts as a right answer."""
        return credit.reward is not None and credit.reward > self.right_above

    def find_groups(self, credits: Sequence[Credit]) -> list[Group]:
        """Return the groups of a rank that have a scored completion."""
        found: dict[int, list[Credit]] = defaultdict(list)
        for credit in credits:
            if credit.reward is not None:
                found[credit.group].append(credit)
        return [
            Group(sum(map(self.is_right, group)), len(group), sum(credit.weight for credit in group))
            for group in found.values()
        ]

    def draw(self, figure: "Figure") -> None:
        """Plot advantage by length, lengths, shares by difficulty, and the bias of the baseline."""
        figure.set_size_inches(12, 7)
        (deciles, lengths), (shares, biases) = figure.subplots(2, 2)
        half = (len(self.history) + 1) // 2
        for label, rows in (("first half", self.history[:half]), ("second half", self.history[half:])):
            deciles.plot(*average_deciles(rows), marker="o", markersize=3, label=f"{label} of the phases")
        deciles.axhline(0, color="gray", linewidth=0.5)
        deciles.set(xlabel="tenth of the completions by length", ylabel="mean advantage")
        for name in ("right", "wrong"):
            draw_series(lengths, *self.series(f"{name}_length"), label=name)
        lengths.set(xlabel="phase", ylabel="mean tokens")
        for difficulty in DIFFICULTIES:
            draw_series(shares, *self.series(f"gradient_share_{difficulty}"), label=difficulty)
            draw_series(biases, *self.series(f"baseline_bias_{difficulty}"), label=difficulty)
        shares.set(xlabel="phase", ylabel="share of the gradient", ylim=(-0.02, 1.02))
        biases.set(xlabel="phase", ylabel="bias of the group's mean")
        for axes in (deciles, lengths, shares, biases):
            axes.legend()


def cut_deciles(credits: Sequence[Credit]) -> list[list[float]]:
    """Cut the advantages of the completions in the gradient into ten parts by length, see ``GroupBias``."""
    found: dict[int, list[float]] = defaultdict(list)
    for credit in credits:
        if credit.advantage is not None:
            found[credit.length].append(credit.advantage)
    parts: list[list[float]] = [[] for _ in range(10)]
    shorter, count = 0, sum(map(len, found.values()))
    for _, advantages in sorted(found.items()):
        parts[10 * (2 * shorter + len(advantages)) // (2 * count)] += advantages
        shorter += len(advantages)
    return parts


def average_deciles(rows: Sequence[dict[str, float]]) -> tuple[list[int], list[float]]:
    """Return the deciles that hold a completion in some phase, and the mean advantage of each over those phases."""
    names = {number: f"advantage_decile_{number}" for number in range(1, 11)}
    found = {number: [row[name] for row in rows if name in row] for number, name in names.items()}
    kept = {number: sum(values) / len(values) for number, values in found.items() if values}
    return list(kept), list(kept.values())
