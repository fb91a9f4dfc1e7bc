"""Losses on preferences: what a comparison of two completions, or a label on one, asks of the policy. Log-probs are in
nats.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from modules.functional.logprobs import sequence_logprobs
from modules.losses import preference_loss as losses
from modules.types import PolicyBatch, PreferenceBatch


class Sequences(NamedTuple):
    """Completions, one number each."""

    logps: Tensor  # [N], sum of the token log-probs (each times its weight), with gradient
    ref_logps: Tensor  # [N], the same under the reference; zeros without one
    lengths: Tensor  # [N], tokens, the end token included
    plain: Tensor  # [N], logps without the weights

    def at(self, rows: Tensor) -> "Sequences":
        """Those of ``rows`` [M]."""
        return Sequences(*(part[rows] for part in self))


class PreferenceObjective(ABC):
    """A loss on the ranked or labelled completions of a micro-batch."""

    uses_reference = True
    compares_mismatched = False  # whether it needs the KL on completions of other prompts
    beta = 0.1  # the default

    def token_weights(self, batch: PreferenceBatch | PolicyBatch) -> Tensor:
        """What each token's log-prob counts in its sequence's sum, [N, Tc]."""
        return batch["completion_mask"].float()

    def implicit_rewards(self, sequences: Sequences, beta: float) -> Tensor:
        """The reward [N] that the policy stands for, up to a constant per prompt: beta log(pi / pi_ref)."""
        return beta * (sequences.logps - sequences.ref_logps)

    @abstractmethod
    def total(self, sequences: Sequences, prompt_index: Tensor, rank: Tensor, beta: float, kl: Tensor) -> Tensor:
        """Sum [] of the loss over examples; prompt_index and rank int [N]; ``kl`` [] is that on mismatched completions,
        0 unless asked for.
        """


class PairObjective(PreferenceObjective):
    """A loss on pairs; the pairs of an example share its weight."""

    @abstractmethod
    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        """[M], one per pair."""

    def total(self, sequences: Sequences, prompt_index: Tensor, rank: Tensor, beta: float, kl: Tensor) -> Tensor:
        """Mean over the pairs of each example, summed over examples."""
        better, worse, weight = losses.preference_pairs(prompt_index, rank)
        return (self.losses(sequences.at(better), sequences.at(worse), beta) * weight).sum()


def _four(chosen: Sequences, rejected: Sequences) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return chosen.logps, rejected.logps, chosen.ref_logps, rejected.ref_logps


class Sigmoid(PairObjective):
    """DPO: -log sigma(beta h), h = log-ratio of the chosen minus that of the rejected (arXiv 2305.18290 eq. 7).

    Args:
        label_smoothing: [0, 0.5), the share of labels that are taken to be wrong (conservative DPO); the loss is then
            least at sigma(beta h) = 1 - label_smoothing instead of at infinity.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = _noise(label_smoothing)

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        return losses.dpo_loss(*_four(chosen, rejected), beta, self.label_smoothing)


class Robust(PairObjective):
    """DPO's loss corrected for labels that are wrong with a known probability, without bias (arXiv 2403.00409).

    Args:
        label_smoothing: [0, 0.5), that probability.
    """

    def __init__(self, label_smoothing: float = 0.1) -> None:
        self.label_smoothing = _noise(label_smoothing)

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        return losses.robust_dpo_loss(*_four(chosen, rejected), beta, self.label_smoothing)


class IPO(PairObjective):
    """(h - 1 / (2 beta))^2: a margin to meet and not to exceed (arXiv 2310.12036 eq. 17; beta is the paper's tau).

    Args:
        average: take h of means per token (as TRL does) instead of sums (as the paper does); beta does not carry over
            between them.
    """

    def __init__(self, average: bool = False) -> None:
        self.average = average

    def implicit_rewards(self, sequences: Sequences, beta: float) -> Tensor:
        return super().implicit_rewards(_means(sequences) if self.average else sequences, beta)

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        sides = [_means(side) if self.average else side for side in (chosen, rejected)]
        return losses.ipo_loss(*_four(*sides), beta)


class Hinge(PairObjective):
    """max(0, 1 - beta h): SLiC-HF (arXiv 2305.10425); its own form is reference-free with a likelihood term
    (``nll_weight``).
    """

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        return losses.hinge_loss(*_four(chosen, rejected), beta)


class LengthNormalized(PairObjective):
    """DPO on log-ratios per token (Tulu 3, arXiv 2411.15124); beta is larger accordingly, 5 by default."""

    beta = 5.0

    def implicit_rewards(self, sequences: Sequences, beta: float) -> Tensor:
        return super().implicit_rewards(_means(sequences), beta)

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        return losses.length_normalized_dpo_loss(*_four(chosen, rejected), chosen.lengths, rejected.lengths, beta)


class LengthMargin(PairObjective):
    """R-DPO: -log sigma(beta h + alpha (chosen tokens - rejected tokens)), so that length explains part of a preference
    (arXiv 2403.19159).

    Args:
        alpha: >= 0, per token.
    """

    def __init__(self, alpha: float = 0.01) -> None:
        if alpha < 0:
            raise ValueError(f"LengthMargin alpha must be >= 0, got {alpha}: a negative one rewards length")
        self.alpha = alpha

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        return losses.length_margin_dpo_loss(
            *_four(chosen, rejected), chosen.lengths, rejected.lengths, beta, self.alpha
        )


class LengthDesensitized(Sigmoid):
    """LD-DPO: tokens behind the length that all completions of the prompt reach count ``alpha`` (arXiv 2409.06411).

    Args:
        alpha: [0, 1]; 1 = DPO.
        label_smoothing: as in ``Sigmoid``.
    """

    def __init__(self, alpha: float = 0.5, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        if not 0 <= alpha <= 1:
            raise ValueError(f"LengthDesensitized alpha must lie in [0, 1], got {alpha}")
        self.alpha = alpha

    def token_weights(self, batch: PreferenceBatch | PolicyBatch) -> Tensor:
        return losses.length_desensitized_weights(batch["completion_mask"], batch["prompt_index"], self.alpha)


class SimPO(PairObjective):
    """-log sigma(beta (mean log-prob of chosen - of rejected) - gamma), without a reference (arXiv 2405.14734).

    Args:
        gamma: >= 0, the target margin itself (the paper's code names gamma / beta, 0.25 to 0.5).
    """

    uses_reference = False
    beta = 2.0

    def __init__(self, gamma: float = 0.5) -> None:
        if gamma < 0:
            raise ValueError(f"SimPO gamma must be >= 0, got {gamma}")
        self.gamma = gamma

    def implicit_rewards(self, sequences: Sequences, beta: float) -> Tensor:
        return super().implicit_rewards(_means(sequences), beta)

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        return losses.simpo_loss(_means(chosen).logps, _means(rejected).logps, beta, self.gamma)


class ORPO(PairObjective):
    """Likelihood of the chosen completion plus beta x -log sigma(log odds ratio), without a reference (arXiv
    2403.07691).
    """

    uses_reference = False

    def implicit_rewards(self, sequences: Sequences, beta: float) -> Tensor:
        return super().implicit_rewards(_means(sequences), beta)

    def losses(self, chosen: Sequences, rejected: Sequences, beta: float) -> Tensor:
        better, worse = _means(chosen).logps, _means(rejected).logps
        return -better + beta * losses.orpo_odds_loss(better, worse)


class KTO(PreferenceObjective):
    """Each completion against the KL to the reference: lambda (1 - sigma(+-beta (log-ratio - kl))) (arXiv 2402.01306).

    For labelled completions; of ranked ones the best counts as desirable and the others as undesirable.
    The KL is the mean log-ratio of completions put behind the next prompt of the micro-batch, over ranks, at least 0.

    Args:
        desirable_weight: lambda of desirable completions; with n of each, the paper wants lambda_D n_D / (lambda_U n_U)
            in [1, 4/3].
        undesirable_weight: lambda of the others.
    """

    compares_mismatched = True

    def __init__(self, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        if min(desirable_weight, undesirable_weight) < 0:
            raise ValueError(f"KTO weights must be >= 0, got {desirable_weight} and {undesirable_weight}")
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def total(self, sequences: Sequences, prompt_index: Tensor, rank: Tensor, beta: float, kl: Tensor) -> Tensor:
        """Mean over the completions of each example, summed over examples."""
        counts = prompt_index.bincount()[prompt_index]
        each = losses.kto_loss(
            sequences.logps, sequences.ref_logps, rank == 0, kl, beta, self.desirable_weight, self.undesirable_weight
        )
        return (each / counts)[rank >= 0].sum()


def _means(sequences: Sequences) -> Sequences:
    """Per token."""
    return sequences._replace(
        logps=sequences.logps / sequences.lengths, ref_logps=sequences.ref_logps / sequences.lengths
    )


def _noise(share: float) -> float:
    if not 0 <= share < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {share}")
    return share


def sequences_of(
    objective: PreferenceObjective, logprobs: Tensor, ref_logprobs: Tensor | None, batch: PreferenceBatch | PolicyBatch
) -> Sequences:
    """Token log-probs [N, Tc] (the reference's may be missing) summed as the objective wants."""
    weights, mask = objective.token_weights(batch), batch["completion_mask"]
    reference = (
        torch.zeros(len(weights), device=weights.device)
        if ref_logprobs is None
        else sequence_logprobs(ref_logprobs, weights)
    )
    return Sequences(
        sequence_logprobs(logprobs, weights), reference, mask.sum(1).float(), sequence_logprobs(logprobs, mask)
    )
