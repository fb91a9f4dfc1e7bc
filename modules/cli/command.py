"""The command line: LightningCLI with a folder for each run, one tokenizer, and early refusals."""

import os
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

from modules.cli.checks import (
    check_callbacks,
    check_checkpoint,
    check_needs,
    check_nulls,
    check_run,
    check_trainer,
    resolve_checkpoint,
)
from modules.cli.choices import import_own
from modules.cli.ending import TellsHowToGoOn, write_ending
from modules.cli.parser import add_data_module
from modules.cli.progress import StepLines
from modules.cli.run_folder import (
    CHECKPOINTS,
    KeepsFolder,
    RunFolder,
    choose_folder,
    find_last_checkpoint,
    find_own_run,
    find_requeued_checkpoint,
    is_requeued,
)
from modules.trainer.guard import FiniteGuard, OnNonfinite

Kind = Literal["tensorboard", "csv", "wandb"]
Export: Any = vars(import_own("callbacks"))["Export"]
Dashboard: Any = vars(import_own("callbacks"))["Dashboard"]


class AlignmentCLI(LightningCLI):
    """A LightningCLI that gives each run a folder, and the DataModule the policy's tokenizer.

    Arguments that begin with a command get the parser of this one alone, because each takes a while to make.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.asked = kwargs["args"][:1]
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the commands, each with the arguments of the Trainer's method that are not options."""
        commands = LightningCLI.subcommands()
        return {name: commands[name] for name in self.asked if name in commands} or commands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--out`` and ``--logger``, and link the tokenizer of model and data.

        A file that is named as data stays a path and is not read as a configuration.
        """
        parser.add_argument(
            "--out",
            type=str | None,
            default=None,
            help="The folder of the run: logs, checkpoints, export. A fit takes the next free name, OUT-2, beside an "
            "earlier run. Default: runs/<method>.",
        )
        parser.add_argument(
            "--logger", type=Kind | None, default=None, help="tensorboard (the default), csv or wandb, in the folder."
        )
        parser.add_argument(
            "--on_nonfinite",
            type=OnNonfinite | None,
            default=None,
            help="What a fit does when the loss or gradient of a step is not finite: stop (the default), or skip up to "
            "ten such steps in a row.",
        )
        parser.add_argument(
            "--on_unscored",
            type=Literal["warn", "stop"] | None,
            default=None,
            help="What a fit that samples does when no completion of a later phase has a score: warn (the default) or "
            "stop. The first phase is always refused.",
        )
        parser.add_argument(
            "--gradient_checkpointing",
            type=bool,
            default=False,
            help="Compute each layer again in the backward pass of a fit: less memory, and by count a third more time.",
        )
        parser.add_argument(
            "--torch_compile", type=bool, default=False, help="Compile the layers of the models that a fit trains."
        )
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
        """Parse the arguments, and check the checkpoint and the Trainer's settings."""
        self.config = parser.parse_args(add_data_module(args))
        config = self.config[self.config["subcommand"]]
        out = self.name_out(config, config["model"]["class_path"])
        config["ckpt_path"] = resolve_checkpoint(config.get("ckpt_path"), out)
        if self.config["subcommand"] == "fit" and is_requeued():
            requeued = None if out is None else find_requeued_checkpoint(out)
            if requeued is not None:
                rank_zero_info(f"the job was put back into the queue: the run goes on from {requeued}")
                config["ckpt_path"] = str(requeued)
            elif out is None and config["ckpt_path"] is None:
                raise ValueError(
                    "this job was put back into the queue, and without --out nothing tells where its run lies: name "
                    "the folder with --out, or the checkpoint with --ckpt_path"
                )
        check_checkpoint(config["ckpt_path"], resumes=self.config["subcommand"] == "fit")
        check_trainer(config["trainer"])
        check_nulls(config["model"])
        check_needs(config, config["model"]["class_path"])

    @property
    def settings(self) -> Any:
        """The settings of the command that runs."""
        return self.config[str(self.subcommand)]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer, with the run's folder, after the last checks."""
        check_run(str(self.subcommand), self.model, self.datamodule)
        for name in ("on_nonfinite", "on_unscored"):
            if self.settings[name] is not None and self.subcommand != "fit":
                raise ValueError(f"{name}: {self.subcommand} takes no steps; leave it out")
        if self.settings["on_unscored"] is not None:
            if not hasattr(self.model, "on_unscored"):
                raise ValueError(f"on_unscored: {type(self.model).__name__} scores no samples; leave it out")
            self.model.on_unscored = self.settings["on_unscored"]
        for name in ("gradient_checkpointing", "torch_compile"):
            if self.settings[name]:
                if self.subcommand != "fit":
                    raise ValueError(f"{name}: {self.subcommand} takes no steps; leave it out")
                if not hasattr(self.model, name):
                    raise ValueError(f"{name}: {type(self.model).__name__} trains nothing; leave it out")
                setattr(self.model, name, True)
        folder = self.run_folder()
        try:
            return super().instantiate_trainer(**kwargs, **self.in_folder(folder))
        except (TypeError, ValueError, ModuleNotFoundError, RuntimeError) as error:
            if isinstance(folder, RunFolder):
                folder.close(keep=False)
            raise ValueError(f"trainer: {error}") from error

    @staticmethod
    def name_out(settings: Any, method: str) -> Path | None:
        """Return the folder that a run asks for; None = the settings say themselves where to write."""
        trainer, out = settings["trainer"], settings["out"]
        if out is None and (trainer["logger"] is not None or trainer["default_root_dir"] is not None):
            return None
        return choose_folder(method) if out is None else Path(out)

    def run_folder(self) -> RunFolder | Path | None:
        """Return the run's folder: a fit claims it, other commands share it.

        None = the configuration names no folder, but says itself where to write.
        """
        trainer, out = self.settings["trainer"], self.settings["out"]
        if out is not None and trainer["default_root_dir"] not in (None, out):
            raise ValueError(f"out '{out}' and trainer.default_root_dir '{trainer['default_root_dir']}': leave one out")
        path = self.name_out(self.settings, type(self.model).__name__)
        if path is None:
            return None
        same = find_own_run(path, self.settings["ckpt_path"])
        if self.subcommand == "fit" and not trainer["fast_dev_run"]:
            return RunFolder(same or path, resumes=same is not None)
        return same or path

    def in_folder(self, folder: RunFolder | Path | None) -> dict[str, Any]:
        """Return the arguments of the Trainer that put a run into its folder."""
        trainer, kind = self.config_init[str(self.subcommand)]["trainer"], self.settings["logger"]
        if kind is not None and trainer["logger"] is False:
            raise ValueError(f"logger: {kind} and trainer.logger: false: leave one out")
        path = folder.path if isinstance(folder, RunFolder) else folder
        changes: dict[str, Any] = {"callbacks": self.callbacks(folder, path)}
        if path is not None:
            self.settings["out"] = str(path)
            changes["default_root_dir"] = str(path)
        if kind is not None or (path is not None and trainer["logger"] in (None, True)):
            name = "" if self.subcommand == "fit" else str(self.subcommand)
            changes["logger"] = make_logger(kind or "tensorboard", path or Path.cwd(), name)
        return changes

    def callbacks(self, folder: RunFolder | Path | None, path: Path | None) -> list[Callback]:
        """Return the configuration's callbacks, with the run's folder, and those that every run has."""
        trainer = self.config_init[str(self.subcommand)]["trainer"]
        given = trainer["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        refuse_twins(given)
        check_callbacks(given, self.model)
        callbacks: list[Callback] = [*given, Dashboard(), TellsHowToGoOn()]
        if isinstance(folder, RunFolder):
            callbacks.append(KeepsFolder(folder))
            if trainer["callbacks"] is None and trainer["enable_checkpointing"] is not False:
                callbacks += [ModelCheckpoint(save_last="link", enable_version_counter=False), Export()]
        for callback in callbacks:
            if path is not None and isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(path.absolute() / CHECKPOINTS)
        if trainer["fast_dev_run"]:  # ModelCheckpoint would still write last.ckpt
            callbacks = [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint)]
        if not any(isinstance(callback, FiniteGuard) for callback in callbacks):
            callbacks.append(FiniteGuard(self.settings["on_nonfinite"] or "stop"))
        bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if not bar and not os.isatty(1) and trainer["enable_progress_bar"] is not False:
            callbacks.append(StepLines())
        return callbacks

    def before_validate(self) -> None:
        """Print which weights are evaluated."""
        self.say_weights()

    def before_test(self) -> None:
        """Print which rows and weights are evaluated."""
        rank_zero_info("test: on the rows of data.val")
        self.say_weights()

    def before_predict(self) -> None:
        """Print which weights are evaluated."""
        self.say_weights()

    def say_weights(self) -> None:
        """Print whose weights give the numbers that follow."""
        checkpoint = self.settings["ckpt_path"]
        if checkpoint is not None:
            step = ""
            if Path(checkpoint).is_file():
                step = f", step {torch.load(checkpoint, weights_only=True, mmap=True)['global_step']}"
            rank_zero_info(f"weights: {checkpoint}{step}")
        elif type(self.model).training_step is not LightningModule.training_step:
            policy, out = self.settings["model"]["init_args"].get("policy"), self.settings["out"]
            trained = out is not None and find_last_checkpoint(Path(out)) is not None
            hint = f"; those that the run in {out} trained: --ckpt_path {out}" if trained else ""
            rank_zero_info(f"weights: '{policy}', as model.policy names them, without training by this run{hint}")

    @rank_zero_only
    def after_fit(self) -> None:
        """Print what to do next."""
        exports = [callback for callback in self.trainer.callbacks if isinstance(callback, Export)]  # type: ignore[attr-defined]
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            notes = [callback for callback in self.trainer.callbacks if isinstance(callback, TellsHowToGoOn)]  # type: ignore[attr-defined]
            written = [callback.folder for callback in exports if callback.exported_step >= 0]
            for line in write_ending(self.trainer, written[-1] if written else None, notes[0]):
                print(line, flush=True)


def refuse_twins(callbacks: list[Callback]) -> None:
    """Refuse two callbacks whose states a checkpoint could not tell apart. Raises ValueError."""
    names = [
        type(each).__name__
        for number, each in enumerate(callbacks)
        if is_overridden("state_dict", each, Callback)
        and any(each.state_key == other.state_key for other in callbacks[:number])
    ]
    if names:
        raise ValueError(f"callbacks has {names[0]} twice, and a checkpoint keeps one state of it: leave one out")


def make_logger(kind: Kind, folder: Path, name: str) -> Logger:
    """Make a logger that writes into the folder, or into ``name`` in it. Raises ValueError without its package."""
    if kind == "wandb":
        try:
            return WandbLogger(name=f"{folder.name} {name}".strip(), save_dir=folder, project="lightning-align")
        except ModuleNotFoundError as error:
            raise ValueError("logger: wandb needs its package; install it with: pip install wandb") from error
    if kind == "csv":
        keep_metrics(folder / name / "metrics.csv")
        return CSVLogger(save_dir=folder, name="", version=name, flush_logs_every_n_steps=1)  # none lost by a kill
    return TensorBoardLogger(save_dir=folder, name="", version=name, flush_secs=1)  # a kill loses no more


@rank_zero_only
def keep_metrics(file: Path) -> None:
    """Rename the numbers of a run that is resumed to the next free ``metrics-N.csv``; Lightning would delete them."""
    if file.is_file():
        file.rename(next(path for n in count(1) if not (path := file.with_name(f"metrics-{n}.csv")).exists()))
