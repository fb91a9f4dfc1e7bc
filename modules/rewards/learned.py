"""Scores from one learned reward model, or from an ensemble of several (Coste et al., arXiv 2310.02743)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from modules.networks.loading import read_max_positions
from modules.networks.policy import Policy
from modules.rewards.scorers import Scorer, compute_last_states, load_scorer, load_shared_scorer, make_row, read_config
from modules.types import Reward, Rollout

Ensemble = Literal["mean", "worst", "uncertainty"]


class LearnedReward(Reward):
    """Scores completions with a reward model, or cautiously with several.

    A score is read at the last token of prompt and completion, in fp32, on the GPU if there is one. It is normalised by
    the mean and standard deviation that are stored with the model. Each head in ``reward_heads.safetensors`` is one
    member of the ensemble.

    The reward model reads the rollout's own tokens if its tokenizer decodes them to the rollout's text. That is so when
    policy and reward model share a vocabulary. Otherwise the text is tokenised again. A completion that ended by itself
    then gets an end token: the end-of-turn token if the prompt has one, else eos. One that was cut off gets none.

    Args:
        paths: folder or hub id of a sequence classifier with one label on a causal backbone, such as an exported
            ``RewardModule``; or a list of them.
        ensemble: ``mean`` of the members, the ``worst`` member, or ``uncertainty``: mean - ``uncertainty_weight`` x
            population variance of the members.
        uncertainty_weight: >= 0.
        batch_tokens: >= 1, tokens of one forward, padding included; at least one completion is computed.
        name: label of the metric.

    Raises:
        ValueError: a path is not a sequence classifier with one label, or a value is out of range. At the first call: a
            model has no linear ``score``, or a member of an ensemble has no ``reward_mean`` in its config. Such a
            member has its own scale, so ``worst`` would often pick the same one.
    """

    checks_answer = False

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
                f"and batch_tokens >= 1; got {self.paths}, {ensemble!r}, {uncertainty_weight} and {batch_tokens}"
            )
        for path in self.paths:
            read_config(path)
        self.name = name
        self.ensemble: Ensemble = ensemble
        self.uncertainty_weight, self.batch_tokens = uncertainty_weight, batch_tokens
        self._scorers: dict[str, Scorer] = {}

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return a score per rollout."""
        if not rollouts:
            return []
        return list(combine(self.members(rollouts), self.ensemble, self.uncertainty_weight).tolist())

    def members(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return the normalised score of every member, [N, members], float64."""
        for path in self.paths:
            if path not in self._scorers:
                check_members(self.paths)
                self._scorers[path] = load_scorer(path)
        scorers = [self._scorers[path] for path in self.paths]
        return torch.cat(
            [self._score(scorer, [make_row(scorer, rollout) for rollout in rollouts]) for scorer in scorers], 1
        )

    def share_backbone(self, policy: Policy) -> list[str]:
        """Compute reward models on the policy's backbone where they are adapters of it, and return their paths.

        The other reward models keep a model of their own. The export of a ``RewardModule`` that was trained with
        ``lora`` holds such adapters. They are put into the policy's model once, frozen.

        Raises:
            ValueError: a member of an ensemble has no ``reward_mean`` in its config.
        """
        check_members(self.paths)
        for path in dict.fromkeys(self.paths):
            if path not in self._scorers or self._scorers[path].model is not policy.model:
                scorer = load_shared_scorer(path, policy)
                if scorer is not None:
                    self._scorers[path] = scorer
        return [path for path, scorer in self._scorers.items() if scorer.model is policy.model]

    @torch.no_grad()
    def _score(self, scorer: Scorer, rows: list[tuple[int, ...]]) -> Tensor:
        """Return the normalised scores [N, heads] of rows of tokens, each distinct row computed once."""
        distinct = sorted(dict.fromkeys(rows), key=len)
        positions = read_max_positions(scorer.model.config)
        if positions is not None and len(distinct[-1]) > positions:
            raise ValueError(
                f"LearnedReward: prompt and completion have {len(distinct[-1])} tokens, but the reward model only "
                f"{positions} positions; sample shorter completions"
            )
        with torch.autocast(scorer.model.device.type, enabled=False):
            states = torch.cat(
                [compute_last_states(scorer, chunk) for chunk in split_rows(distinct, self.batch_tokens)]
            )
            raw = nn.functional.linear(states, scorer.weight.to(states.device)).double().cpu()  # [distinct rows, heads]
        place = {row: i for i, row in enumerate(distinct)}
        return ((raw - scorer.mean) / scorer.std)[[place[row] for row in rows]]


def combine(scores: Tensor, ensemble: Ensemble, uncertainty_weight: float) -> Tensor:
    """Join the scores of the members, [N, members], to one score each, [N].

    Members 1, 2, 6 give 3 as ``mean``, 1 as ``worst``, and 3 - 0.1 x 14/3 as ``uncertainty`` with weight 0.1.
    """
    if ensemble == "worst":
        return scores.amin(1)
    mean = scores.mean(1)
    return mean if ensemble == "mean" else mean - uncertainty_weight * scores.var(1, correction=0)


def split_rows(rows: Iterable[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield consecutive rows, sorted by length, of at most ``batch_tokens`` when padded, but at least one row."""
    chunk: list[tuple[int, ...]] = []
    for row in rows:
        if chunk and len(row) * (len(chunk) + 1) > batch_tokens:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


def check_members(paths: list[str]) -> None:
    """Refuse an ensemble in which the scores of a member were not measured.

    Raises:
        ValueError: a member has no ``reward_mean`` in its config.
    """
    unmeasured = [path for path in paths if "reward_mean" not in read_config(path).to_dict()] if len(paths) > 1 else []
    if unmeasured:
        raise ValueError(
            f"LearnedReward: {', '.join(unmeasured)} without reward_mean in config.json cannot join an ensemble; "
            "export it from a RewardModule, which stores the mean"
        )
