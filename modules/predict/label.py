"""AI feedback as data: ranks the candidate answers of each prompt, for a reward model or DPO to learn from."""

import re
from collections import Counter
from itertools import combinations
from typing import Any, Protocol, cast, runtime_checkable

from modules.predict.predict_module import PredictModule
from modules.rewards.chat.judge import JudgedPair, PairwiseJudge, measure_tally, tally
from modules.rewards.chat.protocol import ChatClient
from modules.rewards.verifier import Verifier
from modules.rollout.scoring import make_rollouts
from modules.types import Completion, PromptBatch, Reward, as_reward


@runtime_checkable
class AsksClient(Protocol):
    """A judge that asks a chat model."""

    client: ChatClient


class LabelModule(PredictModule):
    """Ranks the candidates of each prompt with a judge (RLAIF, arXiv 2309.00267) or with any reward. For ``predict``
    alone.

    A ``PairwiseJudge`` compares every two candidates, in both orders (MT-Bench, arXiv 2306.05685). They are ranked by
    their mean share of wins; a tie counts half. Any other reward scores each candidate once, as a completion that ended
    by itself, with text and without tokens. A reward that checks an answer reads the row's ``answer``. One invalid
    comparison or score makes its whole row invalid, because the other scores would not compare.

    Args:
        judge: compares two answers, or scores one.

    Attributes:
        done: uids that are already labelled and are not judged again. A writer that resumes fills it.
        record: ``labels`` holds one entry per row that was judged: ``row`` (its place in the data), ``uid``, ``given``
            (the data's own label), ``counts`` of its comparisons, and ``label``. The label is None if invalid; else it
            holds ``uid``, ``prompt``, ``completions``, ``ranks`` (0 = best, equal for equal scores) and ``scores``
            (mean share of wins, [0, 1], or what the reward gave).
    """

    reads = "CandidatesDataModule"

    def __init__(self, judge: Reward) -> None:
        super().__init__()
        self.judge = as_reward(judge)
        self.done: set[str] = set()

    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Judge the rows of the batch and leave their labels in ``record.labels``.

        Raises:
            ValueError: a prompt has no candidates, or the judge fails (see the judge).
        """
        bare = [uid for uid, info in zip(prompts["uid"], prompts["info"], strict=True) if "candidates" not in info]
        if bare:
            raise ValueError(f"{bare[0]}: this prompt has no candidates to compare; set data to CandidatesDataModule")
        rows = [index for index, uid in enumerate(prompts["uid"]) if uid not in self.done]
        asked = cast(
            PromptBatch,
            {name: [column[index] for index in rows] for name, column in cast(dict[str, list[Any]], prompts).items()},
        )
        judged = self.compared(asked, self.judge) if isinstance(self.judge, PairwiseJudge) else self.scored(asked)
        self.record.labels = []
        for uid, prompt, info, (scores, counts) in zip(
            asked["uid"], asked["prompt"], asked["info"], judged, strict=True
        ):
            columns = info.get("columns") or {"prompt": prompt, "completions": info["candidates"]}
            label = make_preference_row(uid, columns, scores)
            self.record.labels.append(
                {"row": info["row"], "uid": uid, "given": info["given"], "counts": counts, "label": label}
            )

    def compared(self, prompts: PromptBatch, judge: PairwiseJudge) -> list[tuple[list[float] | None, dict[str, int]]]:
        """Return, for each prompt, the candidates' mean shares of wins and the counts of their comparisons.

        The shares are None if one comparison is invalid.
        """
        texts = [info["candidates"] for info in prompts["info"]]
        pairs = [
            (prompt, first, second)
            for prompt, answers in zip(prompts["prompt"], texts, strict=True)
            for first, second in combinations(answers, 2)
        ]
        comparisons = iter(judge.compare(pairs))
        judged = [[next(comparisons) for _ in combinations(answers, 2)] for answers in texts]
        return [
            (share_wins(len(answers), found), dict(tally(found))) for answers, found in zip(texts, judged, strict=True)
        ]

    def scored(self, prompts: PromptBatch) -> list[tuple[list[float] | None, dict[str, int]]]:
        """Return, for each prompt, the candidates' rewards and no counts; None if a candidate has no reward."""
        completions = [[Completion([], [], text, "stop") for text in info["candidates"]] for info in prompts["info"]]
        rewards = iter([rollout.reward for rollout in make_rollouts(prompts, completions, self.judge)])
        scores = [[next(rewards) for _ in group] for group in completions]
        return [(None if None in group else cast(list[float], group), {}) for group in scores]

    def usage(self) -> dict[str, float]:
        """Return what the judge's client has used so far: requests, tokens, cost. Empty if no chat model is asked."""
        return self.judge.client.report() if isinstance(self.judge, AsksClient) else {}

    def summary(self, records: list[dict[str, Any]]) -> dict[str, float]:
        """Return metrics of labelled rows, see ``summarise_labels``."""
        return summarise_labels(records)

    def identity(self) -> dict[str, str | int]:
        """Return what determines the labels. A writer does not continue a file that was begun with another judge."""
        if isinstance(self.judge, PairwiseJudge):
            return {
                "judge": self.judge.client.identity,
                "template": self.judge.template,
                "both_orders": self.judge.both_orders,
            }
        return {"judge": describe_judge(self.judge)}


def share_wins(num_candidates: int, comparisons: list[JudgedPair]) -> list[float] | None:
    """Return the mean share of wins of each of K candidates, in [0, 1]; None if one comparison is invalid.

    Args:
        num_candidates: K, at least 2.
        comparisons: one for each pair, in the order of ``itertools.combinations``.

    Example:
        The first of three candidates beats both others, which tie: [1, 0.25, 0.25].
    """
    wins = [0.0] * num_candidates
    for (first, second), comparison in zip(combinations(range(num_candidates), 2), comparisons, strict=True):
        if comparison.score is None:
            return None
        wins[first] += comparison.score
        wins[second] += 1.0 - comparison.score
    return [won / (num_candidates - 1) for won in wins]


def make_preference_row(uid: str, columns: dict[str, Any], scores: list[float] | None) -> dict[str, Any] | None:
    """Make a row with ranks, 0 = best, from a prompt, its K completions and their scores; None without scores.

    Example:
        The scores [1, 0.25, 0.25] give the ranks [0, 1, 1].
    """
    if scores is None:
        return None
    ranks = [sum(other > mine for other in scores) for mine in scores]
    return {"uid": uid, **columns, "ranks": ranks, "scores": scores}


def describe_judge(value: Any) -> str:
    """Describe a reward by its class and its arguments, with the same text in every run."""
    if isinstance(value, ChatClient):
        return value.identity
    if isinstance(value, Reward):
        kept = {
            name: part
            for name, part in vars(value).items()
            if not name.startswith("_") and not isinstance(part, Counter)
        }  # without the counts of earlier calls
        if isinstance(value, Verifier):  # without how it is run
            for name in ("settings", "reads", "timeout"):
                kept.pop(name, None)
            kept = value.settings | kept
            kept = {"name": kept.pop("name"), **kept}
        parts = (f"{name}={describe_judge(part)}" for name, part in kept.items())
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, list):
        return f"[{', '.join(map(describe_judge, value))}]"
    return value.pattern if isinstance(value, re.Pattern) else repr(value)


def summarise_labels(records: list[dict[str, Any]]) -> dict[str, float]:
    """Compute metrics of labelled rows.

    Returns:
        ``rows`` (labelled), ``ties`` (rows whose completions are all equal), ``invalid`` (rows), and the judge's
        ``position_bias`` and ``consistency``. If the data have labels, also ``given``, the number of labelled rows with
        one, and ``agreement``, the share of these in which the judge gave the same label; a tie is a label too.
    """
    labels = [record["label"] for record in records if record["label"] is not None]
    metrics = measure_tally(sum((Counter(record["counts"]) for record in records), Counter()))
    metrics |= {
        "rows": float(len(labels)),
        "ties": float(sum(not any(label["ranks"]) for label in labels)),
        "invalid": float(len(records) - len(labels)),
    }
    compared = [
        (record["given"], record["label"]["ranks"])
        for record in records
        if record["label"] and record["given"] is not None
    ]
    if compared:
        metrics["given"] = float(len(compared))
        metrics["agreement"] = sum(
            given == {(0, 1): 1, (1, 0): 2, (0, 0): 0}[tuple(ranks)] for given, ranks in compared
        ) / len(compared)
    return metrics
