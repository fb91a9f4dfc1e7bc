"""Does the reward that is trained on still measure what we want?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from callbacks.phase import Mean, PhaseCallback, draw_series
from modules.functional.diagnostics import overoptimization_fit
from modules.types import Reward, Rollout, as_reward, score

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Overoptimization(PhaseCallback):
    """Compares the training reward with a held-out gold reward over the distance from the start policy.

    This is figure 1 of Gao et al. (2210.10760). Logs under ``train/overoptimization/``:

    - ``proxy``: mean of the reward that is trained on.
    - ``gold``: mean of the reward ``gold``, which never enters the loss.
    - ``gap``: rise of ``proxy`` minus rise of ``gold`` since the first phase. Above 0, training games its reward.
    - ``sqrt_kl``: sqrt(max(0, mean KL(policy || start) per completion)) in sqrt(nats), where rollouts carry ``kl``. The
      mean of a sampled KL can be negative by chance, hence the max.

    The figure shows both rewards over ``sqrt_kl``, or over phases where there is no KL.

    Args:
        gold: a reward that is not part of the training reward.
        every_n_phases: phases between figures.
    """

    name = "overoptimization"

    def __init__(self, gold: Reward, every_n_phases: int = 10) -> None:
        super().__init__(every_n_phases)
        self.gold = as_reward(gold)

    def measure(self, rollouts: Sequence[Rollout]) -> dict[str, Mean]:
        """Measure this rank's rollouts; the class docstring explains the measures."""
        gold = score(self.gold, rollouts)
        return {
            "proxy": Mean.of([rollout.reward for rollout in rollouts if rollout.reward is not None]),
            "gold": Mean.of([value for value in gold if value is not None]),
            "kl": Mean.of([rollout.kl for rollout in rollouts if rollout.kl is not None]),
        }

    def derive(self, values: dict[str, float]) -> dict[str, float]:
        """Compute the gap and the distance from the means of the rewards and of the KL."""
        derived = {name: value for name, value in values.items() if name != "kl"}
        if "proxy" in values and "gold" in values:
            first = next((row for row in self.history if "gap" in row), derived)
            derived["gap"] = (derived["proxy"] - first["proxy"]) - (derived["gold"] - first["gold"])
        if "kl" in values:
            derived["sqrt_kl"] = max(0.0, values["kl"]) ** 0.5
        return derived

    def draw(self, figure: "Figure") -> None:
        """Plot both rewards over the distance, or over phases where there is no KL."""
        over = "sqrt_kl" if any("sqrt_kl" in row for row in self.history) else "phase"
        axes = figure.subplots()
        for name, marker in (("proxy", "o"), ("gold", "s")):
            draw_series(axes, *self.series(name, over), label=name, marker=marker)
        if over == "sqrt_kl":
            axes.plot(*self._fitted_gold(), linestyle="--", color="gray", label="fit of gold, d(alpha - beta log d)")
        axes.set(xlabel="sqrt KL(policy || start)" if over == "sqrt_kl" else over, ylabel="mean reward")
        axes.legend()

    def _fitted_gold(self) -> tuple[list[float], list[float]]:
        """Return (distances, gold) along the fitted law, which starts at the first phase's gold reward.

        Both are empty below three different distances, because any law fits those.
        """
        distances, gold = self.series("gold", "sqrt_kl")
        if len({distance for distance in distances if distance > 0}) < 3:
            return [], []
        rise = torch.tensor(gold, dtype=torch.float64) - gold[0]
        alpha, beta = overoptimization_fit(torch.tensor(distances, dtype=torch.float64), rise)
        line = torch.linspace(max(distances) / 100, max(distances), 100, dtype=torch.float64)
        return line.tolist(), (gold[0] + line * (alpha - beta * line.log())).tolist()
