"""Runs a command of the command line, with errors in one sentence and warnings in one line."""

import logging
import sys
import threading
import traceback
import warnings
from pathlib import Path
from types import TracebackType

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from modules.cli.chat_command import run_chat
from modules.cli.choices import spell_out_arguments
from modules.cli.command import AlignmentCLI
from modules.cli.merge_command import run_merge
from modules.cli.parser import Parser, read_old_names, refuse, sort_arguments
from modules.cli.renamed import renew
from modules.cli.run_folder import SaveConfig
from modules.trainer.stopping import requeue_if_told
from modules.types import EngineError, make_printable

DESCRIPTION = (
    "Post-training of language models. To ask a model: python -m modules chat --policy FOLDER. To average models: "
    "python -m modules merge --models A B --out FOLDER"
)
BANNERS = ("GPU available", "TPU available", "HPU available", "\N{ELECTRIC LIGHT BULB} Tip")
QUIET = (
    ".*does not have many workers.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*predict returned None.*",  # the predictions are written to a file
    ".*Total length of `list` across ranks is zero.*",  # a run without validation data
    ".*Checkpoint directory .* exists and is not empty.*",  # a run that goes on
    ".*Experiment logs directory .* exists and is not empty.*",  # the lock of the run's folder lies there
    ".*torch.distributed.nn.functional.all_gather is deprecated.*",  # Lightning calls it
    ".*The dirpath has changed from.*",  # another run's checkpoint
)


def is_news(record: logging.LogRecord) -> bool:
    """Return whether a message tells something about this run; make it printable."""
    record.msg, record.args = make_printable(record.getMessage()), None
    return not record.getMessage().startswith(BANNERS)


def write_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Write a warning of this program as one line; one of another package with its place in the code."""
    own = Path(filename).is_relative_to(Path(__file__).parents[2]) and category is UserWarning
    return make_printable(f"warning: {message}\n" if own else f"{filename}:{lineno}: {category.__name__}: {message}\n")


def report_thread(failed: threading.ExceptHookArgs) -> None:
    """Tell in one line that a thread, such as TensorBoard's writer, could not read or write."""
    if isinstance(failed.exc_value, OSError):
        sys.stderr.write(make_printable(f"warning: {failed.exc_value}\n"))
    else:
        threading.__excepthook__(failed)


def report_error(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
    """Write a traceback in which no text from data or models can steer the terminal."""
    sys.stderr.write(make_printable("".join(traceback.format_exception(kind, error, place))))


def run_command(args: list[str]) -> None:
    """Run the command line. An error that the user can correct ends it with one sentence and exit status 1."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_news)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    warnings.formatwarning = write_warning
    threading.excepthook, sys.excepthook = report_thread, report_error
    read_old_names()
    given = sort_arguments(spell_out_arguments([renew(argument) for argument in args]))
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for the classes and functions of whoever runs this
    try:
        requeue_if_told()
        if given[:1] == ["chat"]:
            run_chat(given[1:])
        elif given[:1] == ["merge"]:
            run_merge(given[1:])
        else:
            AlignmentCLI(
                LightningModule,
                LightningDataModule,
                save_config_callback=SaveConfig,
                seed_everything_default=0,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_class=Parser,
                parser_kwargs={"prog": "python -m modules", "description": DESCRIPTION},
                save_config_kwargs={"overwrite": True},
                args=given,
            )
    except (ValueError, OSError, ImportError, FloatingPointError, MisconfigurationException, EngineError) as error:
        refuse(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        if not str(error).startswith("Early stopping conditioned on metric"):  # Lightning's, of a misspelt monitor
            raise
        refuse(error)
