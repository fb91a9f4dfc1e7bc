"""Short names of classes and functions in a configuration, and the data that each method reads."""

import inspect
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, is_typeddict

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch import callbacks as lightning_callbacks
from torch import optim

import modules
import modules.losses
import modules.rewards
import modules.rollout
import modules.schedulers
from modules.functional import advantages, kl
from modules.rollout.calculator import Calculator


def import_own(name: str) -> ModuleType:
    """Import a package that stands beside ``modules``, even if the current folder holds another one of that name."""
    if name not in sys.modules:
        spec = PathFinder.find_spec(name, [str(Path(__file__).resolve().parents[2])])
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


PACKAGES = (
    modules,
    modules.losses,
    modules.rewards,
    modules.rollout,
    modules.schedulers,
    import_own("datamodules"),
    import_own("callbacks"),
)
# Options that take a function or a class itself, and ours that they may name by short name.
FUNCTIONS: dict[str, list[Callable[..., Any]]] = {
    "advantage": [advantages.group_center, advantages.group_zscore, advantages.leave_one_out],
    **dict.fromkeys(("kl_loss", "loss"), [kl.k1, kl.k2, kl.k3, kl.weighted_k3]),
    "factory": [Calculator],
}
CHOICES = [getattr(package, name) for package in PACKAGES for name in package.__all__]
CLASSES = [choice for choice in CHOICES if isinstance(choice, type) and not inspect.isabstract(choice)]
OTHERS = {  # classes of torch and Lightning that have a short name too
    name
    for package, base in ((optim, optim.Optimizer), (lightning_callbacks, Callback))
    for name, kind in vars(package).items()
    if isinstance(kind, type) and issubclass(kind, base)
}
NAMES = sorted(
    {*(kind.__name__ for kind in CLASSES), *(f.__name__ for some in FUNCTIONS.values() for f in some), *OTHERS}
)


def spell_out(option: str, value: Any) -> Any:
    """Write out the dotted path of a function of ours that ``option`` names by short name; keep other values.

    >>> spell_out("model.advantage", "group_center"), spell_out("model.advantage", "my_package.center")
    ('modules.functional.advantages.group_center', 'my_package.center')
    """
    for function in FUNCTIONS.get(option.rpartition(".")[2], []):
        if value == function.__name__:
            return f"{function.__module__}.{value}"
    if isinstance(value, dict):
        return {name: spell_out(str(name), part) for name, part in value.items()}
    return [spell_out("", part) for part in value] if isinstance(value, list) else value


def spell_out_arguments(arguments: list[str]) -> list[str]:
    """Write out short names in ``--option=value`` and ``--option value`` of a command line."""
    spelled = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if argument.startswith("--") and equals:
            spelled.append(f"{option}={spell_out(option, value)}")
        else:
            spelled.append(spell_out(before, argument))
    return spelled


def find_batch_type(method: type[LightningModule]) -> type | None:
    """Find the type of batch that a method reads, from the annotation of ``collect`` or ``training_step``.

    Returns:
        the type; None without an annotation.
    """
    reader = getattr(method, "collect", method.training_step)
    batch = list(inspect.signature(reader).parameters.values())[1].annotation
    return batch if is_typeddict(batch) else None


def find_givers(batch_type: type) -> list[str]:
    """Find the DataModules that give batches of this type."""
    return [choice.__name__ for choice in CHOICES if getattr(choice, "batch_type", None) is batch_type]


def choose_data(method: type[LightningModule]) -> str | None:
    """Choose the DataModule of a method for which none is named: the first one that can train it.

    Returns:
        its name; None for a method that only predicts.
    """
    wanted = find_batch_type(method)
    named = [vars(sys.modules["datamodules"])[name] for name in find_givers(wanted)] if wanted is not None else []
    trainers = [data for data in named if data.train_dataloader is not LightningDataModule.train_dataloader]
    return trainers[0].__name__ if trainers else None
