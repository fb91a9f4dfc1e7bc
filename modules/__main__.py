"""``python -m modules {fit,validate,test,predict} --config configs/x.yaml``: the only file that imports all three packages."""

import logging
import sys
import warnings
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import callbacks  # noqa: F401 (short class names in YAML)
import datamodules  # noqa: F401
import modules.rewards  # noqa: F401
from modules.base import AlignmentModule


class Parser(LightningArgumentParser):
    """Errors without the page of usage that would bury them."""

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: ``--help`` tells the usage."""


class AlignmentCLI(LightningCLI):
    """LightningCLI in which the DataModule gets the policy's tokenizer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One tokenizer for model and data."""
        parser.link_arguments("model", "data.init_args.tokenizer", compute_fn=lambda model: model.tokenizer, apply_on="instantiate")


def main(args: list[str] | None = None) -> None:
    """Run the command line; a ``ValueError`` is the user's and ends in one sentence and exit status 1."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
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
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
