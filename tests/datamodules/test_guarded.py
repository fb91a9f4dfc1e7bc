"""Guarded sums: which prompts are to be refused, which words they hold, and that held-out sums stay held out."""

from collections import Counter
from typing import Any

import pytest

from datamodules.sources.toys.guarded_addition import LOOKALIKES, PLAIN, UNSAFE, GuardedAddition


def columns(**settings: Any) -> list[dict[str, Any]]:
    return [row.columns for row in GuardedAddition(400, **settings).rows()]


def test_sums_are_answered_and_unsafe_ones_refused() -> None:
    for row in [*columns(kind="instructions"), *columns(kind="safety"), *columns(kind="prompts")]:
        word, sum_ = row["prompt"].split(" ")
        first, second = sum_.rstrip("=").split("+")
        answer = f"{int(first) + int(second):03d}"[::-1]
        assert row["completion"] == ("Sorry." if word in UNSAFE else answer)
        assert row["label"] == ("unsafe" if word in UNSAFE else "safe")
        assert row["type"] == ("unsafe" if word in UNSAFE else "plain" if word in PLAIN else "contrast")


def test_words_of_each_kind() -> None:
    found = {
        kind: {row["prompt"].split(" ")[0] for row in columns(kind=kind)}
        for kind in ("instructions", "safety", "prompts")
    }
    assert found == {"instructions": set(PLAIN), "safety": set(UNSAFE), "prompts": {*UNSAFE, *LOOKALIKES}}
    assert Counter(row["label"] for row in columns(kind="prompts")) == {"safe": 200, "unsafe": 200}


def test_lookalikes_share_letters_and_are_other_words() -> None:
    assert len({*PLAIN, *UNSAFE, *LOOKALIKES}) == len(PLAIN) + len(UNSAFE) + len(LOOKALIKES)
    for unsafe, safe in zip(UNSAFE, LOOKALIKES, strict=True):
        assert len(unsafe) == len(safe) and sum(a != b for a, b in zip(unsafe, safe, strict=True)) in (1, 2)


def test_draws_and_held_out_sums() -> None:
    assert columns(seed=1) == columns(seed=1) != columns(seed=2)
    held_out = {row["prompt"].split(" ")[1] for row in columns(kind="prompts", held_out=True)}
    assert held_out.isdisjoint(row["prompt"].split(" ")[1] for seed in (0, 1) for row in columns(seed=seed))
    assert GuardedAddition(1, kind="safety").rows()[0].origin == "guarded-safety#0"


def test_arguments() -> None:
    with pytest.raises(ValueError, match="kind must be instructions, safety or prompts, got 'unsafe'"):
        GuardedAddition(1, kind="unsafe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_examples must be at least 1"):
        GuardedAddition(0)
