"""Preferences: the pairs of a batch, the losses on pairs or on labelled completions, and what is measured of them.

Log-probs are in nats and sums over the completion with its end token. In the formulas delta is a completion's log-ratio
of policy to reference, h = delta of the chosen completion - delta of the rejected one, and beta > 0 turns nats into
logits; beta delta is the implicit reward. All losses and their gradients are finite, however large h is.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from modules.functional.logprobs import sequence_logprobs
from modules.functional.ranges import check_numbers
from modules.types import PolicyBatch, PreferenceBatch, ScoredPair


class Pairs(NamedTuple):
    """M pairs, each of a better and a worse completion of one prompt."""

    better: Tensor  # int [M], row of the completion
    worse: Tensor  # int [M]
    weight: Tensor  # [M], 1 / pairs of the prompt, so that each prompt with any pair weighs 1
    margin: Tensor | None  # [M], by how much the better one should lead; None if the data have no margins


def find_pairs(batch: PreferenceBatch | PolicyBatch) -> Pairs:
    """Find all pairs of completions of one prompt with different ranks.

    Rank 0 is best. Equal ranks make no pair, and a negative rank (a filler, or not compared) is in no pair. Pairs are
    ordered by the row of the better completion, then by that of the worse. Example: ranks 0 1 1 of one prompt give
    (0, 1) and (0, 2), with weight 1/2 each.
    """
    prompt_index, rank = batch["prompt_index"], batch["rank"]
    same_prompt = prompt_index[:, None] == prompt_index  # [N, N]
    before = (rank[:, None] >= 0) & (rank[:, None] < rank)  # [N, N]
    better, worse = (same_prompt & before).nonzero(as_tuple=True)
    prompt = prompt_index[better]  # [M]
    margin = batch["margin"][prompt] if "margin" in batch else None  # type: ignore[typeddict-item]
    return Pairs(better, worse, 1.0 / torch.bincount(prompt)[prompt], margin)


class Sequences(NamedTuple):
    """The log-probs and lengths of N completions."""

    logps: Tensor  # [N], sum of the token log-probs (each times its weight), with gradient
    ref_logps: Tensor  # [N], the same under the reference; zeros without one
    lengths: Tensor  # [N], tokens, the end token included
    plain: Tensor  # [N], logps without the weights

    def at(self, rows: Tensor) -> "Sequences":
        """Return the completions of ``rows`` [M]."""
        return Sequences(*(part[rows] for part in self))

    def per_token(self) -> "Sequences":
        """Return means over tokens in place of the sums, of policy and reference."""
        return self._replace(logps=self.logps / self.lengths, ref_logps=self.ref_logps / self.lengths)

    @property
    def log_ratio(self) -> Tensor:
        """delta [N]; exactly 0 where policy and reference agree."""
        return self.logps - self.ref_logps


class PreferenceObjective(ABC):
    """A loss on the ranked or labelled completions of a micro-batch."""

    uses_reference = True
    compares_mismatched = False  # whether it needs the KL on completions of other prompts
    beta = 0.1  # the default

    def token_weights(self, batch: PreferenceBatch | PolicyBatch) -> Tensor:
        """Return the weight [N, Tc] of each token's log-prob in its completion's sum."""
        return batch["completion_mask"].float()

    def sum_tokens(
        self, logprobs: Tensor, ref_logprobs: Tensor | None, batch: PreferenceBatch | PolicyBatch
    ) -> Sequences:
        """Weight and sum token log-probs [N, Tc] per completion; those of the reference may be None."""
        weights, mask = self.token_weights(batch), batch["completion_mask"]
        if ref_logprobs is None:
            reference = torch.zeros(len(weights), device=weights.device)
        else:
            reference = sequence_logprobs(ref_logprobs, weights)
        return Sequences(
            sequence_logprobs(logprobs, weights), reference, mask.sum(1).float(), sequence_logprobs(logprobs, mask)
        )

    def implicit_rewards(self, sequences: Sequences, beta: float) -> Tensor:
        """Compute the reward [N] that the policy implies, up to a constant per prompt: beta delta."""
        return beta * sequences.log_ratio

    @abstractmethod
    def total(
        self,
        sequences: Sequences,
        batch: PreferenceBatch | PolicyBatch,
        pairs: Pairs,
        beta: float,
        kl: Tensor | None = None,
    ) -> Tensor:
        """Compute the sum [] of the loss over the examples of a batch.

        Args:
            sequences: the batch's completions.
            batch: has the prompt and the rank of each.
            pairs: the batch's pairs; empty for labelled completions.
            beta: strength of the tie to the reference.
            kl: [], KL on mismatched completions, for losses with ``compares_mismatched``.
        """


class PairObjective(PreferenceObjective):
    """A loss on pairs; the pairs of an example share its weight."""

    @abstractmethod
    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        """Compute the losses [M], one per pair."""

    def total(
        self,
        sequences: Sequences,
        batch: PreferenceBatch | PolicyBatch,
        pairs: Pairs,
        beta: float,
        kl: Tensor | None = None,
    ) -> Tensor:
        """Average over the pairs of each example, and sum over examples."""
        return (self.losses(sequences.at(pairs.better), sequences.at(pairs.worse), beta) * pairs.weight).sum()


class Sigmoid(PairObjective):
    """DPO: -(1 - e) log sigma(beta h) - e log sigma(-beta h), e = label_smoothing (arXiv 2305.18290 eq. 7, with e 0).

    Args:
        label_smoothing: [0, 0.5), the assumed share of wrong labels (conservative DPO). The loss then has its minimum
            at sigma(beta h) = 1 - e instead of at infinity.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        check_numbers(type(self).__name__, label_smoothing=(label_smoothing, "[0, 0.5)"))
        self.label_smoothing = label_smoothing

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        logit = beta * (chosen.log_ratio - rejected.log_ratio)
        return -(1 - self.label_smoothing) * logsigmoid(logit) - self.label_smoothing * logsigmoid(-logit)


class Robust(PairObjective):
    """(-(1 - e) log sigma(beta h) + e log sigma(-beta h)) / (1 - 2 e), e = label_smoothing (arXiv 2403.00409).

    If labels are wrong at the rate e, its mean is DPO's loss on right labels. Unlike conservative DPO it is unbounded
    below as h grows.

    Args:
        label_smoothing: [0, 0.5), that rate.
    """

    def __init__(self, label_smoothing: float = 0.1) -> None:
        check_numbers("Robust", label_smoothing=(label_smoothing, "[0, 0.5)"))
        self.label_smoothing = label_smoothing

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        logit = beta * (chosen.log_ratio - rejected.log_ratio)
        right, wrong = 1 - self.label_smoothing, self.label_smoothing
        return (-right * logsigmoid(logit) + wrong * logsigmoid(-logit)) / (1 - 2 * self.label_smoothing)


class IPO(PairObjective):
    """(h - 1 / (2 beta))^2: h is to meet a margin, not to exceed it (arXiv 2310.12036 eq. 17; beta is the paper's tau).

    Args:
        average: use means per token in h (as TRL does) instead of sums (as the paper does). The two need different
            values of beta.
    """

    def __init__(self, average: bool = False) -> None:
        self.average = average

    def implicit_rewards(self, sequences: Sequences, beta: float) -> Tensor:
        return super().implicit_rewards(sequences.per_token() if self.average else sequences, beta)

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        if self.average:
            chosen, rejected = chosen.per_token(), rejected.per_token()
        return (chosen.log_ratio - rejected.log_ratio - 1 / (2 * beta)).square()


class Hinge(PairObjective):
    """max(0, 1 - beta h), the loss of SLiC-HF (arXiv 2305.10425).

    The paper's form is reference-free, with a likelihood term (``nll_weight``).
    """

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        return (1 - beta * (chosen.log_ratio - rejected.log_ratio)).relu()


class LengthNormalized(PairObjective):
    """-log sigma(beta (delta / length of the chosen - delta / length of the rejected)) (Tulu 3, arXiv 2411.15124).

    beta is larger than DPO's, 5 by default, because log-ratios per token are small.
    """

    beta = 5.0

    def implicit_rewards(self, sequences: Sequences, beta: float) -> Tensor:
        return super().implicit_rewards(sequences.per_token(), beta)

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        per_token = chosen.log_ratio / chosen.lengths - rejected.log_ratio / rejected.lengths
        return -logsigmoid(beta * per_token)


class LengthMargin(PairObjective):
    """R-DPO: -log sigma(beta h + alpha (chosen tokens - rejected tokens)) (arXiv 2403.19159).

    The optimum of r - alpha length under a KL penalty has r = beta log(policy / ref) + alpha length + constant, hence
    the plus sign: length explains part of the preference for a longer answer, so that pair pulls less. A minus sign
    would reward length.

    Args:
        alpha: >= 0, logits per token.
    """

    def __init__(self, alpha: float = 0.01) -> None:
        check_numbers("LengthMargin", alpha=(alpha, "[0, inf)"))
        self.alpha = alpha

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        longer = chosen.lengths - rejected.lengths
        return -logsigmoid(beta * (chosen.log_ratio - rejected.log_ratio) + self.alpha * longer)


class LengthDesensitized(Sigmoid):
    """LD-DPO: DPO in which tokens beyond the length of the prompt's shortest completion count ``alpha`` (2409.06411).

    The shortest of all completions is the measure, also for more than two, so that a completion has one sum in all its
    pairs.

    Args:
        alpha: [0, 1]; 1 = DPO.
        label_smoothing: as in ``Sigmoid``.
    """

    def __init__(self, alpha: float = 0.5, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        check_numbers("LengthDesensitized", alpha=(alpha, "[0, 1]"))
        self.alpha = alpha

    def token_weights(self, batch: PreferenceBatch | PolicyBatch) -> Tensor:
        mask, prompt_index = batch["completion_mask"], batch["prompt_index"]
        lengths = mask.sum(1)  # [N]
        same_prompt = prompt_index[:, None] == prompt_index  # [N, N]
        shortest = torch.where(same_prompt, lengths, mask.shape[1]).amin(1)  # [N]
        return torch.where(mask.cumsum(1) <= shortest[:, None], 1.0, self.alpha).masked_fill(~mask, 0.0)


class SimPO(PairObjective):
    """-log sigma(beta (mean log-prob of chosen - of rejected) - gamma), without a reference (arXiv 2405.14734 eq. 6).

    Args:
        gamma: >= 0, the target margin in logits (the paper's code sets gamma / beta, 0.25 to 0.5).
    """

    uses_reference = False
    beta = 2.0

    def __init__(self, gamma: float = 0.5) -> None:
        check_numbers("SimPO", gamma=(gamma, "[0, inf)"))
        self.gamma = gamma

    def implicit_rewards(self, sequences: Sequences, beta: float) -> Tensor:
        return super().implicit_rewards(sequences.per_token(), beta)

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        return -logsigmoid(beta * (chosen.per_token().logps - rejected.per_token().logps) - self.gamma)


class ORPO(PairObjective):
    """-mean log-prob of chosen - beta log sigma(log odds of chosen - log odds of rejected), without a reference.

    odds = p / (1 - p), p = exp(mean log-prob), log p clamped to at most -1e-6. beta is the paper's lambda (arXiv
    2403.07691).
    """

    uses_reference = False

    def implicit_rewards(self, sequences: Sequences, beta: float) -> Tensor:
        return super().implicit_rewards(sequences.per_token(), beta)

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        better, worse = chosen.per_token().logps, rejected.per_token().logps
        return -better + beta * -logsigmoid(_log_odds(better) - _log_odds(worse))


def _log_odds(mean_logps: Tensor) -> Tensor:
    """Compute log(p / (1 - p)) of p = exp(mean_logps) [N], with log p clamped to at most -1e-6."""
    logps = mean_logps.clamp(max=-1e-6)
    return logps - torch.log(-torch.expm1(logps))


class KTO(PreferenceObjective):
    """lambda (1 - sigma(beta (delta - kl))), with the sign in sigma flipped for undesirable ones (arXiv 2402.01306).

    It takes labelled completions. Of ranked ones, the best counts as desirable and the others as undesirable. The KL is
    the mean log-ratio of the completions of the whole optimiser step, each put after the prompt of the data's next
    example with another prompt; it is at least 0 and has no gradient. TRL takes the mean over a micro-batch.

    Args:
        desirable_weight: >= 0, lambda of desirable completions; with n of each, the paper wants
            lambda_D n_D / (lambda_U n_U) in [1, 4/3].
        undesirable_weight: >= 0, lambda of the others.
    """

    compares_mismatched = True

    def __init__(self, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        check_numbers(
            "KTO",
            desirable_weight=(desirable_weight, "[0, inf)"),
            undesirable_weight=(undesirable_weight, "[0, inf)"),
        )
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def losses(self, sequences: Sequences, desirable: Tensor, beta: float, kl: Tensor) -> Tensor:
        """Compute the losses [N], each between 0 and its weight; ``desirable`` is bool [N], ``kl`` [] or [N]."""
        lead = beta * (sequences.log_ratio - kl.detach().clamp(min=0))
        good, bad = self.desirable_weight * torch.sigmoid(-lead), self.undesirable_weight * torch.sigmoid(lead)
        return torch.where(desirable, good, bad)

    def total(
        self,
        sequences: Sequences,
        batch: PreferenceBatch | PolicyBatch,
        pairs: Pairs,
        beta: float,
        kl: Tensor | None = None,
    ) -> Tensor:
        """Average over the completions of each example, and sum over examples."""
        assert kl is not None
        prompt_index, rank = batch["prompt_index"], batch["rank"]
        counts = prompt_index.bincount()[prompt_index]
        return (self.losses(sequences, rank == 0, beta, kl) / counts)[rank >= 0].sum()


class BradleyTerry:
    """-log sigma(r_chosen - r_rejected - margin) + centering (r_chosen + r_rejected)^2, r the score of a reward model.

    Source: InstructGPT, arXiv 2203.02155, eq. 1; the margin is Llama 2's, arXiv 2307.09288, eq. 2.

    Args:
        centering: >= 0; at 0 nothing ties the scores of a prompt to 0 (arXiv 2312.09244 sets 0.01).
    """

    def __init__(self, centering: float = 0.0) -> None:
        check_numbers("BradleyTerry", centering=(centering, "[0, inf)"))
        self.centering = centering

    def losses(self, chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
        """Compute the losses [M], one per pair, from the scores ``chosen`` and ``rejected`` [M] and ``margin`` [M]."""
        lead = chosen - rejected if margin is None else chosen - rejected - margin
        return -logsigmoid(lead) + self.centering * (chosen + rejected).square()


def make_scored_pairs(tokenizer: Any, batch: PreferenceBatch, scores: Tensor, pairs: Pairs) -> list[ScoredPair]:
    """Return the pairs of a batch with their texts and their scores, from ``scores`` [N] of the completions."""
    prompts, prompt_lengths = _decode_rows(tokenizer, batch["prompt_ids"], batch["prompt_mask"])
    texts, lengths = _decode_rows(tokenizer, batch["completion_ids"], batch["completion_mask"])
    index, score = batch["prompt_index"].tolist(), scores.tolist()
    margins = [None] * len(pairs.better) if pairs.margin is None else pairs.margin.tolist()
    return [
        ScoredPair(
            prompt=prompts[index[i]],
            prompt_length=prompt_lengths[index[i]],
            chosen=texts[i],
            rejected=texts[j],
            chosen_length=lengths[i],
            rejected_length=lengths[j],
            chosen_score=score[i],
            rejected_score=score[j],
            margin=margin,
        )
        for i, j, margin in zip(pairs.better.tolist(), pairs.worse.tolist(), margins, strict=True)
    ]


def _decode_rows(tokenizer: Any, ids: Tensor, mask: Tensor) -> tuple[list[str], list[int]]:
    """Decode the kept tokens of rows [R, T] without special tokens; return the texts and the numbers of tokens."""
    rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True), [len(row) for row in rows]


def measure_preferences(
    rewards: Tensor, logps: Tensor, rank: Tensor, pairs: Pairs | None, referenced: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute TRL's metrics of preferences, each a mean [] and its weight [], which is 0 for an empty mean.

    Labelled completions have no accuracy and no margin.

    Args:
        rewards: [N], implicit rewards.
        logps: [N], log-probs of the completions.
        rank: int [N].
        pairs: None = labelled completions, one per prompt.
        referenced: whether the rewards are log-ratios to a reference, so that both sides can fall below it.
    """
    sides = find_sides(rank, pairs)
    kinds = {"rewards": rewards, "logps": logps}
    found = {
        f"{kind}/{side}": (values[rows], weight)
        for kind, values in kinds.items()
        for side, (rows, weight) in sides.items()
    }
    if pairs is not None:
        better, worse = rewards[pairs.better], rewards[pairs.worse]
        found |= {
            "rewards/accuracies": ((better - worse > 0).float(), pairs.weight),
            "rewards/margins": (better - worse, pairs.weight),
        }
        if referenced:
            found["likelihood_displacement"] = (((better < 0) & (worse < 0)).float(), pairs.weight)
    return {name: _weighted_mean(*each) for name, each in found.items()}


def measure_logits(
    mean_logits: Tensor, mask: Tensor, rank: Tensor, pairs: Pairs | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute TRL's ``logits/chosen`` and ``logits/rejected``: means [] over the tokens of a side, with their weights.

    mean_logits [N, Tc]: mean over the vocabulary of the logits that predict a token. mask: bool [N, Tc]. rank: int [N].
    pairs: None = labelled completions.
    """
    sums, lengths = (mean_logits * mask).sum(1), mask.sum(1)  # [N]
    return {
        f"logits/{name}": _weighted_mean(sums[rows] / lengths[rows], weight * lengths[rows])
        for name, (rows, weight) in find_sides(rank, pairs).items()
    }


def find_sides(rank: Tensor, pairs: Pairs | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Find rows int [M] and weights [M] of both sides: of each pair, or the desirable and the undesirable ones."""
    if pairs is not None:
        return {"chosen": (pairs.better, pairs.weight), "rejected": (pairs.worse, pairs.weight)}
    sides = {"chosen": (rank == 0).nonzero()[:, 0], "rejected": (rank > 0).nonzero()[:, 0]}
    return {name: (rows, torch.ones_like(rows, dtype=torch.float32)) for name, rows in sides.items()}


def _weighted_mean(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the weighted mean [] of values [M], and the sum [] of the weights [M]."""
    return (values.detach() * weights).sum() / weights.sum().clamp(min=1e-9), weights.sum()
