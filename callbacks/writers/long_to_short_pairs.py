"""Writes preferences for short right completions over longer ones of ``predict``: long2short by DPO."""

import math
from collections import Counter
from collections.abc import Sequence

from callbacks.writers.sample_writer import Chosen, JudgedSample, SampleWriter, find_flaw


class LongToShortPairs(SampleWriter):
    """Writes JSONL with one pair per row: the training row's columns, ``chosen``, ``rejected`` and ``answer``.

    Chosen is the shortest right completion of the prompt. Rejected are wrong completions that are longer than it, and
    right ones that are more than ``factor`` times as long. Lengths count the tokens that the policy sampled.
    ``PreferenceDataModule`` reads the file. Source: Kimi k1.5 (arXiv 2501.12599, section 2.4). Unlike in the paper,
    completions that were cut off are left out, because a pair would teach them as texts that end. Completions whose
    thought was ended by a thinking budget are left out too.

    See :class:`SampleWriter` for killed runs and for how the file is read.

    Args:
        factor: >= 1.
        per_prompt: most pairs of a prompt, >= 1, in the order in which the rejected completions were sampled; None =
            all.
        path: the file; its parent folders are made, and an earlier file is replaced at the end. None =
            ``pairs.jsonl`` in the run's folder, or the next free name there.

    Raises:
        ValueError: a number is out of range; in ``setup``, when nothing tells right from wrong, or as in
            :class:`SampleWriter`; at the end, when there is no pair.
    """

    file = "pairs.jsonl"

    def __init__(self, factor: float = 1.5, per_prompt: int | None = None, path: str | None = None) -> None:
        super().__init__(path)
        if not (factor >= 1 and math.isfinite(factor)):
            raise ValueError(f"LongToShortPairs: factor must be at least 1, got {factor}")
        if per_prompt is not None and per_prompt < 1:
            raise ValueError(f"LongToShortPairs: per_prompt must be at least 1, got {per_prompt}")
        self.factor, self.per_prompt = factor, per_prompt

    def choose(self, samples: Sequence[JudgedSample], question: str = "") -> Chosen:
        """Pair the shortest right completion with longer ones, each text once."""
        flaws = [find_flaw(sample) for sample in samples]
        counts = Counter(flaw for flaw in flaws if flaw is not None)
        sound = [sample for sample, flaw in zip(samples, flaws, strict=True) if flaw is None]
        best = min((sample for sample in sound if sample.right), key=lambda sample: sample.length, default=None)
        if best is None:
            return Chosen([], counts + Counter({"without a right one": len(sound)}))
        seen, rejected = {best.text}, []
        counts["chosen"] += 1
        for sample in sound:
            if sample is best:
                continue
            if sample.text in seen:
                counts["repeated"] += 1
                continue
            seen.add(sample.text)
            if sample.length <= best.length * (self.factor if sample.right else 1):
                counts["right and not long" if sample.right else "wrong and not longer"] += 1
            else:
                rejected.append(sample.text)
        kept = rejected[: self.per_prompt]
        counts += Counter(rejected=len(kept), surplus=len(rejected) - len(kept))
        if not kept:
            counts -= Counter(chosen=1)
            counts += Counter({"without a longer one": 1})
        return Chosen([{"chosen": best.text, "rejected": text} for text in kept], counts)
