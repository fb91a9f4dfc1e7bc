"""Does a stage get what it needs from earlier stages? Checks it before anything is trained or sampled."""

import json
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import AutoTokenizer

from modules.trainer.exports import find_origin, read_lineage


class HandOff(Callback):
    """Checks the model folders and files of rows that a stage takes from earlier stages.

    A file must not be empty. A folder must hold a ``config.json``. A reward model (a sequence classifier) must know the
    mean and the standard deviation of its scores.

    In ``setup`` it compares the tokenizer of each folder with the module's. Both must have the same tokens under the
    same ids and the same chat template. A reward model may have more tokens, such as a pad token of its own.

    Args:
        inputs: stage that writes it -> folder or file, such as ``{01-fit-sft: runs/x/sft/export}``.
        started_from: stage of ``inputs`` that writes an export -> the model that it must have started from, such as
            ``{03-fit-sft: runs/x/base/export}``: a folder, a GGUF file, a hub id or a built-in model. Example: the
            third stage of DeepSeek-R1 starts again from the base model, not from the second stage. The check reads
            ``lineage.json`` in the export.

    Raises:
        ValueError: an input does not fit, with the stage to run again; ``started_from`` names no stage of ``inputs``.
    """

    def __init__(self, inputs: dict[str, str], started_from: dict[str, str] | None = None) -> None:
        self.inputs = {stage: Path(path) for stage, path in inputs.items()}
        for stage, path in self.inputs.items():  # here already, before the DataModule reads the file
            refuse_if(stage, path, find_trouble(path))
        for stage, start in (started_from or {}).items():
            if stage not in self.inputs:
                raise ValueError(
                    f"HandOff: started_from names {stage}, which is none of the inputs: {', '.join(inputs)}"
                )
            refuse_if(stage, self.inputs[stage], find_other_start(self.inputs[stage], start))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare the tokenizers, if the module has one."""
        mine = getattr(pl_module, "tokenizer", None)
        for origin, path in self.inputs.items():
            if path.is_dir() and mine is not None:
                refuse_if(origin, path, find_mismatch(path, mine))


def refuse_if(stage: str, path: Path, problem: str | None) -> None:
    """Raise ValueError if there is a problem."""
    if problem is not None:
        raise ValueError(f"hand-off from {stage}: {path} {problem}; run {stage} again")


def find_trouble(path: Path) -> str | None:
    """Return why a folder or file cannot be an input; None = nothing is wrong with it."""
    if path.is_file():
        return None if path.stat().st_size else "is empty"
    if not path.is_dir():
        return "is not there"
    if not (path / "config.json").is_file():
        return "has no config.json, so it is no exported model"
    try:
        known = read_settings(path)
    except ValueError:
        return "has a damaged config.json"
    if is_reward_model(path):
        mean, deviation = (known.get(name, math.nan) for name in ("reward_mean", "reward_std"))
        if not is_finite(mean) or not is_finite(deviation) or not deviation > 0:
            return (
                f"is a reward model without normalisation (reward_mean {mean}, reward_std {deviation} in config.json; fit "
                "it with model.normalize: true)"
            )
    return None


def find_other_start(path: Path, start: str) -> str | None:
    """Return how the model that an export started from differs from ``start``; None = it is the same."""
    try:
        lineage = read_lineage(path)
    except ValueError as error:
        return f"does not say what it started from ({error})"
    if lineage is None or not lineage.parents:
        return "does not say what it started from (no lineage.json, or none with a parent)"
    wanted = find_origin(start)
    if all(parent.is_same(wanted) for parent in lineage.parents):
        return None
    others = [parent.policy for parent in lineage.parents if not parent.is_same(wanted)]
    since = f", which holds other weights than {start} now" if start in others else ""
    return f"was made from {' and '.join(others)}{since} and not from {start}"


def find_mismatch(path: Path, mine: Any) -> str | None:
    """Return how the tokenizer in a folder differs from ``mine``; None = it is the same."""
    try:
        theirs = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        return f"has no tokenizer that can be read ({type(error).__name__})"
    own, other = mine.get_vocab(), theirs.get_vocab()
    moved = [token for token, place in own.items() if other.get(token) != place]
    added = [token for token in other if token not in own]
    if moved or (added and not is_reward_model(path)):
        return (
            f"has another tokenizer than the policy ({len(moved)} tokens gone or moved, {len(added)} more, such as "
            f"{(moved or added)[0]!r})"
        )
    return None if theirs.chat_template == mine.chat_template else "has another chat template than the policy"


def is_reward_model(path: Path) -> bool:
    """Return whether a folder holds a sequence classifier."""
    return any("SequenceClassification" in name for name in read_settings(path).get("architectures") or [])


def read_settings(path: Path) -> dict[str, Any]:
    """Read the model's ``config.json``."""
    found: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return found


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
