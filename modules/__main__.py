"""``python -m modules {fit,validate,test,predict} --config configs/x.yaml``; ``chat`` and ``merge`` take exports."""

import sys

HELP = """usage: python -m modules COMMAND [options]

Post-training of language models.

  fit       train: python -m modules fit --config configs/tiny/sft.yaml
  validate  measure on held-out rows, with the configuration of a fit
  test      the same on the rows of data.val, logged as test/...
  predict   write samples or labels, with the configuration of a fit
  chat      ask a model: python -m modules chat --policy FOLDER
  merge     average models: python -m modules merge --models A B --out FOLDER

Options of a command: python -m modules COMMAND --help
Those of a class: python -m modules fit --model.help SFTModule
"""


def main(args: list[str] | None = None) -> None:
    """Run the command line, or print its help, for which the libraries need not be loaded."""
    given = sys.argv[1:] if args is None else args
    if given in (["--help"], ["-h"]):
        print(HELP, end="")
        return
    from modules.cli.run import run_command

    run_command(given)


if __name__ == "__main__":
    main()
