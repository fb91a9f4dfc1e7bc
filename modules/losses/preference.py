"""Losses on preferences: what a comparison of two completions, or a label on one, asks of the policy.

Log-probs are in nats and sums over the completion with its end token. In the formulas delta is the log-ratio policy /
reference of a completion, h = delta of the chosen one - delta of the rejected one, and beta > 0 turns nats into logits;
beta delta is the implicit reward. All losses and their gradients are finite however large h is.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from modules.checks import check_numbers
from modules.functional.logprobs import sequence_logprobs
from modules.types import PolicyBatch, PreferenceBatch


class Pairs(NamedTuple):
    """M times a better and a worse completion of one prompt."""

    better: Tensor  # int [M], row of the completion
    worse: Tensor  # int [M]
    weight: Tensor  # [M], 1 / pairs of the prompt, so that each prompt with any pair weighs 1
    margin: Tensor | None  # [M], by how much the better one should lead; None where the data do not say


def find_pairs(batch: PreferenceBatch | PolicyBatch) -> Pairs:
    """All pairs of completions of one prompt of which one ranks before the other.

    Rank 0 is best, equal ranks make no pair, a negative rank (a filler, or not compared) pairs with nothing. The pairs
    are ordered by the better one's row and then by the other's. Example: ranks 0 1 1 of one prompt give (0, 1) and
    (0, 2), 1/2 each.
    """
    prompt_index, rank = batch["prompt_index"], batch["rank"]
    same_prompt = prompt_index[:, None] == prompt_index  # [N, N]
    before = (rank[:, None] >= 0) & (rank[:, None] < rank)  # [N, N]
    better, worse = (same_prompt & before).nonzero(as_tuple=True)
    prompt = prompt_index[better]  # [M]
    margin = batch["margin"][prompt] if "margin" in batch else None  # type: ignore[typeddict-item]
    return Pairs(better, worse, 1.0 / torch.bincount(prompt)[prompt], margin)


class Sequences(NamedTuple):
    """Completions, one number each."""

    logps: Tensor  # [N], sum of the token log-probs (each times its weight), with gradient
    ref_logps: Tensor  # [N], the same under the reference; zeros without one
    lengths: Tensor  # [N], tokens, the end token included
    plain: Tensor  # [N], logps without the weights

    def at(self, rows: Tensor) -> "Sequences":
        """Those of ``rows`` [M]."""
        return Sequences(*(part[rows] for part in self))

    def per_token(self) -> "Sequences":
        """With means over tokens in place of sums, of policy and reference."""
        return self._replace(logps=self.logps / self.lengths, ref_logps=self.ref_logps / self.lengths)

    @property
    def log_ratio(self) -> Tensor:
        """delta [N], exactly 0 where policy and reference agree."""
        return self.logps - self.ref_logps


class PreferenceObjective(ABC):
    """A loss on the ranked or labelled completions of a micro-batch."""

    uses_reference = True
    compares_mismatched = False  # whether it needs the KL on completions of other prompts
    beta = 0.1  # the default

    def token_weights(self, batch: PreferenceBatch | PolicyBatch) -> Tensor:
        """What each token's log-prob counts in its sequence's sum, [N, Tc]."""
        return batch["completion_mask"].float()

    def sum_tokens(
        self, logprobs: Tensor, ref_logprobs: Tensor | None, batch: PreferenceBatch | PolicyBatch
    ) -> Sequences:
        """Token log-probs [N, Tc] (the reference's may be missing), weighted and summed per completion."""
        weights, mask = self.token_weights(batch), batch["completion_mask"]
        if ref_logprobs is None:
            reference = torch.zeros(len(weights), device=weights.device)
        else:
            reference = sequence_logprobs(ref_logprobs, weights)
        return Sequences(
            sequence_logprobs(logprobs, weights), reference, mask.sum(1).float(), sequence_logprobs(logprobs, mask)
        )

    def implicit_rewards(self, sequences: Sequences, beta: float) -> Tensor:
        """The reward [N] that the policy stands for, up to a constant per prompt: beta delta."""
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
        """Sum [] of the loss over the examples of a batch.

        Args:
            sequences: the batch's completions.
            batch: has the prompt and the rank of each.
            pairs: the batch's pairs; none where completions are labelled.
            beta: strength of the tie to the reference.
            kl: [], that on mismatched completions; only for losses that ask for it.
        """


class PairObjective(PreferenceObjective):
    """A loss on pairs; the pairs of an example share its weight."""

    @abstractmethod
    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        """[M], one per pair."""

    def total(
        self,
        sequences: Sequences,
        batch: PreferenceBatch | PolicyBatch,
        pairs: Pairs,
        beta: float,
        kl: Tensor | None = None,
    ) -> Tensor:
        """Mean over the pairs of each example, summed over examples."""
        return (self.losses(sequences.at(pairs.better), sequences.at(pairs.worse), beta) * pairs.weight).sum()


class Sigmoid(PairObjective):
    """DPO: -(1 - e) log sigma(beta h) - e log sigma(-beta h), e = label_smoothing (arXiv 2305.18290 eq. 7, with e 0).

    Args:
        label_smoothing: [0, 0.5), the share of labels that are taken to be wrong (conservative DPO); the loss is then
            least at sigma(beta h) = 1 - e instead of at infinity.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        check_numbers(type(self).__name__, label_smoothing=(label_smoothing, "[0, 0.5)"))
        self.label_smoothing = label_smoothing

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        logit = beta * (chosen.log_ratio - rejected.log_ratio)
        return -(1 - self.label_smoothing) * logsigmoid(logit) - self.label_smoothing * logsigmoid(-logit)


class Robust(PairObjective):
    """(-(1 - e) log sigma(beta h) + e log sigma(-beta h)) / (1 - 2 e), e = label_smoothing (arXiv 2403.00409).

    In the mean over labels that are wrong at the rate e, this is DPO's loss on right ones. It is unbounded below as h
    grows, unlike conservative DPO.

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
    """(h - 1 / (2 beta))^2: a margin to meet and not to exceed (arXiv 2310.12036 eq. 17; beta is the paper's tau).

    Args:
        average: take h of means per token (as TRL does) instead of sums (as the paper does); beta does not carry over
            between them.
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
    """max(0, 1 - beta h): SLiC-HF (arXiv 2305.10425); its own form is reference-free with a likelihood term
    (``nll_weight``).
    """

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        return (1 - beta * (chosen.log_ratio - rejected.log_ratio)).relu()


class LengthNormalized(PairObjective):
    """-log sigma(beta (delta / length of the chosen - delta / length of the rejected)): Tulu 3, arXiv 2411.15124; beta
    is larger accordingly, 5 by default.
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
    the plus: length explains part of the preference for a longer answer, so its pair pulls less. A minus would reward
    length.

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
    """LD-DPO: DPO in which tokens behind the length that all completions of the prompt reach count ``alpha`` (arXiv
    2409.06411).

    With more than two completions the shortest of all is the measure, so that a completion has one sum in all its
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
        gamma: >= 0, the target margin itself, in logits (the paper's code names gamma / beta, 0.25 to 0.5).
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

    odds = p / (1 - p), p = exp(mean log-prob), log p kept at or below -1e-6. beta is the paper's lambda (arXiv
    2403.07691).
    """

    uses_reference = False

    def implicit_rewards(self, sequences: Sequences, beta: float) -> Tensor:
        return super().implicit_rewards(sequences.per_token(), beta)

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        better, worse = chosen.per_token().logps, rejected.per_token().logps
        return -better + beta * -logsigmoid(_log_odds(better) - _log_odds(worse))


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_logps) [N], with log p kept at or below -1e-6."""
    logps = mean_logps.clamp(max=-1e-6)
    return logps - torch.log(-torch.expm1(logps))


class KTO(PreferenceObjective):
    """lambda (1 - sigma(beta (delta - kl))) for a desirable completion, lambda (1 - sigma(beta (kl - delta))) for
    another (arXiv 2402.01306).

    For labelled completions; of ranked ones the best counts as desirable and the others as undesirable.
    The KL is the mean log-ratio of completions put behind the next prompt of the micro-batch, over ranks, at least 0
    and without gradient.

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
        """[N], one per completion, between 0 and its weight; ``desirable`` bool [N]; ``kl`` [] or [N]."""
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
        """Mean over the completions of each example, summed over examples."""
        assert kl is not None
        prompt_index, rank = batch["prompt_index"], batch["rank"]
        counts = prompt_index.bincount()[prompt_index]
        return (self.losses(sequences, rank == 0, beta, kl) / counts)[rank >= 0].sum()


class BradleyTerry:
    """-log sigma(r_chosen - r_rejected - margin) + centering (r_chosen + r_rejected)^2, r the score of a reward model.

    Source: InstructGPT, arXiv 2203.02155, eq. 1; the margin is Llama 2's, arXiv 2307.09288, eq. 2.

    Args:
        centering: >= 0; without it nothing ties the rewards of a prompt to 0 (arXiv 2312.09244, where it is 0.01).
    """

    def __init__(self, centering: float = 0.0) -> None:
        check_numbers("BradleyTerry", centering=(centering, "[0, inf)"))
        self.centering = centering

    def losses(self, chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
        """[M], one per pair, from the scores ``chosen`` and ``rejected`` [M]; ``margin`` [M], by how much the better
        one should lead.
        """
        lead = chosen - rejected if margin is None else chosen - rejected - margin
        return -logsigmoid(lead) + self.centering * (chosen + rejected).square()
