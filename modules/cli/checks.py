"""Refuses in one sentence what cannot run, before anything is loaded or trained."""

import inspect
import math
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from types import NoneType
from typing import Any, get_args

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder
from lightning.pytorch.utilities.model_helpers import is_overridden

from modules.cli.choices import find_batch_type, find_givers
from modules.cli.explain import name_tiny_config
from modules.cli.run_folder import CHECKPOINTS, find_last_checkpoint
from modules.predict.predict_module import PredictModule
from modules.trainer.saving import require_whole

NEEDED = {
    "fit": ("training_step", "train_dataloader"),
    "validate": ("validation_step", "val_dataloader"),
    "test": ("test_step", "test_dataloader"),
    "predict": ("predict_step", "predict_dataloader"),
}
LEAST = {  # of the Trainer's settings, where Lightning checks nothing
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
    "min_epochs": 0,
    "min_steps": 0,
}


def resolve_checkpoint(path: str | None, out: Path | None) -> str | None:
    """Return the path of a checkpoint. A run's folder, or ``last`` if ``out`` is one, stands for its last checkpoint.

    Raises:
        ValueError: the run has written no checkpoint.
    """
    run = out if path == "last" else path and Path(path)
    if run is None or not (path == "last" or (Path(run) / CHECKPOINTS).is_dir()):
        return path
    found = find_last_checkpoint(Path(run))
    if found is None:
        raise ValueError(f"ckpt_path: the run in '{run}' has written no checkpoint; to begin anew, leave it out")
    return str(found)


def check_checkpoint(path: str | None, resumes: bool) -> None:
    """Refuse a ``ckpt_path`` that is no checkpoint.

    Names such as ``best`` are left to Lightning.

    Raises:
        ValueError: the file does not exist, is damaged, or is no checkpoint of a training run.
    """
    if path is not None and "://" in path:
        raise ValueError(f"ckpt_path: '{path}' is an address; download the file and name it")
    if path is None:
        return
    if not Path(path).exists():
        if path in ("last", "best", "hpc", "registry") or path.startswith("registry:"):  # Lightning's names
            return
        raise ValueError(f"ckpt_path: there is no file '{path}'; name a run's folder or a .ckpt file in it")
    if Path(path).is_dir():
        if not (Path(path) / "meta.pt").is_file():  # sharded checkpoints are folders
            there = any(Path(path).glob("**/*.ckpt"))
            told = "; name the .ckpt file in it" if there else " without a checkpoint; to begin anew, leave it out"
            raise ValueError(f"ckpt_path: '{path}' is a folder{told}")
        return
    require_whole(Path(path))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError, ValueError, LookupError, EOFError) as error:  # whatever damage causes
        raise ValueError(f"ckpt_path: '{path}' is no checkpoint of this program") from error
    missing = {"state_dict", "pytorch-lightning_version", *(["optimizer_states", "loops"] if resumes else [])} - set(
        checkpoint
    )
    if missing:
        raise ValueError(
            f"ckpt_path: '{path}' is not a checkpoint of a training run: it holds no {', '.join(sorted(missing))}"
        )


def check_trainer(settings: Namespace) -> None:
    """Refuse settings of the Trainer that our runs cannot obey, or on which Lightning would fail. Raises ValueError."""
    wrong = {
        **{
            f"{name} must be at least {least}, got {settings[name]}": settings[name] is not None
            and settings[name] < least
            for name, least in LEAST.items()
        },
        "val_check_interval is 0; to validate never, set limit_val_batches 0": settings.val_check_interval == 0,
        f"gradient_clip_val must be a finite number >= 0, got {settings.gradient_clip_val}": (
            not 0 <= (settings.gradient_clip_val or 0) < math.inf
        ),
        "overfit_batches replaces the samplers that plan the steps; use trainer.limit_train_batches and "
        "limit_val_batches": bool(settings.overfit_batches),
    }
    problems = [f"trainer.{problem}" for problem, found in wrong.items() if found]
    if problems:
        raise ValueError("; ".join(problems))


def check_nulls(method: Namespace) -> None:
    """Refuse null for an argument of the module that has another default and no such value. Raises ValueError."""
    module, _, name = method["class_path"].rpartition(".")
    parameters = inspect.signature(getattr(import_module(module), name)).parameters
    for option, value in vars(method.get("init_args") or Namespace()).items():
        if value is None and option in parameters and needs_value(parameters[option]):
            raise ValueError(f"model.{option} is null, and {name} needs a value: leave it out for the default")


def needs_value(parameter: inspect.Parameter) -> bool:
    """Return whether a parameter has an annotation that leaves out None, and another default."""
    free = parameter.annotation in (parameter.empty, Any) or isinstance(parameter.annotation, str)
    return not free and NoneType not in get_args(parameter.annotation) and parameter.default is not None


def check_needs(settings: Namespace, method: str) -> None:
    """Refuse a DataModule that is not told what to read, before anything is loaded.

    Args:
        settings: of the command.
        method: class path of the module; the error names its tiny configuration.

    Raises:
        ValueError: an argument that the DataModule needs is missing.
    """
    data = settings.get("data")
    if data is not None and data.get("class_path"):
        module, _, name = data["class_path"].rpartition(".")
        kind = getattr(import_module(module), name)
        if hasattr(kind, "check_needs"):
            kind.check_needs(vars(data.get("init_args") or Namespace()), name_tiny_config(method.rpartition(".")[2]))


def check_run(command: str, model: LightningModule, data: LightningDataModule) -> None:
    """Refuse a module and a DataModule that do not fit each other or the command. Raises ValueError."""
    method, source = type(model).__name__, type(data).__name__
    for owner, needed in zip((model, data), NEEDED[command], strict=True):
        if not is_overridden(needed, owner):
            other = "; predict works with a method that samples, such as GRPOModule" if command == "predict" else ""
            raise ValueError(f"{type(owner).__name__} has no {needed}, so there is nothing to {command}{other}")
    if not hasattr(model, "tokenizer") and getattr(data, "tokenizer", method) is None:
        other = f"set data to {model.reads}" if isinstance(model, PredictModule) else "set data.tokenizer"
        raise ValueError(f"{source} needs a tokenizer and {method} has none; {other}")
    wanted, given = find_batch_type(type(model)), getattr(data, "batch_type", None)
    if wanted is not None and given is not None and wanted is not given:
        raise ValueError(
            f"{method} reads {wanted.__name__} and {source} gives {given.__name__}; add "
            f"{' or '.join(f'--data {giver}' for giver in find_givers(wanted))}"
        )


def check_callbacks(callbacks: list[Callback], model: LightningModule) -> None:
    """Refuse callbacks that Lightning could not run with a module. Raises ValueError."""
    for callback in callbacks:
        name, method = type(callback).__name__, type(model).__name__
        if isinstance(callback, LearningRateFinder) and not any(
            hasattr(model, rate) for rate in ("lr", "learning_rate")
        ):
            raise ValueError(
                f"callbacks: {name} sets model.lr, which {method} does not have: leave it out, and set model.optimizer.lr"
            )
        if isinstance(callback, BackboneFinetuning) and not hasattr(model, "backbone"):
            raise ValueError(
                f"callbacks: {name} trains model.backbone, which {method} does not have: leave it out, or train less "
                "with configs/overlays/lora.yaml"
            )
