"""The base of writers that turn the samples of ``predict`` into training data. A killed run continues where it stopped."""

import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.writers.pass_rates import PassRates
from callbacks.writers.prediction_writer import PredictionWriter
from callbacks.writers.resumable_jsonl import ResumableJsonl
from modules.functional.thoughts import CLOSE_TAG, OPEN_TAG
from modules.types import AskedRow, HasAskedRows, SkipsPrompts, require_accuracy


@dataclass(frozen=True)
class JudgedSample:
    """A sampled completion with all that a writer chooses by."""

    text: str
    length: int  # tokens that the policy sampled, the end token included
    stopped: bool  # it ended by itself
    right: bool | None  # None = it cannot be judged
    rewards: dict[str, float | None]  # by reward name, None = unscorable
    limited: bool = False  # a thinking budget ended its thought with a stop text that the policy did not sample


@dataclass(frozen=True)
class Chosen:
    """What becomes of the samples of one prompt."""

    columns: list[dict[str, str]]  # columns of each new row, beside those of the prompt's row
    counts: Counter[str]  # number of samples by outcome; they add up to all samples


class SampleWriter(ResumableJsonl):
    """Writes JSONL with rows made of the completions of each prompt, in the order of the data.

    A row has the unchanged columns of the training row, without those that answered the prompt; ``answer`` is the gold
    answer. So the DataModule that reads the file renders the prompt again: give it the same ``data.columns``,
    ``system`` and ``chat``.

    After each batch, every rank appends the judged completions to a hidden part file beside ``path``. A run that is
    started again, also on another number of ranks, samples none of these prompts again, and none that another such
    writer of the run already has. The writer chooses at the end, from all completions, so the settings of the choice
    may change between starts. ``<path>.report.json`` counts all completions by outcome.

    A subclass turns the completions of a prompt into columns (:meth:`choose`).
    """

    reads = SkipsPrompts
    module = "GRPOModule"
    begun_with = "another model, other settings or other rows"

    def __init__(self, path: str | None = None) -> None:
        super().__init__(path)
        self._rows: dict[str, AskedRow] = {}  # by uid

    @abstractmethod
    def choose(self, samples: Sequence[JudgedSample], question: str = "") -> Chosen:
        """Turn the completions of one prompt, in the order in which they were sampled, into columns of rows."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything is sampled."""
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        require_accuracy(pl_module, self.name)
        if getattr(pl_module, "environment", None) is not None:
            raise ValueError(
                f"{self.name}: completions with calls of tools are no text that could be learned; leave "
                "model.environment out"
            )
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, HasAskedRows):
            raise ValueError(
                f"{self.name} writes the rows of a VerifiableDataModule, and data is {type(data).__name__}: set data "
                "to VerifiableDataModule"
            )
        rows = data.asked_rows()
        self._rows = {row.uid: row for row in rows}
        if len(self._rows) < len(rows):
            uid = Counter(row.uid for row in rows).most_common(1)[0][0]
            raise ValueError(
                f"{self.name}: several training rows are called {uid.rpartition('#')[0]}; read every file once"
            )

    def head(self, trainer: Trainer, pl_module: Any, batch: Any) -> dict[str, Any]:
        """Return what determines the completions."""
        rows = json.dumps([[row.uid, row.prompt, row.columns] for row in self._rows.values()])
        digest = hashlib.blake2b(rows.encode(), digest_size=8).hexdigest()
        head: dict[str, Any] = json.loads(json.dumps({**pl_module.describe_samples(), "rows": digest}))
        return head

    def skip(self, trainer: Trainer, pl_module: Any, records: list[dict[str, Any]]) -> None:
        """Let the module leave out the prompts that an earlier run sampled, for this writer or another of the run."""
        mine = {record["uid"] for record in records if "uid" in record}
        others = [each for each in trainer.callbacks if isinstance(each, SampleWriter) and each is not self]  # type: ignore[attr-defined]
        theirs = self.read_parts([part for other in others for part in other._parts()])
        missed = {record["uid"]: record for record in theirs if "uid" in record and record["uid"] not in mine}
        if missed and self._file is not None and trainer.is_global_zero:
            self._append(list(missed.values()))
        found = mine | set(missed)
        pl_module.done = found
        if not found:
            return
        whole = [
            type(callback).__name__
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, PassRates | PredictionWriter)
        ]
        if whole:
            raise ValueError(
                f"{self.name}: an earlier run sampled {len(found)} prompts, which {whole[0]} would miss; delete "
                f"{self._part(0).with_name(f'.{self.path.name}.rank*')} to sample them again, or leave {whole[0]} out"
            )
        rank_zero_info(f"{self.name}: resuming with the {len(found)} prompts that an earlier run sampled")

    def take(self, pl_module: Any) -> list[dict[str, Any]]:
        """Return the judged completions of the last batch, one record for each prompt."""
        samples: dict[str, list[dict[str, Any]]] = {}
        for rollout, outcome in zip(pl_module.record.rollouts, pl_module.find_outcomes(), strict=True):
            text = rollout.text if self._rows[rollout.uid].chat else rollout.completion.text
            limited = not all(rollout.completion.sampled or ())
            sample = JudgedSample(text, outcome.length, outcome.stopped, outcome.right, rollout.rewards, limited)
            samples.setdefault(rollout.uid, []).append(asdict(sample))
        return [{"uid": uid, "samples": drawn} for uid, drawn in samples.items()]

    def join(self, trainer: Trainer, pl_module: Any) -> None:
        """Choose from the completions of all prompts and write the rows. Raises ValueError when there are none."""
        sampled = {record["uid"]: record["samples"] for record in self.read_parts() if "uid" in record}
        rows: list[dict[str, Any]] = []
        counts: Counter[str] = Counter()
        without = 0
        for uid, asked in self._rows.items():
            if uid in sampled:
                chosen = self.choose([JudgedSample(**sample) for sample in sampled[uid]], asked.question)
                assert chosen.counts.total() == len(sampled[uid])
                rows += [asked.columns | columns for columns in chosen.columns]
                counts += chosen.counts
                without += not chosen.columns
        said = f"{counts.total()} completions of {len(sampled)} prompts = " + " + ".join(
            f"{count} {what}" for what, count in counts.items()
        )
        if not rows:
            raise ValueError(
                f"{self.name}: {said}, so {self.path} is not written; start again with other bounds to choose from the "
                f"same completions, or delete {self._part(0).with_name(f'.{self.path.name}.rank*')}"
            )
        report = {"prompts": len(sampled), "prompts_without": without, "rows": len(rows), "sampled": counts.total()}
        self.finish(report | {f"sampled/{what}": count for what, count in counts.items()}, rows)
        plain = self.plain_prompts(pl_module)
        rank_zero_info(
            f"{self.name}: {self.path}: {len(rows)} rows; {said}; {without} prompts without a row"
            + ("; the prompts were plain text: read the file with data.chat: false" if plain else "")
        )

    def plain_prompts(self, pl_module: Any) -> bool:
        """Return whether there is a chat template and the prompts were written without it."""
        templated = pl_module.tokenizer.chat_template is not None
        return templated and not any(row.chat for row in self._rows.values())

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the file."""
        super().on_predict_end(trainer, pl_module)
        pl_module.done = None

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Keep the part file, from which the next run continues."""
        super().on_exception(trainer, pl_module, exception)
        pl_module.done = None


def find_flaw(sample: JudgedSample) -> str | None:
    """Return why nothing can be learned from a completion, right or wrong; None = something can.

    A completion that was cut off would be learned as one that ends there, and the stop text of a thinking budget as the
    policy's own words.
    """
    if not sample.stopped:
        return "unfinished"
    if sample.limited:
        return "thought ended by its budget"
    if sample.right is None:
        return "not judged"
    said = sample.text.replace(OPEN_TAG, "").replace(CLOSE_TAG, "").strip()
    return None if said else "empty"
