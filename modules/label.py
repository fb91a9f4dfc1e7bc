"""AI feedback as data: a judge ranks the candidate answers of each prompt, for a reward model or DPO to learn from (RLAIF)."""

from collections import Counter
from itertools import combinations
from typing import Any

import torch

from modules.base import AlignmentModule
from modules.rewards.judge import Comparison, PairwiseJudge, tally, tally_metrics
from modules.types import PromptBatch


class LabelModule(AlignmentModule):
    """Compares every two candidates of a prompt and ranks them by their mean share of wins, a tie counting half. For ``predict`` alone.

    One pair is asked about in both orders (MT-Bench, arXiv 2306.05685). Where a single comparison of a row is invalid, the row is, since
    its scores would not compare. Nothing is sampled from the policy; only its tokenizer is used.

    Args:
        judge: compares two answers.
        policy: whose tokenizer the data get; the built-in one will do.

    Attributes:
        done: uids that are labelled already and are not judged again; a writer that resumes fills it.
        labelled: of the last batch, a record per row that was judged: ``row`` (its place in the data), ``uid``, ``given`` (the data's own
            label), ``counts`` of its comparisons, and ``label``, None when invalid: ``uid``, ``prompt``, ``completions``, ``ranks``
            (0 = best, equal for equal scores) and ``scores`` (mean share of wins, [0, 1]).
    """

    def __init__(self, judge: PairwiseJudge, policy: str = "tiny") -> None:
        super().__init__(policy, torch.optim.SGD, dropout=False)
        self.judge = judge
        self.done: set[str] = set()
        self.labelled: list[dict[str, Any]] = []

    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Leaves the records of the batch in ``labelled``. Raises ValueError for prompts without candidates, and see the judge."""
        bare = [uid for uid, info in zip(prompts["uid"], prompts["info"], strict=True) if "candidates" not in info]
        if bare:
            raise ValueError(f"{bare[0]}: a prompt without candidates to compare; set data to CandidatesDataModule")
        rows = [index for index, uid in enumerate(prompts["uid"]) if uid not in self.done]
        texts = {index: prompts["info"][index]["candidates"] for index in rows}
        pairs = [(prompts["prompt"][index], first, second) for index in rows for first, second in combinations(texts[index], 2)]
        comparisons = iter(self.judge.compare(pairs))
        self.labelled = []
        for index in rows:
            judged = [next(comparisons) for _ in combinations(texts[index], 2)]
            uid, info = prompts["uid"][index], prompts["info"][index]
            label = preference_row(uid, prompts["prompt"][index], texts[index], judged)
            record = {"row": info["row"], "uid": uid, "given": info["given"], "counts": dict(tally(judged)), "label": label}
            self.labelled.append(record)

    def usage(self) -> dict[str, float]:
        """What the judge's client has used so far: requests, tokens, cost."""
        return self.judge.client.report()

    def summary(self, records: list[dict[str, Any]]) -> dict[str, float]:
        """Numbers of labelled rows: see ``summary`` below."""
        return summary(records)

    def identity(self) -> dict[str, str | int]:
        """What determines the labels: a file begun with another judge is not gone on with."""
        return {"judge": self.judge.client.identity, "template": self.judge.template, "both_orders": self.judge.both_orders}


def preference_row(uid: str, prompt: str, completions: list[str], comparisons: list[Comparison]) -> dict[str, Any] | None:
    """Scores and ranks of K completions from their comparisons in the order of ``itertools.combinations``; None when one is invalid.

    Example: three completions, the first beats both others, which tie: scores [1, 0.25, 0.25], ranks [0, 1, 1].
    """
    wins = [0.0] * len(completions)
    for (first, second), comparison in zip(combinations(range(len(completions)), 2), comparisons, strict=True):
        if comparison.score is None:
            return None
        wins[first] += comparison.score
        wins[second] += 1.0 - comparison.score
    ranks = [sum(other > mine for other in wins) for mine in wins]
    scores = [won / (len(completions) - 1) for won in wins]
    return {"uid": uid, "prompt": prompt, "completions": completions, "ranks": ranks, "scores": scores}


def summary(records: list[dict[str, Any]]) -> dict[str, float]:
    """``rows`` (labelled), ``ties`` (rows whose completions are all equal), ``invalid`` (rows), the judge's ``position_bias`` and
    ``consistency``, and where the data have labels: ``agreement`` = share of the ``given`` labelled rows with that very label, ties too."""
    labels = [record["label"] for record in records if record["label"] is not None]
    metrics = tally_metrics(sum((Counter(record["counts"]) for record in records), Counter()))
    metrics |= {
        "rows": float(len(labels)),
        "ties": float(sum(not any(label["ranks"]) for label in labels)),
        "invalid": float(len(records) - len(labels)),
    }
    compared = [(record["given"], record["label"]["ranks"]) for record in records if record["label"] and record["given"] is not None]
    if compared:
        metrics["given"] = float(len(compared))
        metrics["agreement"] = sum(given == {(0, 1): 1, (1, 0): 2, (0, 0): 0}[tuple(ranks)] for given, ranks in compared) / len(compared)
    return metrics
