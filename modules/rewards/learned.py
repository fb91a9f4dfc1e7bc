"""Scores from learned reward models: one, or an ensemble (Coste et al., arXiv 2310.02743)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from modules.networks.loading import max_positions
from modules.networks.policy import Policy
from modules.rewards.scorers import Scorer, last_states, load_scorer, read_config, row_of, shared_scorer
from modules.types import Reward, Rollout

Ensemble = Literal["mean", "worst", "uncertainty"]


class LearnedReward(Reward):
    """The score of a reward model, normalised by the mean and deviation stored with it; of several, a cautious summary.

    Every head of a model with ``reward_heads.safetensors`` is a member of the ensemble. A score is read at the last
    token of prompt and completion, in fp32, on the GPU where there is one. Tokens are the rollout's own where the
    model's tokenizer decodes them to the rollout's text, as it does when policy and reward model have one vocabulary.
    Otherwise the text is tokenised anew, with an end token where the
    completion ended by itself: the end-of-turn token if the prompt has one, else eos. Completions that were cut off are
    scored as they are.

    Args:
        paths: folder or hub id of a sequence classifier with one label on a causal backbone, such as an exported
            ``RewardModule``, or several.
        ensemble: ``mean`` of the members, the ``worst`` of them, or ``uncertainty``: mean - ``uncertainty_weight`` x
            their population variance.
        uncertainty_weight: >= 0.
        batch_tokens: tokens of one forward, padding included, but at least one completion.
        name: label of the metric.

    Raises:
        ValueError: a path without a sequence classifier of one label, values out of range; at the first call, a model
            without a linear ``score``, or a member of an ensemble without ``reward_mean`` in its config: on scales of
            their own, the worst would always be the same one.
    """

    def __init__(
        self,
        paths: str | list[str],
        ensemble: Ensemble = "mean",
        uncertainty_weight: float = 0.1,
        batch_tokens: int = 16384,
        name: str = "learned",
    ) -> None:
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        if (
            not self.paths
            or ensemble not in ("mean", "worst", "uncertainty")
            or uncertainty_weight < 0
            or batch_tokens < 1
        ):
            raise ValueError(
                "LearnedReward needs at least one path, ensemble mean, worst or uncertainty, uncertainty_weight >= 0 "
                "and batch_tokens >= 1, "
                f"got {self.paths}, {ensemble!r}, {uncertainty_weight} and {batch_tokens}"
            )
        for path in self.paths:
            read_config(path)
        self.name = name
        self.ensemble: Ensemble = ensemble
        self.uncertainty_weight, self.batch_tokens = uncertainty_weight, batch_tokens
        self._scorers: dict[str, Scorer] = {}

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """A score per rollout."""
        if not rollouts:
            return []
        return list(combine(self.members(rollouts), self.ensemble, self.uncertainty_weight).tolist())

    def members(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Normalised scores [N, members], float64."""
        for path in self.paths:
            if path not in self._scorers:
                check_members(self.paths)
                self._scorers[path] = load_scorer(path)
        scorers = [self._scorers[path] for path in self.paths]
        return torch.cat(
            [self._score(scorer, [row_of(scorer, rollout) for rollout in rollouts]) for scorer in scorers], 1
        )

    def share_backbone(self, policy: Policy) -> list[str]:
        """Compute on the policy's backbone what are adapters of it, and return those paths; the others keep a model of
        their own.

        Adapters are in the export of a ``RewardModule`` that was trained with ``lora``. They are put into the policy's
        model, frozen, once. ValueError for an ensemble with a member without ``reward_mean``.
        """
        check_members(self.paths)
        for path in dict.fromkeys(self.paths):
            if path not in self._scorers or self._scorers[path].model is not policy.model:
                scorer = shared_scorer(path, policy)
                if scorer is not None:
                    self._scorers[path] = scorer
        return [path for path, scorer in self._scorers.items() if scorer.model is policy.model]

    @torch.no_grad()
    def _score(self, scorer: Scorer, rows: list[tuple[int, ...]]) -> Tensor:
        """Normalised scores [N, heads] of rows of tokens, each distinct row computed once."""
        distinct = sorted(dict.fromkeys(rows), key=len)
        positions = max_positions(scorer.model.config)
        if positions is not None and len(distinct[-1]) > positions:
            raise ValueError(
                f"LearnedReward: a row of {len(distinct[-1])} tokens is longer than the {positions} positions of its "
                "model"
            )
        with torch.autocast(scorer.model.device.type, enabled=False):
            states = torch.cat([last_states(scorer, chunk) for chunk in chunked(distinct, self.batch_tokens)])
            raw = nn.functional.linear(states, scorer.weight.to(states.device)).double().cpu()  # [distinct rows, heads]
        place = {row: i for i, row in enumerate(distinct)}
        return ((raw - scorer.mean) / scorer.std)[[place[row] for row in rows]]


def combine(scores: Tensor, ensemble: Ensemble, uncertainty_weight: float) -> Tensor:
    """Scores [N, members] -> [N]. Members 1, 2, 6 give 3 as ``mean``, 1 as ``worst``, 3 - 0.1 x 14/3 as ``uncertainty``
    with weight 0.1.
    """
    if ensemble == "worst":
        return scores.amin(1)
    mean = scores.mean(1)
    return mean if ensemble == "mean" else mean - uncertainty_weight * scores.var(1, correction=0)


def chunked(rows: Iterable[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Consecutive rows, in rising length, of at most ``batch_tokens`` together when padded, but at least one."""
    chunk: list[tuple[int, ...]] = []
    for row in rows:
        if chunk and len(row) * (len(chunk) + 1) > batch_tokens:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


def check_members(paths: list[str]) -> None:
    """ValueError for an ensemble in which a member's scores were not measured."""
    unmeasured = [path for path in paths if "reward_mean" not in read_config(path).to_dict()] if len(paths) > 1 else []
    if unmeasured:
        raise ValueError(
            f"LearnedReward: {', '.join(unmeasured)} without reward_mean in config.json cannot join an ensemble: "
            "normalise it at export"
        )
