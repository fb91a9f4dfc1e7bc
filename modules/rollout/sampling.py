"""How tokens are drawn: the settings, the draw itself, and the ledger of what each request has drawn so far."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modules.functional.ranges import check_numbers
from modules.rollout.phases.partial import PartialRollouts
from modules.rollout.thinking import Thinking, ThoughtWatch
from modules.types import Completion

# Reads a turn that has ended by itself; returns the tokens that follow it, or None = the completion is over.
Reply = Callable[[str], list[int] | None]

NOT_FINITE = (
    "generate: the policy's logits are not finite, so its completions mean nothing; go back to an earlier checkpoint, with "
    "a smaller learning rate or gradient clipping"
)
BLOCK = 256  # entries of one block of the two-level search
SINGLE_BLOCK = 1024  # vocabularies up to this size are searched as one block


@dataclass(frozen=True)
class Reuse:
    """Begins a completion with the part of the prompt's last completion that the policy would still write, in training
    only. Source: SPEC-RL, arXiv 2509.23232; see ``Drafts``.

    Raises:
        ValueError: a value is out of range.
    """

    # > 0; up to 1 the completions of given weights are distributed as without reuse, and about 1 - lenience of the tokens
    # are drawn anew even where the weights stay; above 1 more is kept than the policy would write, which is biased.
    lenience: float = 1.0
    buckets: int = 32  # >= 1, likeliest tokens that are compared one by one; 8 bytes each for every token that is kept

    def __post_init__(self) -> None:
        check_numbers("sampling.reuse", lenience=(self.lenience, "(0, inf)"), buckets=(self.buckets, "[1, inf)"))


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: from logits / temperature, cut to ``top_k``, then to ``top_p``, and renormalised.

    Raises:
        ValueError: a value is out of range; one message names all of them.
    """

    temperature: float = 1.0  # >= 0; 0 = greedy
    top_p: float = 1.0  # (0, 1]; keep the smallest set of most likely tokens with at least this much probability
    top_k: int = 0  # >= 0; keep this many most likely tokens; 0 = all
    max_completion_length: int = 64  # >= 1, in tokens, the end token included
    stop: tuple[str, ...] = ()  # a completion ends when its text contains one of these strings
    keep_stop: bool = False  # whether that string stays in the text; its tokens stay in any case
    thinking: Thinking | None = None  # budget of thoughts; None = there is none
    partial: PartialRollouts | None = None  # tokens of a completion in one phase of training; None = all
    reuse: Reuse | None = None  # reuse of earlier completions, only in training; None = all tokens are sampled

    def __post_init__(self) -> None:
        checks = {
            f"temperature {self.temperature} must be a finite number >= 0 (0 = greedy)": 0
            <= self.temperature
            < math.inf,
            f"top_p {self.top_p} must lie in (0, 1]": 0 < self.top_p <= 1,
            f"top_k {self.top_k} must be >= 0 (0 = off)": self.top_k >= 0,
            f"max_completion_length {self.max_completion_length} must be >= 1": self.max_completion_length >= 1,
            f"stop {self.stop!r} must be a tuple of non-empty strings": not isinstance(self.stop, str)
            and all(self.stop),
            f"partial: max_repeats and learn_earlier do nothing where tokens_per_phase is at least max_completion_length "
            f"{self.max_completion_length}": self.partial is None
            or self.partial.tokens_per_phase < self.max_completion_length
            or (self.partial.max_repeats is None and self.partial.learn_earlier),
        }
        problems = [problem for problem, fine in checks.items() if not fine]
        if problems:
            raise ValueError("sampling: " + "; ".join(problems))
        if self.temperature > 0 and (self.top_p < 1 or self.top_k > 0):
            warnings.warn(
                f"sampling: top_p {self.top_p} and top_k {self.top_k} cut the distribution and renormalise it, so the "
                "sampler's log-probs differ from the trainer's; use top_p 1 and top_k 0 for reinforcement learning",
                stacklevel=3,
            )

    def identity(self) -> dict[str, Any]:
        """Return what determines a sample outside of training, by name: all but ``partial`` and ``reuse``."""
        return {name: value for name, value in asdict(self).items() if name not in ("partial", "reuse")}


class SampledPolicy(Protocol):
    """The part of a policy that an engine reads."""

    @property
    def model(self) -> PreTrainedModel:
        """The causal language model."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; engines use it only to turn tokens into text."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end a completion (end of sequence, end of turn)."""

    @property
    def max_positions(self) -> int | None:
        """How many tokens the model has positions for; None = no limit."""


class Ledger:
    """Holds tokens and log-probs of R requests on the model's device until all are finished.

    Each request draws with its own row of uniform numbers, made from its own seed. So its tokens do not depend on the
    requests beside it in a batch. Row R (``idle``) takes the output of slots without a request.

    Args:
        seeds: one per request.
        sampling: how tokens are drawn and when a completion ends.
        policy: gives tokenizer, end tokens and device.
        replies: one per request; a request with a reply goes on behind it, with the tokens of the reply as if they had
            been drawn. Each step has its own random number, so that replies change none of the others. None = no request
            gets one.
        thoughts: ends the thoughts of requests by a stop text, whose tokens are given likewise. None = nothing does.
        started: one per request, the beginning that it goes on from; step t has the same random number as without a
            beginning. None = all begin with their first token.

    Attributes:
        total_draws: calls of ``draw`` in this process so far, by which another thread sees that sampling goes on.
    """

    total_draws: ClassVar[int] = 0

    def __init__(
        self,
        seeds: list[int],
        sampling: Sampling,
        policy: SampledPolicy,
        replies: Sequence[Reply] | None = None,
        thoughts: ThoughtWatch | None = None,
        started: Sequence[Completion] | None = None,
    ) -> None:
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
        self._started = started
        for request, beginning in enumerate(started or ()):
            count = len(beginning.token_ids)
            self._tokens[request, :count] = torch.tensor(beginning.token_ids, dtype=torch.long, device=device)
            self._logprobs[request, :count] = torch.tensor(beginning.logprobs, device=device)
            self._counts[request] = count
        budget = sampling.max_completion_length if sampling.partial is None else sampling.partial.tokens_per_phase
        self._limits = (self._counts + budget).clamp(max=sampling.max_completion_length)
        self._is_end = torch.zeros(policy.model.config.vocab_size, dtype=torch.bool, device=device)
        stops = special_stops(policy, sampling)
        self._is_end[[*policy.stop_token_ids, *stops]] = True
        self._silent = silent_tokens(policy) | (set() if sampling.keep_stop else stops)
        self._may_complete: dict[int, bool] = {}
        self._replies, self._thoughts = replies, thoughts
        self._gives = replies is not None or thoughts is not None
        self._starts = [0] * len(seeds)  # where the last turn of each request begins
        if self._gives:
            self._given = torch.full(shape, -1, device=device)  # tokens of replies and stop texts; -1 = to be drawn
        for request in thoughts.used_up() if thoughts is not None else ():
            self._stop_thought(request, 0)
        # A token holds at least one byte, so as many tokens as a stop string has bytes cover it; four more complete a
        # character that is cut in front.
        self._tail = max((len(stop.encode()) for stop in sampling.stop), default=0) + 4

    def most_left(self) -> int:
        """Return how many tokens a request may still draw at most."""
        return int((self._limits - self._counts)[: self.idle].max())

    @property
    def reads_each_token(self) -> bool:
        """Whether the next token may depend on the text of the last one, so that no token can be drawn ahead."""
        return self._gives

    def num_drawn(self) -> int:
        """Return how many tokens the requests have got behind their beginnings, those of replies and stop texts included."""
        begun = sum(len(each.token_ids) for each in self._started or ())
        return int(self._counts[: self.idle].sum()) - begun

    def so_far(self, request: int) -> list[int]:
        """Return the tokens of a request behind its beginning."""
        begun = len(self._started[request].token_ids) if self._started is not None else 0
        ids: list[int] = self._tokens[request, begun : int(self._counts[request])].tolist()
        return ids

    def draw(self, logits: Tensor, requests: Tensor, late: bool = False) -> tuple[Tensor, Tensor]:
        """Draw and record the next token of some requests.

        Args:
            logits: [N, V].
            requests: int [N], each at most once, except ``idle``.
            late: whether stop strings are looked for later, by ``end_late``. Then the device waits for nothing here.

        Returns:
            tokens int [N]; finished bool [N], True where a request just got its last token (never for ``idle``).
        """
        Ledger.total_draws += 1
        home = logits.device
        logits, requests = logits.to(self._counts.device), requests.to(self._counts.device)
        steps = self._counts[requests]
        tokens, logprobs = sample(logits.float(), self._uniforms[requests, steps], self.sampling)
        if self._gives:
            given = self._given[requests, steps]
            tokens, logprobs = torch.where(given < 0, tokens, given), logprobs.masked_fill(given >= 0, 0.0)
        self._tokens[requests, steps] = tokens
        self._logprobs[requests, steps] = logprobs
        self._counts[requests] = steps + 1
        self._counts[self.idle] = 0
        ended = self._is_end[tokens]
        if self.sampling.stop and not late:
            ended |= self._completes_stop_string(tokens, requests, steps)
        full = steps + 1 == self._limits[requests]
        if self._gives:
            ended = ended & (given < 0) & (requests != self.idle)
        if self._thoughts is not None:
            drawn = (given < 0) & ~ended & ~full & (requests != self.idle)
            for place in self._thoughts.follow(tokens, requests, drawn, partial(self._last_tokens, requests, steps)):
                self._stop_thought(int(requests[place]), int(steps[place]) + 1)
        if self._replies is not None:
            for place in ended.nonzero()[:, 0].tolist():
                going = self._add_reply(int(requests[place]), int(steps[place]) + 1)
                ended[place], full[place] = going is None, full[place] | (going is False)
        self._ended[requests] = ended
        finished = (ended | full) & (requests != self.idle)
        return tokens.to(home), finished.to(home)

    def end_started(self) -> list[bool]:
        """Tell which beginnings are whole completions: their last token ends them, or they are full."""
        requests = torch.arange(self.idle, device=self._counts.device)
        counts = self._counts[requests]
        steps = (counts - 1).clamp(min=0)
        tokens = self._tokens[requests, steps]
        ended = self._is_end[tokens]
        if self.sampling.stop:
            ended |= self._completes_stop_string(tokens, requests, steps)
        self._ended[requests] = ended & (counts > 0)
        return (self._ended[requests] | (counts == self.sampling.max_completion_length)).tolist()

    def counts(self, requests: Tensor) -> Tensor:
        """Return how many tokens each of ``requests`` int [N] has."""
        return self._counts[requests.to(self._counts.device)]

    def end_late(self, requests: Tensor, begun: Tensor) -> Tensor:
        """End requests at the first token that completes a stop string, and forget what was drawn behind it.

        Args:
            requests: int [N], each at most once, except ``idle``.
            begun: int [N], how many tokens each had when the late draws began.

        Returns:
            bool [N], True where a request has ended so.
        """
        late, here = torch.zeros(len(requests), dtype=torch.bool), requests.to(self._counts.device)
        counts, rows = self.counts(requests).tolist(), self._tokens[here].tolist()
        for place, (request, first, count) in enumerate(zip(requests.tolist(), begun.tolist(), counts, strict=True)):
            for end in range(first + 1, count + 1) if request != self.idle else ():
                possible = self._token_may_complete(rows[place][end - 1])
                if possible and self._has_stop_string(rows[place][max(0, end - self._tail) : end]):
                    self._counts[request], self._ended[request], late[place] = end, True, True
                    break
        return late.to(requests.device)

    def completions(self, version: int) -> list[Completion]:
        """Return all requests as plain records, in order.

        Raises:
            ValueError: the policy's logits were not finite.
        """
        if not bool(self._logprobs.isfinite().all()):
            raise ValueError(NOT_FINITE)
        counts = self._counts.tolist()[: self.idle]
        tokens = [row[:count] for row, count in zip(self._tokens.tolist(), counts, strict=False)]
        logprobs = [row[:count] for row, count in zip(self._logprobs.tolist(), counts, strict=False)]
        texts = [self._decode(row[start:]) for row, start in zip(tokens, self._starts, strict=True)]
        ended = self._ended.tolist()[: self.idle]
        found = [
            Completion(ids, scores, cut_stop(text, self.sampling), "stop" if end else "length", version)
            for ids, scores, text, end in zip(tokens, logprobs, texts, ended, strict=True)
        ]
        if self._started is not None:
            found = [
                replace(each, versions=[*old.token_versions, *[version] * (len(each.token_ids) - len(old.token_ids))])
                for each, old in zip(found, self._started, strict=True)
            ]
        return [self._tell_given(each, row) for row, each in enumerate(found)] if self._gives else found

    def _add_reply(self, request: int, count: int) -> bool | None:
        """Ask for the reply to a turn that ended after ``count`` tokens of a request, and let its tokens come next.

        Returns:
            None = there is none; False = it leaves no token to draw.
        """
        assert self._replies is not None
        reply = self._replies[request](self._decode(self._tokens[request, self._starts[request] : count].tolist()))
        if reply is None:
            return None
        if not self._give(request, count, reply):
            return False
        self._starts[request] = count + len(reply)
        if self._thoughts is not None and self._thoughts.open_turn(request, reply):
            self._stop_thought(request, self._starts[request])
        return True

    def _stop_thought(self, request: int, count: int) -> None:
        """Let the stop text of a thought follow the first ``count`` tokens of a request, if there is room."""
        assert self._thoughts is not None
        self._thoughts.close(request, self._give(request, count, self._thoughts.stop_ids))

    def _give(self, request: int, count: int, ids: list[int]) -> bool:
        """Let tokens follow the first ``count`` of a request; False = they leave no token to draw, and do not follow."""
        end = count + len(ids)
        if end >= self.sampling.max_completion_length:
            return False
        self._given[request, count:end] = torch.tensor(ids, dtype=torch.long, device=self._given.device)
        return True

    def _last_tokens(self, requests: Tensor, steps: Tensor, place: int, number: int) -> list[int]:
        """Return the last ``number`` tokens of a request."""
        end = int(steps[place]) + 1
        ids: list[int] = self._tokens[int(requests[place]), max(0, end - number) : end].tolist()
        return ids

    def _tell_given(self, completion: Completion, request: int) -> Completion:
        """Return a completion with a mark on each sampled token, and with the text of all turns if there are several."""
        sampled = (self._given[request, : len(completion.token_ids)] < 0).tolist()
        if all(sampled) and not self._starts[request]:
            return completion
        told = completion.token_ids[: -1 if completion.finish == "stop" else None]
        transcript = str(self._tokenizer.decode(told)) if self._starts[request] else None
        return replace(completion, sampled=sampled, transcript=transcript)

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
        text = self._decode(tokens)
        return any(stop in text for stop in self.sampling.stop)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode([token for token in tokens if token not in self._silent]))


def cut_stop(text: str, sampling: Sampling) -> str:
    """Return the text up to the first stop string, and with it if it is kept."""
    found = [(text.index(stop), stop) for stop in sampling.stop if stop in text]
    start, stop = min(found, default=(len(text), ""))
    return text[: start + len(stop) * sampling.keep_stop]


def special_stops(policy: SampledPolicy, sampling: Sampling) -> set[int]:
    """Return the special tokens among the stop strings; they end a completion as end tokens do."""
    special = {token.content: i for i, token in policy.tokenizer.added_tokens_decoder.items() if token.special}
    return {special[stop] for stop in sampling.stop if stop in special}


def silent_tokens(policy: SampledPolicy) -> set[int]:
    """Return the tokens that have no place in a text: those that end a completion or fill up a row. Other special
    tokens, such as ``<think>``, say something.
    """
    pad = policy.tokenizer.pad_token_id
    return {*policy.stop_token_ids} | ({pad} if isinstance(pad, int) else set())


def uniform_rows(seeds: list[int], shape: tuple[int, int]) -> Tensor:
    """Make a float64 matrix of ``shape`` in [0, 1): row i from its own generator, seeded with ``seeds[i]``.

    Rows without a seed are zero.
    """
    rows = torch.zeros(shape, dtype=torch.float64)
    for row, seed in zip(rows, seeds, strict=False):
        # torch's generator reads only 32 bits of its seed
        row.copy_(torch.from_numpy(np.random.default_rng(seed).random(shape[1])))
    return rows


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row, and return it with its log-probability under the distribution it was drawn from.

    Args:
        logits: [N, V] fp32.
        uniforms: float64 [N] in [0, 1); the token of row i depends on entry i alone. Greedy sampling does not use them.
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
    """Set the logits [N, V] to -inf outside the ``top_k`` largest, and then outside the ``top_p`` nucleus.

    The nucleus holds the most likely tokens in order, up to and including the one that brings their sum to ``top_p``.

    Args:
        logits: [N, V].
        top_k: how many to keep; ties are all kept; 0 = all.
        top_p: (0, 1]; 1 = no nucleus.
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
    """Find the entry whose slice of the cumulative distribution holds the uniform number: exact sampling.

    It finds the block first and then the entry inside it, so that only one pass reads the whole vocabulary. Sums are
    float64. An entry with probability zero is never chosen.

    Args:
        probabilities: [N, V], >= 0, each row with a positive sum.
        uniforms: float64 [N] in [0, 1).

    Returns:
        index int [N].
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
    """Find the slice of the cumulative ``weights`` float64 [N, K] that holds each of ``uniforms`` [N].

    Returns:
        index int [N] of the slice, and the place inside it, float64 [N] in [0, 1].
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total there is always a larger cumulative sum, and the entry that makes it larger is not zero.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[1] - 1)
    weight = weights.gather(1, index)
    return index[:, 0], ((target - (cumulative.gather(1, index) - weight)) / weight)[:, 0].clamp(0, 1)
