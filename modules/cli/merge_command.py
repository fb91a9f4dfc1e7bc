"""The command ``python -m modules merge --models A B --out FOLDER``: averages the weights of models."""

from pathlib import Path

from modules.cli.parser import Parser
from modules.networks.merging import average_models
from modules.trainer.exports import explain_occupied, find_origin, put_back, write_export

DESCRIPTION = (
    "Average the weights of two or more models of the same architecture and tokenizer, in 32 bits, and write the "
    "result as a Hugging Face folder. Kimi k1.5 joins a model with long chains of thought and one with short ones "
    "(arXiv 2501.12599, section 2.4)."
)


def merge(models: list[str], out: str, weights: list[float] | None = None) -> None:
    """Average models and write the result.

    Args:
        models: see ``average_models``.
        out: the folder; only what an export wrote is replaced, and never one of the models.
        weights: see ``average_models``.

    Raises:
        ValueError: the folder must not be replaced, or as in ``average_models``.
        OSError: the folder cannot be written; an earlier export stays as it was.
    """
    folder = Path(out)
    put_back(folder)
    read = any(Path(path).exists() and Path(path).resolve() == folder.resolve() for path in models)
    problem = "from which this run reads a model" if read else explain_occupied(folder)
    if problem is not None:
        raise ValueError(f"merge would replace {folder}, {problem}: choose another folder, or move it away")
    origins = [find_origin(path) for path in models]
    merged = average_models(models, weights)
    write_export(folder, merged.save_pretrained, "merge", origins)
    print(f"merge: {folder}: the average of {', '.join(models)}", flush=True)


def run_merge(args: list[str]) -> None:
    """Run the command with its arguments."""
    parser = Parser(prog="python -m modules merge", description=DESCRIPTION)
    parser.add_argument("-c", "--config", action="config", help="A YAML file with these options.")
    parser.add_argument(
        "--models", nargs="+", type=str, required=True, help="Folders, GGUF files, hub ids or built-in names."
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        help="One number above 0 for each model; they are divided by their sum. Default: all the same.",
    )
    parser.add_argument("--out", type=str, required=True, help="The folder to write; an earlier export is replaced.")
    given = parser.parse_args(args)
    merge(given.models, given.out, given.weights)
