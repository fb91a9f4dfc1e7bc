"""The record of one ``generate`` call: what each request has drawn so far, and whether it is finished."""

import numpy as np
import torch
from torch import Tensor

from modules.rollout.engine import SampledPolicy, Sampling
from modules.rollout.sampler import sample
from modules.types import Completion


class Ledger:
    """Holds tokens and log-probs of R requests on the model's device until all are finished.

    Each request draws with its own row of uniform numbers, made from its own seed. So its tokens do not depend on the
    requests beside it in a batch. Row R (``idle``) takes the output of slots without a request.

    Args:
        seeds: one per request.
        sampling: how tokens are drawn and when a completion ends.
        policy: gives tokenizer, end tokens and device.
    """

    def __init__(self, seeds: list[int], sampling: Sampling, policy: SampledPolicy) -> None:
        self.sampling = sampling
        self.idle = len(seeds)
        self._tokenizer = policy.tokenizer
        # The sampler sums in float64, which Apple's MPS does not have.
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
        # A token holds at least one byte, so as many tokens as a stop string has bytes cover it; four more complete a
        # character that is cut in front.
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
        """Return all requests as plain records, in order.

        Raises:
            ValueError: the policy's logits were not finite.
        """
        if not bool(self._logprobs.isfinite().all()):
            raise ValueError(
                "generate: the policy's logits are not finite, so its completions mean nothing; go back to an earlier "
                "checkpoint, with a smaller learning rate or gradient clipping"
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
        """Return where the end of a request's text contains a stop string: bool [N].

        It decodes only rows whose new token can complete a stop string.
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
        """Return whether this token can bring the last character of a stop string.

        Decoded alone, a token may lose spaces or half a character, so such tokens count as possible.
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
        """Return the text before the first stop string."""
        return text[: min((text.index(stop) for stop in self.sampling.stop if stop in text), default=None)]


def uniform_rows(seeds: list[int], shape: tuple[int, int]) -> Tensor:
    """Make a float64 matrix of ``shape`` in [0, 1): row i from its own generator, seeded with ``seeds[i]``.

    Rows without a seed are zero.
    """
    rows = torch.zeros(shape, dtype=torch.float64)
    for row, seed in zip(rows, seeds, strict=False):
        # torch's generator reads only 32 bits of its seed
        row.copy_(torch.from_numpy(np.random.default_rng(seed).random(shape[1])))
    return rows
