"""How did chosen metrics of sampling change over the phases? Draws them into one file."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.phase import draw_series, new_figure, record_of, require_samples
from callbacks.writers.output_files import in_run_folder
from modules.rollout.metrics import make_outcomes, measure_rollouts
from modules.trainer.ranks import from_all_ranks
from modules.trainer.saving import naming, replacing, require_writable


class Curves(Callback):
    """Draws metrics of the phases, one panel each, into a PNG at the end of the fit, and prints its path.

    Args:
        metrics: label of a panel -> name of the logged metric, such as ``{tokens: train/completions/mean_length}``; at
            least one. Rewards, their parts and lengths can be drawn: what ``measure_rollouts`` measures.
        file: the PNG; its parent folders are made. None = ``curves.png`` in the run's folder.

    Raises:
        ValueError: there is no metric; in ``setup``, when the file cannot be written; after the first phase, when
            sampling does not measure a metric.
    """

    def __init__(self, metrics: dict[str, str], file: str | None = None) -> None:
        if not metrics:
            raise ValueError("Curves needs at least one metric, such as {reward: train/reward}")
        self.metrics = metrics
        self._given = None if file is None else Path(file)
        self.file = self._given or Path("curves.png")  # settled at setup
        self.history: list[dict[str, float]] = []  # one row per phase: "phase" and the metrics, by label

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a file that cannot be written before anything is trained."""
        if stage == "fit":
            require_samples(pl_module, "Curves")
            self.file = in_run_folder(trainer, self._given, "curves.png")
            if trainer.is_global_zero:
                require_writable(self.file, "Curves")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of the phase."""
        outcomes = from_all_ranks(make_outcomes(record_of(pl_module).rollouts))
        if not outcomes:
            raise ValueError("Curves draws metrics of samples, and this phase sampled nothing: remove the callback")
        found = measure_rollouts(outcomes)
        known = {f"train/{name}": value for name, value in found.items()}
        unknown = [name for name in self.metrics.values() if name not in known]
        if unknown:
            raise ValueError(f"Curves cannot draw {', '.join(unknown)}; it can draw {', '.join(sorted(known))}")
        row = {label: known[name] for label, name in self.metrics.items()}
        self.history.append({"phase": float(trainer.current_epoch), **row})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the panels into the file and print its path."""
        if not trainer.is_global_zero or not self.history or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        figure = new_figure()
        phases = [row["phase"] for row in self.history]
        for axes, label in zip(figure.subplots(1, len(self.metrics), squeeze=False)[0], self.metrics, strict=True):
            draw_series(axes, phases, [row[label] for row in self.history])
            axes.set(xlabel="phase", title=label)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.file), replacing(self.file) as part:
            figure.savefig(part, format="png", dpi=80)
        print(f"figure: {self.file}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.history = state_dict["history"]
