"""Measures what a model knows before it is tuned (SliCK, arXiv 2405.05904, section 3)."""

import hashlib
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import torch

from modules.networks.policy import Policy
from modules.predict.categories import categorise, matches
from modules.predict.predict_module import PredictModule
from modules.rollout.engine import InProcessEngine, RolloutEngine
from modules.rollout.phases.overlap import refuse_staleness
from modules.rollout.sampling import Sampling
from modules.trainer.seeds import derive_seed, run_seed
from modules.types import KNOWLEDGE_CATEGORIES, PromptBatch


class KnowledgeModule(PredictModule):
    """Asks for each fact with several few-shot prompts and sorts it by the share of right answers. For ``predict``
    alone.

    Each prompt is answered once greedily and ``num_samples`` times by sampling. The categories are HighlyKnown,
    MaybeKnown, WeaklyKnown and Unknown. The first line of a completion is the answer.

    Measure the very model that you will tune, before you tune it: the categories hold for no other model. The
    DataModule decides how many prompts and examples there are. The paper has 10 prompts of 4 examples; with fewer the
    categories are noisy.

    Args:
        policy: ``tiny``, ``tiny-addition``, a Hugging Face folder, a GGUF file or a hub id.
        num_samples: >= 1, sampled answers per prompt.
        temperature: > 0, of the samples.
        max_completion_length: tokens of an answer, the line end included.
        engine: what samples; default the policy itself, in this process.
        seed: of the sampling; None = the run's seed.

    Attributes:
        done: uids of facts that are already sorted and are not asked again. A writer that resumes fills it.
        record: ``labels`` holds one entry per fact that was asked: ``row`` (its place in the data), ``uid`` and
            ``label``. The label holds the row's own columns, ``knowledge`` (the category), ``p_greedy`` and
            ``p_sampled`` (shares of right answers, [0, 1]).

    Raises:
        ValueError: a value is out of range, or the policy cannot be loaded.
    """

    reads = "FactsDataModule"

    def __init__(
        self,
        policy: str,
        num_samples: int = 16,
        temperature: float = 0.5,
        max_completion_length: int = 32,
        engine: RolloutEngine | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if num_samples < 1 or temperature <= 0:
            raise ValueError(
                f"num_samples must be at least 1 and temperature above 0, got {num_samples} and {temperature}"
            )
        self.policy = Policy(policy, dropout=False)
        self.num_samples, self.seed = num_samples, run_seed(seed)
        self.sampling = Sampling(temperature=temperature, max_completion_length=max_completion_length, stop=("\n",))
        self.engine = engine or InProcessEngine()
        refuse_staleness(self.engine, "KnowledgeModule trains nothing")
        self.done: set[str] = set()

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer, which the DataModule uses too."""
        return self.policy.tokenizer

    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Sort the facts of the batch and leave their labels in ``record.labels``.

        Raises:
            ValueError: a prompt does not ask for a fact.
        """
        bare = [uid for uid, info in zip(prompts["uid"], prompts["info"], strict=True) if "fact" not in info]
        if bare:
            raise ValueError(f"{bare[0]}: this prompt asks for no fact; set data to FactsDataModule")
        wanted = [index for index, info in enumerate(prompts["info"]) if info["fact"] not in self.done]
        self.record.labels = []
        if not wanted:
            return
        self.engine.sync_weights(self.policy, self.global_step)
        greedy = self.right(prompts, wanted, 1, replace(self.sampling, temperature=0.0))
        sampled = self.right(prompts, wanted, self.num_samples, self.sampling)
        by_fact: dict[str, list[int]] = defaultdict(list)
        for place, index in enumerate(wanted):
            by_fact[prompts["info"][index]["fact"]].append(place)
        for uid, places in by_fact.items():
            info, mine = prompts["info"][wanted[places[0]]], (greedy[places, 0], sampled[places])
            shares = {
                name: round(float(right.float().mean()), 6)
                for name, right in zip(("p_greedy", "p_sampled"), mine, strict=True)
            }
            self.record.labels.append(
                {
                    "row": info["row"],
                    "uid": uid,
                    "label": {**info["columns"], "knowledge": categorise(*mine), **shares},
                }
            )

    def on_predict_end(self) -> None:
        """Let the engine give its memory back."""
        self.engine.release()

    def teardown(self, stage: str) -> None:
        """End what the engine started."""
        self.engine.close()

    def right(self, prompts: PromptBatch, wanted: list[int], num_generations: int, sampling: Sampling) -> torch.Tensor:
        """Sample answers to the wanted prompts in one call, and return which are right: bool [len(wanted),
        num_generations].
        """
        seeds = [derive_seed(self.seed, "knowledge", prompts["uid"][index]) for index in wanted]
        groups = self.engine.generate(
            [prompts["prompt_ids"][index] for index in wanted], num_generations, sampling, seeds
        )
        answers = [prompts["info"][index]["answers"] for index in wanted]
        return torch.tensor(
            [[matches(one.text, known) for one in group] for group, known in zip(groups, answers, strict=True)]
        )

    def summary(self, records: list[dict[str, Any]]) -> dict[str, float]:
        """Return ``rows``, the share of each category, and the means of ``p_greedy`` and ``p_sampled``."""
        labels, count = [record["label"] for record in records], len(records)
        found = Counter(label["knowledge"] for label in labels)
        shares: dict[str, float] = {category: found[category] / count for category in KNOWLEDGE_CATEGORIES}
        return {
            "rows": float(count),
            **shares,
            **{name: sum(label[name] for label in labels) / count for name in ("p_greedy", "p_sampled")},
        }

    def identity(self) -> dict[str, str | int]:
        """Return what determines the categories, besides the prompts.

        A writer does not continue a file that was begun with other weights or another sampling.
        """
        weights = hashlib.blake2b(digest_size=16)
        for name, weight in self.policy.state_dict().items():
            weights.update(name.encode())
            weights.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return {
            "method": type(self).__name__,
            "weights": weights.hexdigest(),
            "sampling": str(self.sampling),
            "samples": self.num_samples,
            "seed": self.seed,
        }
