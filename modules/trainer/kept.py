"""What a checkpoint brings back over the settings of the run that goes on from it."""

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

PLAIN = (int, float, str, tuple, Counter)  # torch's milestones are a Counter
Settings = list[dict[str, Any]]  # plain values by name; one of each group of an optimizer, one of any other part
Asked = list[tuple[str, object, Settings]]  # what a part is called, the part, its settings before a checkpoint's


def name_kinds(trainer: Trainer) -> dict[str, str]:
    """Return the classes of a fit's optimizer and scheduler, ``none`` without one; empty before a fit."""
    parts: dict[str, list[Any]] = {
        "optimizer": trainer.optimizers,
        "scheduler": [each.scheduler for each in trainer.lr_scheduler_configs],
    }
    if not trainer.optimizers:
        return {}
    return {name: ", ".join(type(each).__name__ for each in found) or "none" for name, found in parts.items()}


def refuse_other_kinds(saved: Mapping[str, str], mine: Mapping[str, str]) -> None:
    """Raise ValueError if the checkpoint's optimizer or scheduler is of another class, whose state means nothing here."""
    for name, kind in mine.items():
        if (was := saved.get(name, kind)) != kind:
            raise ValueError(
                f"the checkpoint cannot go on with another {name} ({was} there, {kind} here): set model.{name} as it "
                "was, or start a new run from the export"
            )


def ask_trainer(trainer: Trainer) -> Asked:
    """Return what a run asks of its optimizers and schedulers."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [
        *(("the optimizer", each, list_settings(each)) for each in trainer.optimizers),
        *(("the scheduler", each, list_settings(each)) for each in schedulers),
    ]


def ask_callbacks(trainer: Trainer, saved: Mapping[str, Any]) -> Asked:
    """Return what a run asks of the callbacks of which a checkpoint has ``saved`` a state."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [
        (type(each).__name__, each, list_settings(each, saved[each.state_key]))
        for each in callbacks
        if isinstance(saved.get(each.state_key), Mapping)
    ]


def list_settings(part: Any, names: Iterable[str] | None = None) -> Settings:
    """Return the settings of a part that are plain values: its class's arguments, those in ``names`` alone if given.

    The learning rates of an optimizer are those before its schedule.
    """
    if isinstance(part, Optimizer):
        plain = [name for name, value in part.defaults.items() if isinstance(value, int | float | tuple)]
        groups = [part.defaults | group | {"lr": group.get("initial_lr", group["lr"])} for group in part.param_groups]
        return [
            {name: tuple(group[name]) if isinstance(group[name], list) else group[name] for name in plain}
            for group in groups
        ]
    makers = [vars(kind)["__init__"] for kind in type(part).__mro__ if "__init__" in vars(kind)]
    arguments = {name for maker in makers for name in inspect.signature(maker).parameters}
    known = arguments - {"last_epoch"} if names is None else arguments & set(names)
    return [{name: value for name, value in vars(part).items() if name in known and isinstance(value, PLAIN)}]


def say_kept_settings(asked: Asked) -> None:
    """Warn of what a resumed run ``asked`` of its parts without effect, since the checkpoint brings its own."""
    kept = [
        (f"{name} of {owner}", after[name], before[name])
        for owner, part, settings in asked
        for before, after in zip(settings, list_settings(part, settings[0]), strict=True)
        for name in before
        if after.get(name, before[name]) != before[name]
    ]
    for number, each in enumerate(kept):
        if each not in kept[:number]:  # groups of an optimizer share settings
            say_kept(*each)


def say_kept(what: str, kept: object, asked: object) -> None:
    """Warn that a setting stays as it was in the checkpoint."""
    rank_zero_warn(
        f"{what} stays {kept}, as in the checkpoint, and {asked} has no effect; to change it, start a new run from the "
        "export"
    )
