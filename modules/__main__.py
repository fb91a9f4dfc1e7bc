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
QUIET = (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*", ".*callbacks used to create the checkpoint need to be provided.*")
NAMES = [*modules.__all__, *modules.rewards.__all__, *datamodules.__all__, *callbacks.__all__]


def sentence(message: str) -> str:
    """What is wrong, from an error that lists every type a value is not."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = ": ".join(line.rstrip(":") for line in lines if line and not line.startswith(NOISE))
    unknown = re.search(r"Expected a dot import path string: (\S+)", kept)
    if unknown is None:
        return kept
    close = difflib.get_close_matches(unknown[1], NAMES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(NAMES)}"
    return kept.replace(unknown[0], f"there is no class '{unknown[1]}'; {hint}")


class Parser(LightningArgumentParser):
    """Errors in one sentence, without the page of usage that would bury it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the sentence and exit status 2."""
        super().error(sentence(message), ex)

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: ``--help`` tells the usage."""


class AlignmentCLI(LightningCLI):
    """LightningCLI in which the DataModule gets the policy's tokenizer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One tokenizer for model and data."""
        parser.link_arguments("model", "data.init_args.tokenizer", compute_fn=lambda model: model.tokenizer, apply_on="instantiate")


def main(args: list[str] | None = None) -> None:
    """Run the command line; a ``ValueError`` or a missing file is the user's and ends in one sentence and exit status 1."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
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
            save_config_kwargs={"overwrite": True},
            args=args,
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {sentence(str(error))}")


if __name__ == "__main__":
    main()
