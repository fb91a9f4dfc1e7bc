"""``python -m modules {fit,validate,test,predict} --config configs/x.yaml``: the only file that imports all three packages."""

import difflib
import logging
import re
import sys
import warnings
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import callbacks
import datamodules
import modules
import modules.rewards
from modules.base import AlignmentModule

NOISE = ("Does not validate against", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Expected a path but", "Given value")
BANNERS = ("GPU available", "TPU available", "HPU available", "\N{ELECTRIC LIGHT BULB} Tip")
QUIET = (
    ".*does not have many workers.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*Total length of `list` across ranks is zero.*",  # a run without validation data
)
NAMES = [*modules.__all__, *modules.rewards.__all__, *datamodules.__all__, *callbacks.__all__]


def is_news(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning says something about this run."""
    return not record.getMessage().startswith(BANNERS)


def sentence(message: str) -> str:
    """What is wrong, from an error that lists every type a value is not."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = ": ".join(line.rstrip(":") for line in lines if line and not line.startswith(NOISE))
    unknown = re.search(r"Expected a dot import path string: (\S+)", kept)
    if unknown is None:
        return kept
    hint = did_you_mean(unknown[1], NAMES) or f"; known are {', '.join(NAMES)}"
    return kept.replace(unknown[0], f"there is no class '{unknown[1]}'{hint}")


def did_you_mean(name: str, known: list[str]) -> str:
    """The known names that are nearest to a misspelt one, as the end of a sentence; empty when none is near."""
    close = difflib.get_close_matches(name, set(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


class Parser(LightningArgumentParser):
    """Errors in one sentence, without the page of usage that would bury it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the sentence and exit status 2."""
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        super().error(sentence(message) + (did_you_mean(unknown[1], self.options()) if unknown else ""), ex)

    def options(self) -> list[str]:
        """Every option of this parser and of its commands."""
        commands = [parser for action in self._actions if isinstance(action.choices, dict) for parser in action.choices.values()]
        return [name for parser in (self, *commands) for name in parser._option_string_actions]

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: ``--help`` tells the usage."""


class AlignmentCLI(LightningCLI):
    """LightningCLI in which the DataModule gets the policy's tokenizer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One tokenizer for model and data."""
        parser.link_arguments("model", "data.init_args.tokenizer", compute_fn=lambda model: model.tokenizer, apply_on="instantiate")


def main(args: list[str] | None = None) -> None:
    """Run the command line; a ``ValueError`` or a missing file is the user's and ends in one sentence and exit status 1."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_news)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    try:
        AlignmentCLI(
            AlignmentModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"allow_abbrev": False},
            save_config_kwargs={"overwrite": True},
            args=args,
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {sentence(str(error))}")


if __name__ == "__main__":
    main()
