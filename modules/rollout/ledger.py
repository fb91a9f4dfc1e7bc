"""How tokens are drawn, and the record of one ``generate`` call: what each request has drawn, and when it is finished."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from modules.rollout.engine import SampledPolicy, Sampling
from modules.types import Completion

BLOCK = 256  # entries of one block of the two-level search
SINGLE_BLOCK = 1024  # vocabularies up to this size are searched in one go


class Ledger:
    """Tokens and log-probs of R requests, kept on the model's device until all are finished.

    Request r has its own row of uniform numbers, drawn from its own seed, so its tokens do not depend on what it is
    batched with. Row R (``idle``) takes what slots without a request produce.

    Args:
        seeds: one per request.
        sampling: how tokens are drawn and when a completion ends.
        policy: its tokenizer, end tokens and device.
    """

    def __init__(self, seeds: list[int], sampling: Sampling, policy: SampledPolicy) -> None:
        self.sampling = sampling
        self.idle = len(seeds)
        self._tokenizer = policy.tokenizer
        # Sampling sums in float64, which Apple's MPS does not have.
        device = torch.device("cpu") if policy.model.device.type == "mps" else policy.model.device
        shape = (len(seeds) + 1, sampling.max_completion_length)
        self._uniforms = uniform_rows([] if sampling.temperature == 0 else seeds, shape).to(device)
        self._tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(shape, device=device)
        self._counts = torch.zeros(shape[0], dtype=torch.long, device=device)
        self._ended = torch.zeros(shape[0], dtype=torch.bool, device=device)
        self._is_end = torch.zeros(policy.model.config.vocab_size, dtype=torch.bool, device=device)
        special = {token.content: i for i, token in policy.tokenizer.added_tokens_decoder.items() if token.special}
        self._is_end[[*policy.stop_token_ids, *(special[stop] for stop in sampling.stop if stop in special)]] = True
        self._may_complete: dict[int, bool] = {}
        # A token holds at least one byte of text, so this many tokens cover a stop string; four more finish a cut
        # character.
        self._tail = max((len(stop.encode()) for stop in sampling.stop), default=0) + 4

    def draw(self, logits: Tensor, requests: Tensor) -> tuple[Tensor, Tensor]:
        """Draw and record the next token of some requests.

        Args:
            logits: [N, V].
            requests: int [N], each at most once, except ``idle``.

        Returns:
            tokens int [N]; finished bool [N], True where a request just got its last token (never for ``idle``).
        """
        home = logits.device
        logits, requests = logits.to(self._counts.device), requests.to(self._counts.device)
        steps = self._counts[requests]
        tokens, logprobs = sample(logits.float(), self._uniforms[requests, steps], self.sampling)
        self._tokens[requests, steps] = tokens
        self._logprobs[requests, steps] = logprobs
        self._counts[requests] = steps + 1
        self._counts[self.idle] = 0
        ended = self._is_end[tokens]
        if self.sampling.stop:
            ended |= self._completes_stop_string(tokens, requests, steps)
        self._ended[requests] = ended
        finished = (ended | (steps + 1 == self.sampling.max_completion_length)) & (requests != self.idle)
        return tokens.to(home), finished.to(home)

    def completions(self, version: int) -> list[Completion]:
        """All requests as plain records, in order; ValueError where the policy's logits were not finite."""
        if not bool(self._logprobs.isfinite().all()):
            raise ValueError(
                "generate: the policy's logits are not finite, so its completions mean nothing; look at the last "
                "updates"
            )
        counts = self._counts.tolist()[: self.idle]
        tokens = [row[:count] for row, count in zip(self._tokens.tolist(), counts, strict=False)]
        logprobs = [row[:count] for row, count in zip(self._logprobs.tolist(), counts, strict=False)]
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True) if tokens else []
        ended = self._ended.tolist()[: self.idle]
        return [
            Completion(ids, scores, self._cut(text), "stop" if end else "length", version)
            for ids, scores, text, end in zip(tokens, logprobs, texts, ended, strict=True)
        ]

    def _completes_stop_string(self, tokens: Tensor, requests: Tensor, steps: Tensor) -> Tensor:
        """bool [N]: the tail of the request's text holds a stop string. Decodes only rows whose new token can complete
        one.
        """
        hits = []
        for token, request, step in zip(tokens.tolist(), requests.tolist(), steps.tolist(), strict=True):
            possible = request != self.idle and self._token_may_complete(token)
            hits.append(
                possible
                and self._has_stop_string(self._tokens[request, max(0, step + 1 - self._tail) : step + 1].tolist())
            )
        return torch.tensor(hits, device=tokens.device)

    def _token_may_complete(self, token: int) -> bool:
        """Whether the last character of a stop string can come from this token. Alone, a token may lose spaces or half
        a character.
        """
        if token not in self._may_complete:
            text = self._tokenizer.decode([token])
            lasts = {stop[-1] for stop in self.sampling.stop}
            self._may_complete[token] = "\ufffd" in text or any(last in text or last.isspace() for last in lasts)
        return self._may_complete[token]

    def _has_stop_string(self, tokens: list[int]) -> bool:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return any(stop in text for stop in self.sampling.stop)

    def _cut(self, text: str) -> str:
        """The text before the first stop string."""
        return text[: min((text.index(stop) for stop in self.sampling.stop if stop in text), default=None)]


def uniform_rows(seeds: list[int], shape: tuple[int, int]) -> Tensor:
    """float64 ``shape`` in [0, 1): row i from a generator of its own, seeded with ``seeds[i]``; rows without a seed are
    zero.
    """
    rows = torch.zeros(shape, dtype=torch.float64)
    for row, seed in zip(rows, seeds, strict=False):
        # not torch's generator, which looks at 32 bits of its seed only
        row.copy_(torch.from_numpy(np.random.default_rng(seed).random(shape[1])))
    return rows


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability under the distribution it was drawn from.

    Args:
        logits: [N, V] fp32.
        uniforms: float64 [N] in [0, 1); row i's token depends on row i alone. Unused for greedy.
        sampling: temperature, top_k, top_p.

    Returns:
        tokens int [N], log-probs [N] in nats (greedy: of the softmax at temperature 1).
    """
    if sampling.temperature == 0:
        probabilities = logits.softmax(-1)
        tokens = logits.argmax(-1)
    else:
        probabilities = truncate(logits / sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1)
        tokens = invert_cdf(probabilities, uniforms)
    return tokens, probabilities.gather(1, tokens[:, None])[:, 0].log()


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [N, V] with -inf outside the ``top_k`` largest (ties kept, 0 = all) and then outside the ``top_p``
    nucleus.

    The nucleus holds the likeliest tokens in order, up to and including the one whose probability brings the sum to
    ``top_p``.
    """
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return logits


def invert_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Index int [N] whose slice of the cumulative distribution holds ``uniforms``: exact sampling, never a
    zero-probability entry.

    Finds the block first, then the entry in it, so that only one pass reads all of the vocabulary. Sums are float64.

    Args:
        probabilities: [N, V], >= 0, each row with a positive sum.
        uniforms: float64 [N] in [0, 1).
    """
    size = probabilities.shape[1]
    block = size if size <= SINGLE_BLOCK else BLOCK
    blocks = F.pad(probabilities, (0, -size % block)).unflatten(1, (-1, block))  # [N, V/block, block]
    totals = blocks.sum(-1).double()
    chosen, rest = _locate(totals, uniforms)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), chosen].double()
    entry, _ = _locate(inside, rest)
    return (chosen * block + entry).clamp(max=size - 1)


def _locate(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Find the slice of cumulative ``weights`` float64 [N, K] that holds each of ``uniforms`` [N].

    The second result is how far inside its slice each number lies, in [0, 1].
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    # Strictly below the total there is always a next larger sum, and the entry that makes it larger is not zero.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[1] - 1)
    weight = weights.gather(1, index)
    return index[:, 0], ((target - (cumulative.gather(1, index) - weight)) / weight)[:, 0].clamp(0, 1)
