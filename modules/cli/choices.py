"""What a configuration may name by its short name, and which data each method reads."""

import inspect
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import is_typeddict

from lightning.pytorch import LightningDataModule, LightningModule

import modules
import modules.losses
import modules.rewards
import modules.schedulers


def import_own(name: str) -> ModuleType:
    """Import the package that stands beside ``modules``, also where the current folder holds another of that name."""
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
    modules.schedulers,
    import_own("datamodules"),
    import_own("callbacks"),
)
CHOICES = [vars(package)[name] for package in PACKAGES for name in package.__all__]
NAMES = sorted(choice.__name__ for choice in CHOICES if isinstance(choice, type) and not inspect.isabstract(choice))


def batch_read_by(method: type[LightningModule]) -> type | None:
    """What the method reads: the prompts of ``collect`` where it samples, else the batch of ``training_step``; None
    where it does not say.
    """
    reader = getattr(method, "collect", method.training_step)
    batch = list(inspect.signature(reader).parameters.values())[1].annotation
    return batch if is_typeddict(batch) else None


def givers(batch_type: type) -> list[str]:
    """The DataModules that give batches of this type."""
    return [choice.__name__ for choice in CHOICES if getattr(choice, "batch_type", None) is batch_type]


def choose_data(method: type[LightningModule]) -> str | None:
    """The DataModule of a method where none is named: the first that can train it; None for a method that only
    predicts.
    """
    wanted = batch_read_by(method)
    named = [vars(sys.modules["datamodules"])[name] for name in givers(wanted)] if wanted is not None else []
    trainers = [data for data in named if data.train_dataloader is not LightningDataModule.train_dataloader]
    return trainers[0].__name__ if trainers else None
