"""The safety mix: how many rows are drawn, that none is drawn twice, and what each row keeps."""

import json
from collections import Counter
from pathlib import Path

import pytest

from datamodules import Addition, MixIn


def write(path: Path, count: int) -> str:
    path.write_text("".join(json.dumps({"text": f"{path.stem} {index}"}) + "\n" for index in range(count)))
    return str(path)


@pytest.mark.parametrize(
    ("num_base", "fraction", "expected"),
    [
        (20000, 0.0244, 500),  # 20000 * 0.0244 / 0.9756 = 500.2
        (90, 0.1, 10),  # 90 * 0.1 / 0.9 = 10; a tenth of the base rows would be 9
        (10, 0.5, 10),
        (10, 0.25, 3),  # 3.33
        (10, 0.0, 0),
    ],
)
def test_a_fraction_is_one_of_the_mix(tmp_path: Path, num_base: int, fraction: float, expected: int) -> None:
    base, extra = write(tmp_path / "base.jsonl", num_base), write(tmp_path / "extra.jsonl", 600)
    rows = MixIn(base, extra, fraction=fraction).rows()
    texts = [row.columns["text"] for row in rows]
    assert texts[:num_base] == [f"base {index}" for index in range(num_base)]
    assert len(set(texts[num_base:])) == len(texts) - num_base == expected


def test_rows_keep_their_source_and_origin(tmp_path: Path) -> None:
    extra = write(tmp_path / "extra.jsonl", 3)
    rows = MixIn(Addition(num_examples=5), extra, num=3).rows()
    assert Counter(row.source for row in rows) == {"addition": 5, f"{tmp_path.name}/extra": 3}
    assert sorted(row.origin for row in rows[5:]) == [f"{extra}:{line}" for line in (1, 2, 3)]


def test_the_draw_depends_on_the_seed_alone(tmp_path: Path) -> None:
    base, extra = write(tmp_path / "base.jsonl", 5), write(tmp_path / "extra.jsonl", 100)
    first = MixIn(base, extra, num=20)
    assert first.rows() == first.rows() == MixIn(base, extra, num=20).rows()
    assert first.rows() != MixIn(base, extra, num=20, seed=1).rows()
    assert MixIn(base, extra, num=0).rows() == MixIn(base, extra, fraction=0.0, seed=1).rows() == first.rows()[:5]


def test_mixes_of_mixes(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", 10) for name in "abc"]
    rows = MixIn(MixIn(files[0], files[1], num=2), files[2], num=3).rows()
    assert Counter(row.columns["text"][0] for row in rows) == {"a": 10, "b": 2, "c": 3}


@pytest.mark.parametrize(
    ("num", "fraction", "said"),
    [
        (None, None, "set one of num and fraction, got num None and fraction None"),
        (1, 0.5, "set one of num and fraction, got num 1 and fraction 0.5"),
        (-1, None, "num must be at least 0, got -1"),
        (None, 1.0, r"fraction must lie in \[0, 1\), got 1.0"),
        (None, float("nan"), "got nan"),
    ],
)
def test_arguments(num: int | None, fraction: float | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MixIn("a.jsonl", "b.jsonl", num=num, fraction=fraction)


def test_too_many_asked_for(tmp_path: Path) -> None:
    base, extra = write(tmp_path / "base.jsonl", 10), write(tmp_path / "extra.jsonl", 4)
    with pytest.raises(ValueError, match=r"^num is 5, but extra has only 4 \(from .*extra\.jsonl:1 on\)$"):
        MixIn(base, extra, num=5).rows()
    with pytest.raises(
        ValueError, match=r"^fraction 0\.5 of a mix with 10 base rows is 10 rows, but extra has only 4 "
    ):
        MixIn(base, extra, fraction=0.5).rows()
