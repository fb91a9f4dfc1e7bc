"""Rows for the benchmarks: real ones where ``../shared/data`` is there, else made up, of like lengths."""

import gzip
import json
import random
from pathlib import Path

MARK = "\n\nAssistant:"
TEXT = (
    "apples books boxes bread cakes cards chairs children coins cookies cups days dollars eggs friends gallons games "
    "garden hours letters miles minutes pages pencils people pieces plants pounds rooms school shirts store students "
    "tickets times trees weeks years buys eats finds gives has keeps makes needs reads sells spends takes walks wants"
)
WORDS = TEXT.split()

Row = dict[str, str]


def find_questions(data: Path, count: int) -> list[Row]:
    """Rows with ``prompt`` and ``completion``: problems of GSM8K with their solutions, or made-up ones."""
    file = data / "gsm8k" / "train.jsonl"
    if file.is_file():
        with file.open(encoding="utf-8") as lines:
            found = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
        return [{"prompt": row["question"], "completion": row["answer"]} for row in found]
    numbers = random.Random(0)
    # GSM8K: 45 words with a deviation of 18 ask, and 50 with a deviation of 25 answer, beside their numbers.
    return [
        {"prompt": invent(numbers, 45, 18), "completion": f"{invent(numbers, 50, 25)}\n#### {numbers.randrange(100)}"}
        for _ in range(count)
    ]


def find_pairs(data: Path, count: int) -> list[Row]:
    """Rows with ``prompt``, ``chosen`` and ``rejected``: HH-RLHF's transcripts, or made-up ones."""
    file = data / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
    pairs: list[Row] = []
    if file.is_file():
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                prompt, chosen = row["chosen"].rsplit(MARK, 1)
                other, rejected = row["rejected"].rsplit(MARK, 1)
                if prompt == other and chosen != rejected and len(pairs) < count:
                    pairs.append({"prompt": prompt + MARK, "chosen": chosen, "rejected": rejected})
        return pairs
    numbers = random.Random(1)
    for _ in range(count):
        turns = "".join(
            f"\n\nHuman: {invent(numbers, 18, 10)}{MARK} {invent(numbers, 35, 20)}" for _ in range(numbers.randrange(3))
        )
        pairs.append(
            {
                "prompt": f"{turns}\n\nHuman: {invent(numbers, 18, 10)}{MARK}",
                "chosen": f" {invent(numbers, 40, 30)}",
                "rejected": f" {invent(numbers, 40, 30)}",
            }
        )
    return pairs


def invent(numbers: random.Random, mean: float, deviation: float) -> str:
    """Make a text of about ``mean`` words that says nothing."""
    count = max(4, round(numbers.gauss(mean, deviation)))
    words = [numbers.choice(WORDS) if numbers.random() < 0.8 else str(numbers.randrange(1, 200)) for _ in range(count)]
    return " ".join(words).capitalize() + "."
