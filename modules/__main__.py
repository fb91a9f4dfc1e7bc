"""``python -m modules {fit,validate,test,predict} --config configs/x.yaml``: the only file that imports all three
packages.
"""

import inspect
import logging
import re
import sys
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn, is_typeddict

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

import callbacks
import datamodules
import modules
import modules.losses
import modules.rewards
import modules.schedulers
from modules.cli.explain import did_you_mean, sentence
from modules.predict.base import PredictModule

PACKAGES = (modules, modules.losses, modules.rewards, modules.schedulers, datamodules, callbacks)
CHOICES = [vars(package)[name] for package in PACKAGES for name in package.__all__]
NAMES = sorted(choice.__name__ for choice in CHOICES if isinstance(choice, type) and not inspect.isabstract(choice))
NEEDED = {
    "fit": ("training_step", "train_dataloader"),
    "validate": ("validation_step", "val_dataloader"),
    "test": ("test_step", "test_dataloader"),
    "predict": ("predict_step", "predict_dataloader"),
}
BANNERS = ("GPU available", "TPU available", "HPU available", "\N{ELECTRIC LIGHT BULB} Tip")
QUIET = (
    ".*does not have many workers.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*predict returned None.*",  # the predictions are written to a file
    ".*Total length of `list` across ranks is zero.*",  # a run without validation data
)


def is_news(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning says something about this run."""
    return not record.getMessage().startswith(BANNERS)


def refuse(error: Exception) -> NoReturn:
    """End the run with exit status 1 and the error in one line, written at once so that the lines of several ranks stay
    whole.
    """
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    sys.exit(1)


def build(kind: type, /, *args: Any, **kwargs: Any) -> Any:
    """Make an object that the configuration names. What its constructor refuses ends the run here, or the parser would
    bury it.
    """
    try:
        return kind(*args, **kwargs)
    except (ValueError, ImportError, MisconfigurationException) as error:
        refuse(error)


class Parser(LightningArgumentParser):
    """Errors in one sentence, without the page of usage that would bury it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the sentence and exit status 2."""
        unknown = re.fullmatch(r"unrecognized arguments: (--[^\s=]+)[^;]*", message)
        super().error(sentence(message, NAMES) + (did_you_mean(unknown[1], self.options()) if unknown else ""), ex)

    def options(self) -> list[str]:
        """Every option of this parser and of its commands."""
        commands = [
            parser for action in self._actions if isinstance(action.choices, dict) for parser in action.choices.values()
        ]
        return [name for parser in (self, *commands) for name in parser._option_string_actions]

    def instantiate_classes(self, cfg: Namespace, **kwargs: Any) -> Namespace:
        """Every object is made by ``build``."""
        return self.instantiate(cfg, instantiators=[(build, object, True)], **kwargs)

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: ``--help`` tells the usage."""


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` beside the logs with the first batch, so that a refused run leaves the one of the last
    good run alone.

    Nothing is written without a logger. ``ckpt_path`` is left out: the file describes the run, not where it was
    resumed.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: the run may still be refused."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the file, once."""
        if trainer.loggers and not self.already_saved:
            self.config = self.config.clone()
            self.config["ckpt_path"] = None
            super().setup(trainer, pl_module, "fit")


class AlignmentCLI(LightningCLI):
    """LightningCLI in which the DataModule gets the policy's tokenizer, and which refuses what cannot run before
    anything is loaded.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One tokenizer for model and data; a file that is named as data stays a path instead of being read as
        configuration.
        """
        parser.link_arguments(
            "model",
            "data.init_args.tokenizer",
            compute_fn=lambda model: getattr(model, "tokenizer", None),
            apply_on="instantiate",
        )
        for action in parser._actions:
            if action.dest in ("model", "data"):
                action.sub_add_kwargs["sub_configs"] = False  # type: ignore[attr-defined]

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and look at the checkpoint."""
        super().parse_arguments(parser, args)
        command = self.config["subcommand"]
        check_checkpoint(self.config[command].get("ckpt_path"), resumes=command == "fit")

    def after_instantiate_classes(self) -> None:
        """Refuse combinations that Lightning would fail on later."""
        check_run(self.subcommand, self.trainer, self.model, self.datamodule)


def check_checkpoint(path: str | None, resumes: bool) -> None:
    """ValueError for a ``ckpt_path`` that is no checkpoint; names that Lightning resolves and files that are not there
    are left to it.
    """
    if path is None or not Path(path).exists():
        return
    if Path(path).is_dir():
        if not (Path(path) / "meta.pt").is_file():  # sharded checkpoints are folders
            raise ValueError(f"ckpt_path: '{path}' is a folder; name the .ckpt file in it")
        return
    if not zipfile.is_zipfile(path):
        raise ValueError(f"ckpt_path: '{path}' is cut off or no checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        RuntimeError,
        UnpicklingError,
        ValueError,
        LookupError,
        EOFError,
    ) as error:  # whatever the damage makes of the pickle
        raise ValueError(f"ckpt_path: '{path}' is damaged, or no checkpoint of this program") from error
    missing = {"state_dict", "pytorch-lightning_version", *(["optimizer_states", "loops"] if resumes else [])} - set(
        checkpoint
    )
    if missing:
        raise ValueError(
            f"ckpt_path: '{path}' is not a checkpoint of a training run: it holds no {', '.join(sorted(missing))}"
        )


def check_run(command: str | None, trainer: Trainer, model: LightningModule, data: LightningDataModule) -> None:
    """ValueError for a module and a DataModule that do not fit each other or the command, and for settings that no run
    here can keep.
    """
    method, source = type(model).__name__, type(data).__name__
    for owner, needed in zip((model, data), NEEDED[str(command)], strict=True):
        if not is_overridden(needed, owner):
            raise ValueError(f"{type(owner).__name__} has no {needed}, so there is nothing to {command}")
    if not hasattr(model, "tokenizer") and getattr(data, "tokenizer", method) is None:
        other = f"set data to {model.reads}" if isinstance(model, PredictModule) else "set data.tokenizer"
        raise ValueError(f"{source} needs a tokenizer and {method} has none; {other}")
    wanted, given = batch_read_by(model), getattr(data, "batch_type", None)
    if wanted is not None and given is not None and wanted is not given:
        raise ValueError(
            f"{method} reads {wanted.__name__} and {source} gives {given.__name__}; set data to "
            f"{' or '.join(givers(wanted))}"
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise ValueError(
            "trainer.overfit_batches replaces the samplers that plan the steps; use trainer.limit_train_batches and "
            "limit_val_batches"
        )


def batch_read_by(model: LightningModule) -> type | None:
    """What the method reads: the prompts of ``collect`` where it samples, else the batch of ``training_step``; None
    where it does not say.
    """
    reader = getattr(type(model), "collect", type(model).training_step)
    batch = list(inspect.signature(reader).parameters.values())[1].annotation
    return batch if is_typeddict(batch) else None


def givers(batch_type: type) -> list[str]:
    """The DataModules that give batches of this type."""
    return [choice.__name__ for choice in CHOICES if getattr(choice, "batch_type", None) is batch_type]


def main(args: list[str] | None = None) -> None:
    """Run the command line; what the user can mend ends in one sentence and exit status 1."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_news)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    try:
        AlignmentCLI(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=Parser,
            parser_kwargs={"allow_abbrev": False, "prog": "python -m modules"},
            save_config_kwargs={"overwrite": True},
            args=args,
        )
    except (ValueError, FileNotFoundError, ImportError, MisconfigurationException) as error:
        refuse(error)


if __name__ == "__main__":
    main()
