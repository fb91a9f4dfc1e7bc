"""Losses on preferences, one value per pair or per completion; the caller weighs, sums and divides.

Shared arguments. policy_chosen, policy_rejected [N]: log-probs of the better and the worse completion of each pair now,
with gradient, in nats, summed over the completion's tokens with its end token (means only where the name says so).
ref_chosen, ref_rejected [N]: the same under the frozen reference. delta = policy - ref of one completion, h =
delta_chosen - delta_rejected. beta > 0: nats to logits; beta delta is the implicit reward. All returns are [N] unless
said otherwise, and finite with finite gradients however large h is.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centering: float = 0.0
) -> Tensor:
    """-log sigma(chosen - rejected - margin) + centering (chosen + rejected)^2.

    chosen, rejected: [N], rewards. margin: [N], by how much the better one should lead (Llama 2, 2307.09288, eq. 2);
    None = 0.
    centering: >= 0; without it nothing ties the rewards of a prompt to 0 (Eisenstein et al. 2312.09244, where it is
    0.01).
    """
    lead = chosen - rejected if margin is None else chosen - rejected - margin
    return -logsigmoid(lead) + centering * (chosen + rejected).square()


def ranking_loss(rewards: Tensor) -> Tensor:
    """Mean of -log sigma(r_i - r_j) over all C(K, 2) pairs i < j of one prompt (InstructGPT, 2203.02155, eq. 1).

    rewards: [K], K >= 2, the best completion first and no ties. Returns []. Raises ValueError for another shape.
    """
    if rewards.dim() != 1 or len(rewards) < 2:
        raise ValueError(
            f"ranking_loss: rewards have shape {tuple(rewards.shape)}, expected [K] with K >= 2; leave out prompts "
            "with one completion."
        )
    better, worse = torch.triu_indices(len(rewards), len(rewards), offset=1, device=rewards.device)  # [C(K, 2)] each
    return bradley_terry_loss(rewards[better], rewards[worse]).mean()


def _h(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """delta_chosen - delta_rejected [N], exactly 0 where policy and reference agree."""
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-(1 - e) log sigma(beta h) - e log sigma(-beta h), e = label_smoothing (DPO, 2305.18290, eq. 7; e > 0 is
    conservative DPO).

    Log-probs [N] as above. label_smoothing: in [0, 0.5), the share of labels taken to be wrong; the loss is lowest at
    sigma(beta h) = 1 - e.
    """
    logit = beta * _h(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)


def robust_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """(-(1 - e) log sigma(beta h) + e log sigma(-beta h)) / (1 - 2 e): in the mean over labels that flip at rate e, the
    loss of clean ones.

    Log-probs [N] as above. label_smoothing: e in [0, 0.5), the rate at which labels are wrong. Unbounded below as h
    grows, unlike conservative DPO. Raises ValueError for another rate. Source: 2403.00409.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"robust_dpo_loss: label_smoothing is {label_smoothing}, expected in [0, 0.5): at 0.5 labels say nothing."
        )
    logit = beta * _h(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return (-(1 - label_smoothing) * logsigmoid(logit) + label_smoothing * logsigmoid(-logit)) / (
        1 - 2 * label_smoothing
    )


def ipo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, tau: float
) -> Tensor:
    """(h - 1 / (2 tau))^2 (IPO, 2310.12036, eq. 17).

    Log-probs [N] as above, sums as in the paper; code that feeds means per token needs another tau. tau: > 0; the
    larger, the closer to the reference.
    """
    return (_h(policy_chosen, policy_rejected, ref_chosen, ref_rejected) - 1 / (2 * tau)).square()


def hinge_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """max(0, 1 - beta h) (SLiC-HF, 2305.10425, against a reference). Log-probs [N] as above."""
    return (1 - beta * _h(policy_chosen, policy_rejected, ref_chosen, ref_rejected)).relu()


def length_normalized_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
) -> Tensor:
    """-log sigma(beta (delta_chosen / length_chosen - delta_rejected / length_rejected)) (Tulu 3, 2411.15124, with beta
    = 5).

    Log-probs [N] as above. chosen_lengths, rejected_lengths: [N], tokens, at least 1.
    """
    per_token = (policy_chosen - ref_chosen) / chosen_lengths - (policy_rejected - ref_rejected) / rejected_lengths
    return -logsigmoid(beta * per_token)


def length_margin_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    alpha: float,
) -> Tensor:
    """-log sigma(beta h + alpha (length_chosen - length_rejected)) (R-DPO, 2403.19159).

    Log-probs [N] as above. chosen_lengths, rejected_lengths: [N], tokens. alpha: >= 0, logits per token. The optimum of
    r - alpha length under a KL penalty has r = beta log(policy / ref) + alpha length + constant, hence the plus: length
    explains part of the preference for a longer answer, so its pair pulls less. A minus would reward length.
    """
    logit = beta * _h(policy_chosen, policy_rejected, ref_chosen, ref_rejected) + alpha * (
        chosen_lengths - rejected_lengths
    )
    return -logsigmoid(logit)


def simpo_loss(chosen_mean_logprob: Tensor, rejected_mean_logprob: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigma(beta (chosen - rejected) - gamma) (SimPO, 2405.14734, eq. 6), without a reference.

    chosen_mean_logprob, rejected_mean_logprob: [N], mean over the completion's tokens. beta: 2 to 10. gamma: the margin
    itself, in logits; the authors' settings give gamma / beta.
    """
    return -logsigmoid(beta * (chosen_mean_logprob - rejected_mean_logprob) - gamma)


def _log_odds(mean_logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_logprob) [N], with log p kept at or below -1e-6."""
    logprob = mean_logprob.clamp(max=-1e-6)
    return logprob - torch.log(-torch.expm1(logprob))


def orpo_odds_loss(chosen_mean_logprob: Tensor, rejected_mean_logprob: Tensor) -> Tensor:
    """-log sigma(log odds(chosen) - log odds(rejected)), odds = p / (1 - p) (ORPO, 2403.07691), without a reference.

    chosen_mean_logprob, rejected_mean_logprob: [N], <= 0, mean over the completion's tokens: the log of p. The whole of
    ORPO adds it, times 0.1 or so, to the cross-entropy of the chosen completion.
    """
    return -logsigmoid(_log_odds(chosen_mean_logprob) - _log_odds(rejected_mean_logprob))


def kto_loss(
    policy_logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """weight (1 - sigma(beta (delta - z))) for a desirable completion, weight (1 - sigma(beta (z - delta))) for another
    (KTO, 2402.01306).

    policy_logp, ref_logp: [N], sums as above. desirable: bool [N]. kl: [] or [N], an estimate of KL(policy ||
    reference) in nats; z = max(0, kl) without gradient. desirable_weight, undesirable_weight: >= 0. Returns [N],
    between 0 and the weight.
    """
    lead = beta * (policy_logp - ref_logp - kl.detach().clamp(min=0))
    return torch.where(desirable, desirable_weight * torch.sigmoid(-lead), undesirable_weight * torch.sigmoid(lead))


def preference_pairs(prompt_index: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of completions of one prompt of which one ranks before the other.

    prompt_index: int [N], in 0..P-1. rank: int [N], 0 = best; equal ranks make no pair, a negative one pairs with
    nothing. Returns (better int [M], worse int [M], weight [M]): rows of the N, ordered by the better one's row and
    then by the other's, and 1 / (pairs of the prompt), so that each prompt with any pair weighs 1. Example: ranks 0 1 1
    of one prompt give (0, 1) and (0, 2), 1/2 each.
    """
    same_prompt = prompt_index[:, None] == prompt_index  # [N, N]
    before = (rank[:, None] >= 0) & (rank[:, None] < rank)  # [N, N]
    better, worse = (same_prompt & before).nonzero(as_tuple=True)
    prompt = prompt_index[better]  # [M]
    return better, worse, 1.0 / torch.bincount(prompt)[prompt]


def length_desensitized_weights(mask: Tensor, prompt_index: Tensor, alpha: float) -> Tensor:
    """Weights of the tokens' log-probs that take length out of DPO (LD-DPO, 2409.06411, where alpha is about 0.5).

    mask: bool [N, Tc]. prompt_index: int [N]. alpha: in [0, 1]; 1 is DPO. Returns float [N, Tc]: 1 for the kept tokens
    of each row up to the length of the prompt's shortest completion, alpha for those beyond, 0 at dropped columns. With
    more than two completions per prompt the shortest of all is the measure, so that a completion has one sum in all its
    pairs.
    """
    lengths = mask.sum(1)  # [N]
    same_prompt = prompt_index[:, None] == prompt_index  # [N, N]
    shortest = torch.where(same_prompt, lengths, mask.shape[1]).amin(1)  # [N]
    return torch.where(mask.cumsum(1) <= shortest[:, None], 1.0, alpha).masked_fill(~mask, 0.0)
