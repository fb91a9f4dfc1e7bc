"""What does training make the model worse at? Held-out perplexity by domain, now against the start."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.phase import MAX_PHASES, Mean, new_figure, tensorboards
from modules.trainer.modes import evaluating
from modules.trainer.ranks import log_equal, weighted_means
from modules.types import InstructionBatch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class HasLogprobs(Protocol):
    """Scores of the tokens of a batch."""

    @property
    def logprobs(self) -> Tensor:
        """[N, T], at the learned tokens."""


@runtime_checkable
class ScoresTokens(Protocol):
    """What is read of the module."""

    def scores(self, batch: InstructionBatch) -> HasLogprobs:
        """Scores of a batch, which is on the module's device."""


@runtime_checkable
class HasDomains(Protocol):
    """What is read of the DataModule."""

    domains: Mapping[str, Sequence[Any]]  # held-out rows by domain

    def domain_loader(self, name: str) -> DataLoader[Any]:
        """This rank's batches of a domain; as many on every rank."""


class Forgetting(Callback):
    """Held-out log-loss of each domain against its value before the first step, in nats per learned token, over all
    ranks.

    Logs ``val/perplexity/<domain>`` = exp(loss), ``val/forgetting/<domain>`` = loss - loss at the start (above 0 =
    forgotten), and ``val/forgetting``, the mean over the domains of max(0, forgetting): at the start, after every
    validation, and at the end with a figure.
    The start is in the checkpoint: a resumed run and ``validate`` with that checkpoint compare with it; ``validate``
    without it logs perplexities only.

    Raises:
        ValueError: in ``setup``, a module that does not score tokens, or a DataModule without domains; later, no
            held-out rows.
    """

    def __init__(self) -> None:
        self.start: dict[str, float] = {}  # nats per token by domain, before the first step
        self.history: list[dict[str, float]] = []  # the same of every measurement, with its "step"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what has nothing to forget, before anything is trained."""
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
                "Forgetting compares held-out texts with the start and there are none: set data.val (data.ptx.val "
                "beside prompts), or remove it."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the start, unless the sanity check or a checkpoint has it."""
        if not set(domains(trainer)) <= set(self.start):
            self._log(trainer, self._measure(trainer, pl_module))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure beside the validation's own metrics."""
        values = self._measure(trainer, pl_module)
        log_equal(pl_module, values)
        if trainer.sanity_checking:  # of which the Trainer writes nothing
            self._log(trainer, values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights, if no validation did, and draw the curves."""
        if self.history[-1]["step"] != trainer.global_step:
            self._log(trainer, self._measure(trainer, pl_module))
        for logger in tensorboards(trainer):
            figure = new_figure()
            draw_forgetting(figure, self.history, self.start)
            logger.experiment.add_figure("val/forgetting", figure, global_step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The part that a resumed run or a validation needs."""
        return {"start": self.start, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""
        self.start, self.history = state_dict["start"], state_dict["history"]

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """The metrics of the current weights (collective). The first measurement of a domain in a fit is its start."""
        means = {name: self._domain(trainer, pl_module, name) for name in domains(trainer)}
        losses = weighted_means(means)
        if trainer.state.fn == "fit":
            self.start = losses | self.start
            self.history.append({"step": float(trainer.global_step), **losses})
            if len(self.history) > MAX_PHASES:
                self.history = self.history[::2]
        return metrics(losses, self.start)

    def _domain(self, trainer: Trainer, pl_module: LightningModule, name: str) -> Mean:
        """This rank's part of a domain's log-loss."""
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
        """Straight to the loggers, where the Trainer takes no metrics."""
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


def domains(trainer: Trainer) -> list[str]:
    """The names of the domains."""
    return list(cast(HasDomains, trainer.datamodule).domains)  # type: ignore[attr-defined]


def metrics(losses: dict[str, float], start: dict[str, float]) -> dict[str, float]:
    """What is logged of the domains' log-losses (nats per token) now and at the start; no forgetting without a start."""
    found = {
        f"val/perplexity/{name}": torch.tensor(loss, dtype=torch.float64).exp().item() for name, loss in losses.items()
    }
    worse = {name: loss - start[name] for name, loss in losses.items() if name in start}
    found |= {f"val/forgetting/{name}": value for name, value in worse.items()}
    return found | ({"val/forgetting": sum(max(0.0, value) for value in worse.values()) / len(worse)} if worse else {})


def draw_forgetting(figure: "Figure", history: Sequence[dict[str, float]], start: dict[str, float]) -> None:
    """Nats per token above the start over the steps, one curve a domain."""
    axes = figure.subplots()
    for name, before in start.items():
        rows = [row for row in history if name in row]
        axes.plot(
            [row["step"] for row in rows], [row[name] - before for row in rows], marker="o", markersize=3, label=name
        )
    axes.axhline(0.0, color="gray", linewidth=0.8)
    axes.set(xlabel="step", ylabel="held-out loss - its start, nats per token", title="above 0: forgotten")
    axes.legend()
