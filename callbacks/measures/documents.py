"""Describes a set of training rows in numbers.

A row holds D documents of T tokens in all. An answer is a run of supervised tokens in one document.
"""

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import torch

from callbacks.measures.refusals import is_refusal
from callbacks.measures.scored_pairs import LIST_ITEM

OPENERS = (
    "sure",
    "certainly",
    "of course",
    "absolutely",
    "great question",
)  # empty phrases that many generated answers begin with
NUM_FIRST_WORDS = 10
QUANTILES = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
MAX_DUPLICATES, MAX_LEFT_OUT = 0.01, 0.05  # a larger share gets a warning


@dataclass(frozen=True)
class Document:
    """One conversation, prompt with completion, or plain text, as two sequences [T]."""

    ids: Sequence[int]
    supervised: Sequence[bool]  # True = learned

    @property
    def prompt(self) -> Sequence[int]:
        """The tokens before the first supervised one [Tp].

        Empty for plain text, in which all tokens but the first are supervised.
        """
        mask = bytes(self.supervised)
        return () if mask.find(1) == 1 and 0 not in mask[1:] else self.ids[: mask.find(1) if any(mask) else None]

    @property
    def answers(self) -> list[Sequence[int]]:
        """The runs of supervised tokens [Tc], in order."""
        return [self.ids[run.start() : run.end()] for run in re.finditer(b"\1+", bytes(self.supervised))]


def split_row(ids: Sequence[int], supervised: Sequence[bool], lengths: Sequence[int]) -> list[Document]:
    """Cut a row into its D documents.

    Args:
        ids: [T], the tokens of the row.
        supervised: [T], True = learned.
        lengths: [D], tokens of each document; empty = the row is one document.

    Raises:
        ValueError: ``lengths`` do not sum to T.
    """
    ends = [0]
    for length in lengths or (len(ids),):
        ends.append(ends[-1] + length)
    if ends[-1] != len(ids):
        raise ValueError(f"a row of {len(ids)} tokens cannot be cut into documents of {list(lengths)} tokens.")
    return [Document(ids[start:end], supervised[start:end]) for start, end in pairwise(ends)]


def fingerprint(ids: Sequence[int]) -> bytes:
    """Return 16 bytes that identify ``ids`` [T]. Two different sequences share them with probability 2^-128."""
    return blake2b(array("q", ids).tobytes(), digest_size=16).digest()


def count_repeats(documents: Sequence[Document]) -> tuple[int, int]:
    """Count (duplicates, prompts with another answer) among documents [N].

    A duplicate has the tokens of an earlier document, so n equal documents count n - 1. A prompt with m different
    continuations counts m - 1. Example: [a:1, a:1, a:2, b:1] -> (1, 1).
    """
    whole = {fingerprint(document.ids): document for document in documents}
    continuations: dict[bytes, int] = defaultdict(int)
    for document in whole.values():
        if prompt := document.prompt:
            continuations[fingerprint(prompt)] += 1
    return len(documents) - len(whole), sum(count - 1 for count in continuations.values())


def find_leaks(train: Sequence[Document], val: Sequence[Document]) -> int:
    """Count the training documents [N] that are among the held-out documents [M], token by token."""
    held_out = {fingerprint(document.ids) for document in val}
    return sum(fingerprint(document.ids) in held_out for document in train)


def summarise_lengths(lengths: Sequence[int]) -> dict[str, float]:
    """Return ``min``, ``median``, ``mean``, ``p95`` and ``max`` of ``lengths`` [N]; nothing for N = 0.

    Quantiles are interpolated between neighbours.
    """
    if not lengths:
        return {}
    ordered = torch.tensor(lengths, dtype=torch.float64).sort().values  # torch.quantile takes 2^24 values at most
    found = {"mean": ordered.mean().item()}
    for name, share in QUANTILES.items():
        place = share * (len(ordered) - 1)
        low, high = ordered[int(place)].item(), ordered[min(int(place) + 1, len(ordered) - 1)].item()
        found[name] = low + (place - int(place)) * (high - low)
    return {name: found[name] for name in ("min", "median", "mean", "p95", "max")}


def first_word(text: str) -> str:
    """Return the first word in lower case, without the punctuation around it; "" if there is none.

    Example: "Sure! [1]" -> "sure".
    """
    return next(
        (word for piece in text.split(maxsplit=8)[:8] if (word := piece.strip(".,;:!?\"'()[]*#-`").casefold())), ""
    )


def report_texts(texts: Sequence[str]) -> dict[str, Any]:
    """Measure answers [A] as text. Shares are of the A answers, 0 for A = 0.

    - ``list_share``: answers with at least one line that begins with ``-``, ``*``, ``+``, ``1.`` or ``1)`` and a space.
    - ``refusal_share``: answers that begin like a refusal, see ``is_refusal``.
    - ``opener_share``: answers that begin with one of ``OPENERS``.
    - ``first_words``: the NUM_FIRST_WORDS most frequent first words, word -> share.
    """
    count = max(len(texts), 1)
    words = Counter(word for text in texts if (word := first_word(text)))
    return {
        "list_share": sum(LIST_ITEM.search(text) is not None for text in texts) / count,
        "refusal_share": sum(map(is_refusal, texts)) / count,
        "opener_share": sum(text.lower().lstrip().startswith(OPENERS) for text in texts) / count,
        "first_words": {word: number / count for word, number in words.most_common(NUM_FIRST_WORDS)},
    }


def report_split(
    rows: int,
    documents: Sequence[Document],
    special: Collection[int],
    decode: Callable[[Sequence[int]], str],
    limit: int | None,
) -> dict[str, Any]:
    """Measure one set of documents: the numbers of ``report_texts`` and those below.

    - ``rows``, ``documents`` (N; more than rows where rows are packed), ``tokens`` and ``answers`` (A): counts.
    - ``supervised_share``: supervised tokens over all tokens.
    - ``duplicates`` and ``same_prompt``: see ``count_repeats``. ``duplicate_share``: duplicates over documents.
    - ``empty_outputs``: answers of nothing but special tokens or white space. ``one_token_outputs``: answers with one
      token that is not special.
    - ``prompt_length`` and ``output_length``: see ``summarise_lengths``. The end token of an answer counts.
    - ``at_limit``: documents of exactly ``limit`` tokens, as truncation would leave them.

    Args:
        rows: number of rows that hold the documents.
        documents: [N].
        special: ids that are not text, such as end tokens.
        decode: ids [Tc] -> text without special tokens.
        limit: the longest length allowed, in tokens; None = unknown.
    """
    answers = [answer for document in documents for answer in document.answers]
    texts = [decode(answer) for answer in answers]
    bodies = [
        sum(token not in special for token in answer) if text.strip() else 0
        for answer, text in zip(answers, texts, strict=True)
    ]
    duplicates, same_prompt = count_repeats(documents)
    tokens = sum(len(document.ids) for document in documents)
    prompts = [len(prompt) for document in documents if (prompt := document.prompt)]
    return {
        "rows": rows,
        "documents": len(documents),
        "tokens": tokens,
        "answers": len(answers),
        "supervised_share": sum(sum(document.supervised) for document in documents) / max(tokens, 1),
        "duplicates": duplicates,
        "duplicate_share": duplicates / max(len(documents), 1),
        "same_prompt": same_prompt,
        "empty_outputs": bodies.count(0),
        "one_token_outputs": bodies.count(1),
        "at_limit": sum(len(document.ids) == limit for document in documents),
        "prompt_length": summarise_lengths(prompts),
        "output_length": summarise_lengths([len(answer) for answer in answers]),
        **report_texts(texts),
    }


def share_left_out(report: dict[str, Any]) -> float:
    """Return the share of rows left out, in [0, 1]: ``dropped`` + ``bad``, over the same plus the documents that are
    used.
    """
    left_out = report["dropped"] + report["bad"]
    return left_out / max(left_out + report["documents"], 1)


def find_concerns(stage: str, report: dict[str, Any]) -> list[str]:
    """Return one sentence for each thing to look at before training.

    ``report`` also holds ``dropped``, ``bad`` and possibly ``leaked``.
    """
    found = []
    if report["duplicate_share"] > MAX_DUPLICATES:
        found.append(f"{report['duplicates']} of {report['documents']} documents repeat an earlier one, token by token")
    if report.get("leaked"):
        found.append(
            f"{report['leaked']} of {report['documents']} documents are also held out, so validation looks better than "
            "it is"
        )
    if report["empty_outputs"]:
        found.append(
            f"{report['empty_outputs']} of {report['answers']} answers are empty, so the model learns to say nothing"
        )
    if share_left_out(report) > MAX_LEFT_OUT:
        found.append(
            f"{share_left_out(report):.1%} of the rows are left out: {report['dropped']} too long, {report['bad']} "
            "unreadable"
        )
    return [f"{stage} data: {sentence}" for sentence in found]
