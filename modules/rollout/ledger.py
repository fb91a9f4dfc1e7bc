"""The record of one ``generate`` call: what each request has drawn so far, and when it is finished."""

import numpy as np
import torch
from torch import Tensor

from modules.rollout.engine import SampledPolicy, Sampling
from modules.rollout.sampler import sample
from modules.types import Completion


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
