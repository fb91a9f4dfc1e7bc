"""Writes the right completions of ``predict`` as instruction data: rejection sampling."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import cast

from lightning.pytorch import LightningModule, Trainer

from callbacks.measures.sample_filters import contradicts_thought, find_runs
from callbacks.writers.sample_writer import Chosen, JudgedSample, SampleWriter, find_flaw
from modules.rewards.dispatch import Dispatch
from modules.types import HasAskedRows, SkipsPrompts


class VerifiedSamples(SampleWriter):
    """Writes JSONL with one row per kept completion: the training row's columns, ``completion`` and ``answer``.

    ``InstructionDataModule`` learns the completions, and ``VerifiableDataModule`` reads the same file as prompts with
    answers. A completion is kept if it ended by itself, no thinking budget ended its thought, it is right by
    ``model.validation.accuracy``, it scores at least ``at_least``, and no earlier one of its prompt has the same text.
    Sources: DeepSeek-R1 (arXiv 2501.12948, section 2.3.3), Qwen3 (2505.09388, section 4.1), Kimi k1.5 (2501.12599,
    section 2.4).

    See :class:`SampleWriter` for killed runs and for how the file is read.

    Args:
        at_least: part of ``model.reward`` -> its least score, such as
            ``{format: 1, language: 0.95, repetition: -0.1}``, for answers without thoughts, mixed languages or
            repetitions. A part without a score counts as below, except a task of ``Dispatch`` that is not the prompt's
            task.
        per_prompt: most rows of a prompt, >= 1; None = all.
        consistent: leave out a completion whose thought concludes another answer than it gives, see
            ``contradicts_thought``.
        unlike_held_out: leave out a completion if it or its question shares this many consecutive words with a question
            of ``data.val``, or if its question is held out. >= 1, such as 10; None = keep both.
        shortest: take the completions of a prompt with the fewest tokens, not those that were sampled first. With
            ``per_prompt`` 1 this is Kimi's shortest rejection sampling.
        path: the file; its parent folders are made, and an earlier file is replaced at the end. None =
            ``verified.jsonl`` in the run's folder, or the next free name there.

    Raises:
        ValueError: a number is out of range; in ``setup``, when the reward has no such part, nothing tells right from
            wrong, or as in :class:`SampleWriter`; at the end, when nothing is kept.
    """

    file = "verified.jsonl"

    def __init__(
        self,
        at_least: dict[str, float] | None = None,
        per_prompt: int | None = None,
        shortest: bool = False,
        consistent: bool = False,
        unlike_held_out: int | None = None,
        path: str | None = None,
    ) -> None:
        super().__init__(path)
        if per_prompt is not None and per_prompt < 1:
            raise ValueError(f"VerifiedSamples: per_prompt must be at least 1, got {per_prompt}")
        if not all(math.isfinite(least) for least in (at_least or {}).values()):
            raise ValueError(f"VerifiedSamples: at_least holds finite numbers, got {at_least}")
        if shortest and per_prompt is None:
            raise ValueError("VerifiedSamples: shortest chooses among the completions of a prompt; set per_prompt")
        if unlike_held_out is not None and unlike_held_out < 1:
            raise ValueError(f"VerifiedSamples: unlike_held_out must be at least 1, got {unlike_held_out}")
        self.at_least, self.per_prompt, self.shortest = at_least or {}, per_prompt, shortest
        self.consistent, self.unlike_held_out = consistent, unlike_held_out
        self.held_out: set[str] = set()  # questions
        self.runs: set[tuple[str, ...]] = set()  # of words, in these questions
        self.tasks: list[str] = []  # parts that score only the prompts of their own task

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse parts that the reward does not have, and read the held-out questions."""
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            reward = cast(SkipsPrompts, pl_module).reward
            parts = reward.name_parts() if reward is not None else []
            self.tasks = reward.tasks if isinstance(reward, Dispatch) else []
            unknown = [name for name in self.at_least if name not in parts]
            if unknown:
                raise ValueError(
                    f"VerifiedSamples: at_least names {unknown[0]}, and the parts of model.reward are "
                    f"{', '.join(parts) or 'none'}"
                )
            if self.unlike_held_out is not None:
                questions = cast(HasAskedRows, trainer.datamodule).held_out_questions()  # type: ignore[attr-defined]
                if not questions:
                    raise ValueError(
                        "VerifiedSamples: unlike_held_out compares with the rows of data.val: set data.val"
                    )
                self.held_out = {text.strip() for text in questions}
                self.runs = {run for text in questions for run in find_runs(text, self.unlike_held_out)}

    def choose(self, samples: Sequence[JudgedSample], question: str = "") -> Chosen:
        """Keep right completions that reach every bound, each text once and at most ``per_prompt``."""
        reasons = [self.find_reason(sample, question) for sample in samples]
        counts = Counter(reason for reason in reasons if reason is not None)
        good = [sample for sample, reason in zip(samples, reasons, strict=True) if reason is None]
        if self.shortest:
            good.sort(key=lambda sample: sample.length)
        texts = list(dict.fromkeys(sample.text for sample in good))
        kept = texts[: self.per_prompt]
        counts += Counter(kept=len(kept), repeated=len(good) - len(texts), surplus=len(texts) - len(kept))
        return Chosen([{"completion": text} for text in kept], counts)

    def find_reason(self, sample: JudgedSample, question: str = "") -> str | None:
        """Return why a completion is left out; None = it is not."""
        flaw = find_flaw(sample) or (None if sample.right else "wrong")
        if flaw is not None:
            return flaw
        scores = {name: sample.rewards.get(name) for name in self.at_least}
        asked = ((name, score) for name, score in scores.items() if score is not None or name not in self.tasks)
        low = (name for name, score in asked if score is None or score < self.at_least[name])
        below = next((f"below {name}" for name in low), None)
        if below is not None:
            return below
        if self.consistent and contradicts_thought(sample.text):
            return "contradicts its thought"
        if self.unlike_held_out is None:
            return None
        runs = find_runs(f"{question}\n{sample.text}", self.unlike_held_out)
        return "like held-out rows" if question.strip() in self.held_out or runs & self.runs else None
