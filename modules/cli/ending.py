"""The last lines of a fit: its numbers, where the model is, how to ask it, how to see the curves."""

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from modules.cli.progress import pick_headlines, show_numbers
from modules.cli.run_folder import CHECKPOINTS
from modules.trainer.stopping import StopTogether


def write_ending(trainer: Trainer, export: Path | None, notes: "TellsHowToGoOn") -> list[str]:
    """Write three lines: results and export, how to ask the model, how to see the curves.

    Args:
        trainer: of the fit that has ended.
        export: the folder of the exported model; None = nothing was exported.
        notes: what the fit remembered.
    """
    logged = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    logged = logged or {name: value for name, value in trainer.logged_metrics.items() if name.startswith("train/")}
    why = "list Export in trainer.callbacks" if trainer.global_step else "no step was taken"
    where = f"model: {write_path(export)}" if export else f"no model exported: {why}"
    at = f"step {trainer.global_step}"
    if notes.validated is not None and notes.validated != trainer.global_step:
        at += f"; validation at step {notes.validated}"
    if trainer.global_step and not notes.trained:
        limit = "max_steps" if trainer.global_step == trainer.max_steps else "max_epochs"
        lines = [f"the run was complete at {at}; raise trainer.{limit} to train on; {where}"]
    else:
        lines = [f"{at}: {show_numbers(pick_headlines(logged)) or 'nothing logged'}; {where}"]
    if export:
        form = ["--form", notes.form] if notes.form else []
        lines.append(f"ask it: {write_command('chat', '--policy', export, *form)}")
    folder = next((logger.save_dir for logger in trainer.loggers if logger.save_dir), None)
    if folder and any(type(logger).__name__ == "TensorBoardLogger" for logger in trainer.loggers):
        lines.append(f"curves: {write_command('--logdir', Path(folder), module='tensorboard.main')}")
    elif folder:
        lines.append(f"curves: {write_path(Path(folder))}")
    return lines


def find_form(text: str, tokenizer: Any) -> str | None:
    """Find the form of the prompt in a rendered row, so that ``chat`` writes prompts alike; None = ``chat``'s default."""
    if "### Instruction:" in text:
        return "alpaca"
    if tokenizer.chat_template is None:
        return None
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
    )
    return None if str(asked).rpartition("?")[2].strip() in text else "text"


class TellsHowToGoOn(Callback):
    """Remembers what the last lines say, and prints how to resume a run that was stopped.

    Attributes:
        form: how prompts were written, see ``chat``; None = ``chat``'s default. A resumed run knows it from its checkpoint.
        trained: whether this fit began a step.
        validated: step of the last validation; None = there was none.
    """

    def __init__(self) -> None:
        self.form: str | None = None
        self.trained = False
        self.validated: int | None = None

    @rank_zero_only
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the first row."""
        if not self.trained and isinstance(batch, dict):
            ids = next((batch[name] for name in ("prompt_ids", "input_ids") if name in batch), None)
            if ids is not None:
                tokenizer: Any = pl_module.tokenizer
                self.form = find_form(str(tokenizer.decode(ids[0])), tokenizer)
        self.trained = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step."""
        if not trainer.sanity_checking:
            self.validated = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs if it takes no step."""
        return {"form": self.form}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.form = state_dict["form"]

    @rank_zero_only
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print the command that resumes the run, if the stop left a checkpoint."""
        stops = [callback for callback in trainer.callbacks if isinstance(callback, StopTogether)]  # type: ignore[attr-defined]
        saved = next((stop.saved for stop in stops if stop.saved), None)
        if saved is None:
            return
        if isinstance(trainer.progress_bar_callback, RichProgressBar):  # it would break the command into lines
            trainer.progress_bar_callback.on_exception(trainer, pl_module, exception)
        run = saved.parent.parent
        if saved.parent.name == CHECKPOINTS and (run / "config.yaml").is_file():
            print(f"go on: {write_command('fit', '--config', run / 'config.yaml', '--ckpt_path', run)}", flush=True)
        else:
            print(f"go on: the same command with --ckpt_path {write_path(saved)}", flush=True)


def name_python() -> str:
    """Return how to call this interpreter: ``python`` if that is it, else its path.

    >>> name_python().endswith(("python", "python3", Path(sys.executable).name))
    True
    """
    found = shutil.which("python")
    if found and os.path.samefile(found, sys.executable) and Path(found).parent == Path(sys.executable).parent:
        return "python"
    return write_path(Path(sys.executable))


def write_path(path: Path) -> str:
    """Write a path; one below the current folder as a relative path."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def write_command(*arguments: object, module: str = "modules") -> str:
    """Write the command line that runs a module with these arguments."""
    shown = (write_path(argument) if isinstance(argument, Path) else str(argument) for argument in arguments)
    return shlex.join([name_python(), "-m", module, *shown])
