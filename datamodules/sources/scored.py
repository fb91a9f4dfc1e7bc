"""Groups sampled completions by prompt, to compare them by their rewards or to let a judge label them."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from datamodules.sources.files import read_file
from datamodules.sources.source import Row, Source

COLUMNS = ("uid", "prompt", "completion", "reward")


class Scored(Source):
    """Reads the JSONL of ``predict`` and ranks the completions of each prompt by their rewards.

    A line holds one completion: uid, prompt, completion, reward, finish. A row has ``prompt``, ``completions`` and
    ``ranks`` (0 = best). Completions of one uid are compared.

    Left out are completions without a reward, repeated texts, so that no text is compared with itself, and completions
    that did not stop by themselves, because training would give them an end token that they never had. Prompts whose
    completions all get one rank are left out and counted in ``skipped``. The prompt is the rendered text that the model
    read, and the DataModule uses it unchanged.

    Args:
        path: the file.
        pairs: ``best_worst`` compares the best with the worst. ``all`` ranks all; a new rank begins where the reward
            falls by more than ``min_gap``, so no compared pair differs by less.
        min_gap: smallest difference that counts, >= 0, in units of the reward.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, path: str, pairs: Literal["best_worst", "all"] = "best_worst", min_gap: float = 0.0) -> None:
        if pairs not in ("best_worst", "all") or not min_gap >= 0:
            raise ValueError(f"pairs must be best_worst or all and min_gap at least 0, got {pairs!r} and {min_gap}")
        self.path, self.pairs, self.min_gap = path, pairs, min_gap
        self.skipped = 0  # prompts left out in the last ``rows()``

    def rows(self) -> list[Row]:
        """Return one row per prompt, in file order. Raises ValueError with file and line, or when no row is left."""
        groups = group_by_prompt(self.path)
        rows = [made for group in groups for made in self._compared(group)]
        self.skipped = len(groups) - len(rows)
        if not rows:
            raise ValueError(
                f"{self.path}: none of {len(groups)} prompts has two finished completions whose rewards differ by more "
                f"than {self.min_gap}"
            )
        rank_zero_info(f"{self.path}: {len(rows)} prompts compared, {self.skipped} skipped")
        return rows

    def _compared(self, group: list[Row]) -> Iterator[Row]:
        rewards: dict[str, float] = {}
        for row in keep_finished(group):
            if row.columns["reward"] is not None:
                rewards.setdefault(row.columns["completion"], row.columns["reward"])
        ordered = sorted(rewards.items(), key=lambda item: -item[1])
        if self.pairs == "best_worst":
            ordered = [ordered[0], ordered[-1]] if len(ordered) > 1 else []
        ranks = [0] * bool(ordered)
        for (_, better), (_, worse) in pairwise(ordered):
            ranks.append(ranks[-1] + (better - worse > self.min_gap))
        if len(set(ranks)) > 1:
            columns = {
                "prompt": group[0].columns["prompt"],
                "completions": [text for text, _ in ordered],
                "ranks": ranks,
            }
            yield Row(columns, group[0].origin, group[0].source, plain=True)


class Sampled(Source):
    """Reads the JSONL of ``predict`` as candidates to be labelled, for ``CandidatesDataModule``.

    A row has ``prompt``, ``completions`` and ``answer`` (None where there is none). Rewards are not read. Repeated
    texts are taken once. Completions that did not stop by themselves are left out, and so are prompts with fewer than
    two texts left.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """Return one row per prompt, in file order. Raises ValueError with file and line, or when no row is left."""
        groups = group_by_prompt(self.path)
        texts = [list(dict.fromkeys(row.columns["completion"] for row in keep_finished(group))) for group in groups]
        rows = [
            Row(
                {"prompt": first.columns["prompt"], "completions": found, "answer": first.columns.get("answer")},
                first.origin,
                first.source,
            )
            for (first, *_), found in zip(groups, texts, strict=True)
            if len(found) > 1
        ]
        if not rows:
            raise ValueError(f"{self.path}: none of {len(groups)} prompts has two finished completions that differ")
        rank_zero_info(f"{self.path}: {len(rows)} prompts with candidates, {len(groups) - len(rows)} skipped")
        return rows


def group_by_prompt(file: str) -> list[list[Row]]:
    """Group the lines of a file by uid, which names the prompt. Raises ValueError with file and line."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"{file}: no such file")
    groups: dict[str, list[Row]] = {}
    for row in read_file(path):
        _check(row)
        group = groups.setdefault(str(row.columns["uid"]), [])
        if group and group[0].columns["prompt"] != row.columns["prompt"]:
            raise ValueError(f"{row.origin}: another prompt than {group[0].origin}, which has the same uid")
        group.append(row)
    return list(groups.values())


def keep_finished(group: list[Row]) -> list[Row]:
    """Return the lines whose completion stopped by itself and is not empty."""
    return [row for row in group if row.columns.get("finish", "stop") == "stop" and row.columns["completion"].strip()]


def _check(row: Row) -> None:
    columns: dict[str, Any] = row.columns
    if missing := [name for name in COLUMNS if name not in columns]:
        raise ValueError(
            f"{row.origin}: no {', '.join(missing)}; expected what PredictionWriter writes: {', '.join(COLUMNS)}"
        )
    for name in ("prompt", "completion"):
        if not isinstance(columns[name], str):
            raise ValueError(f"{row.origin}: {name} holds a {type(columns[name]).__name__}, text was expected")
    reward = columns["reward"]
    if reward is not None and (
        isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward)
    ):
        raise ValueError(f"{row.origin}: reward is {reward!r}, a number or null was expected")
