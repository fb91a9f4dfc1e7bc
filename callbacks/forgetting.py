"""What does training make the model worse at? Compares the held-out perplexity of each domain with that before
training.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.phase import MAX_PHASES, Mean, find_tensorboards, new_figure
from modules.trainer.modes import evaluating
from modules.trainer.ranks import log_equal, weighted_means
from modules.types import InstructionBatch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class HasLogprobs(Protocol):
    """The scores of the tokens in a batch."""

    @property
    def logprobs(self) -> Tensor:
        """Log-probabilities [N, T] in nats, valid at the supervised tokens."""


@runtime_checkable
class ScoresTokens(Protocol):
    """The part of a module that ``Forgetting`` calls."""

    def scores(self, batch: InstructionBatch) -> HasLogprobs:
        """Score a batch that is on the module's device."""


@runtime_checkable
class HasDomains(Protocol):
    """The part of a DataModule that ``Forgetting`` reads."""

    domains: Mapping[str, Sequence[Any]]  # held-out rows by domain

    def domain_loader(self, name: str) -> DataLoader[Any]:
        """Return this rank's batches of a domain. Every rank has the same number of batches."""


class Forgetting(Callback):
    """Compares the held-out loss of each domain with its value before the first step.

    A loss is in nats per supervised token, over all ranks. Logs at the start, after every validation and at the end:

    - ``val/perplexity/<domain>``: exp(loss).
    - ``val/forgetting/<domain>``: loss - loss at the start; above 0 = forgotten.
    - ``val/forgetting``: mean over the domains of max(0, forgetting).

    At the end it also draws a figure. The losses at the start are kept in the checkpoint. A resumed run and
    ``validate`` with that checkpoint compare with them; ``validate`` without a checkpoint logs perplexities only.

    Raises:
        ValueError: in ``setup``, when the module does not score tokens or the DataModule has no held-out rows by
            domain.
    """

    def __init__(self) -> None:
        self.start: dict[str, float] = {}  # loss by domain before the first step, nats per token
        self.history: list[dict[str, float]] = []  # the losses of every measurement, with its "step"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module or DataModule that has nothing to measure, before training starts."""
        if not isinstance(pl_module, ScoresTokens):
            raise ValueError(
                f"Forgetting needs a module that scores tokens, such as SFTModule, not a {type(pl_module).__name__}: "
                "remove the callback."
            )
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, HasDomains):
            raise ValueError(
                "Forgetting reads held-out texts by domain: use an InstructionDataModule or data.ptx, or remove the "
                "callback."
            )
        if not data.domains:
            raise ValueError(
                "Forgetting measures held-out texts and there are none: set data.val (data.ptx.val for methods that "
                "read prompts), or remove the callback."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the losses at the start, unless the sanity check or a checkpoint gave them."""
        if not set(find_domains(trainer)) <= set(self.start):
            self._log(trainer, self._measure(trainer, pl_module))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log together with the validation's own metrics."""
        values = self._measure(trainer, pl_module)
        log_equal(pl_module, values)
        if trainer.sanity_checking:  # the Trainer logs nothing then
            self._log(trainer, values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights, unless the last validation did, and draw the curves."""
        if self.history[-1]["step"] != trainer.global_step:
            self._log(trainer, self._measure(trainer, pl_module))
        for logger in find_tensorboards(trainer):
            figure = new_figure()
            draw_forgetting(figure, self.history, self.start)
            logger.experiment.add_figure("val/forgetting", figure, global_step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run or a validation needs."""
        return {"start": self.start, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.start, self.history = state_dict["start"], state_dict["history"]

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Return the metrics of the current weights (collective). In a fit, the first loss of a domain becomes its
        start.
        """
        means = {name: self._domain(trainer, pl_module, name) for name in find_domains(trainer)}
        losses = weighted_means(means)
        if trainer.state.fn == "fit":
            self.start = losses | self.start
            self.history.append({"step": float(trainer.global_step), **losses})
            if len(self.history) > MAX_PHASES:
                self.history = self.history[::2]
        return measure_forgetting(losses, self.start)

    def _domain(self, trainer: Trainer, pl_module: LightningModule, name: str) -> Mean:
        """Return this rank's part of a domain's loss."""
        total = count = 0.0
        loader = cast(HasDomains, trainer.datamodule).domain_loader(name)  # type: ignore[attr-defined]
        with evaluating(pl_module), torch.no_grad(), trainer.precision_plugin.forward_context():
            for batch in islice(loader, 1 if trainer.fast_dev_run else None):  # type: ignore[attr-defined]  # Trainer sets it without declaring it
                batch = trainer.strategy.batch_to_device(batch)
                logprobs = cast(ScoresTokens, pl_module).scores(batch).logprobs[batch["loss_mask"]]  # [K]
                total -= float(logprobs.sum())
                count += len(logprobs)
        return Mean(total, count)

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Write straight to the loggers, in hooks where Lightning accepts no metrics."""
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


def find_domains(trainer: Trainer) -> list[str]:
    """Return the names of the domains."""
    return list(cast(HasDomains, trainer.datamodule).domains)  # type: ignore[attr-defined]


def measure_forgetting(losses: dict[str, float], start: dict[str, float]) -> dict[str, float]:
    """Return the metrics to log, from each domain's loss now and at the start (nats per token).

    A domain without a start gets no forgetting.
    """
    found = {
        f"val/perplexity/{name}": torch.tensor(loss, dtype=torch.float64).exp().item() for name, loss in losses.items()
    }
    worse = {name: loss - start[name] for name, loss in losses.items() if name in start}
    found |= {f"val/forgetting/{name}": value for name, value in worse.items()}
    return found | ({"val/forgetting": sum(max(0.0, value) for value in worse.values()) / len(worse)} if worse else {})


def draw_forgetting(figure: "Figure", history: Sequence[dict[str, float]], start: dict[str, float]) -> None:
    """Plot each domain's loss above its start, in nats per token, over the steps."""
    axes = figure.subplots()
    for name, before in start.items():
        rows = [row for row in history if name in row]
        axes.plot(
            [row["step"] for row in rows], [row[name] - before for row in rows], marker="o", markersize=3, label=name
        )
    axes.axhline(0.0, color="gray", linewidth=0.8)
    axes.set(xlabel="step", ylabel="held-out loss - its start, nats per token", title="above 0: forgotten")
    axes.legend()
