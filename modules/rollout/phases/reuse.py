"""Reuse of rollouts: the last completion of a prompt is the draft of its next one (SPEC-RL, arXiv 2509.23232)."""

import hashlib
import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from modules.functional.masked import pad_rows
from modules.losses.distillation import gather_buckets
from modules.networks.policy import Policy
from modules.rollout.engine import InProcessEngine, RolloutEngine
from modules.rollout.environment import Environment
from modules.rollout.sampling import Ledger, Sampling, invert_cdf, truncate
from modules.rollout.scoring import take_chunk
from modules.trainer.ranks import from_all_ranks
from modules.types import Completion, PolicyBatch, Rollout

STREAM = 2  # number of the random stream that verifies drafts


class Draft(NamedTuple):
    """Completions with T tokens together, one after the other, and what their policy said of each token."""

    tokens: Tensor  # int32 [T]
    ids: Tensor  # int32 [T, k], the likeliest tokens in place of each token
    logprobs: Tensor  # [T, k + 1], theirs and that of all other tokens together, nats
    # [T, 2], where the other tokens in the order of their numbers share [0, 1] by their probabilities: where the part of
    # the token that was drawn begins, and its size. Of a token that is among the likeliest: 0 and 0.
    places: Tensor

    def split(self, lengths: list[int]) -> list["Draft"]:
        """Return each completion."""
        return [Draft(*parts) for parts in zip(*(column.split(lengths) for column in self), strict=True)]

    @staticmethod
    def join(drafts: Iterable["Draft"]) -> "Draft":
        """Return the completions as one."""
        return Draft(*(torch.cat(parts) for parts in zip(*drafts, strict=True)))


class Drafts:
    """The last completions of the prompts of all ranks, which the next phase of a prompt begins with.

    A draft's token x was drawn from q, and the policy now says p. Both are known of k + 1 buckets: the k likeliest tokens
    of q, one each, and all other tokens. The bucket B of x is accepted with probability min(1, l p_B / q_B), l being the
    lenience; else B is drawn from (p - min(q, l p))+. A bucket of one token gives that token, and from the bucket of all
    others a token is drawn by p. There p finds the token at the place in [0, 1] where q would have found x, so that it is
    x if little has changed. The draft is followed while these tokens are its own; behind the first other one the engine
    goes on.

    Proof that this is exact for l <= 1 and every k: B is drawn and accepted with probability min(q_B, l p_B), and else
    with the rest of p_B, since the rejections add up to the sum of p - min(q, l p); so P(B) = p_B. In B the token is drawn
    by p, as a place drawn evenly in the part of x, with x drawn by q, is even in [0, 1]. The buckets depend on the tokens
    before x alone, and so does whether x is looked at; so each token is drawn by p, given those before it.

    Of q, the paper keeps only the probability of the draft's own token, and after a rejection it goes on by p. That is
    not exact at l = 1: tokens that p finds less likely than q come too often. To draw fewer of them one must know what
    q says of other tokens.

    This exactness holds for weights that do not depend on the draft. A policy that has learned from the draft favours
    it, and at a small learning rate completions stay the same for many phases; a lenience below 1 draws some of them
    anew.

    Args:
        policy: what is trained; its forwards give p and q, so that engines may be of any kind.
        sampling: with ``reuse``. Both p and q are those after temperature, ``top_k`` and ``top_p``.
    """

    def __init__(self, policy: Policy, sampling: Sampling) -> None:
        assert sampling.reuse is not None
        self.policy, self.sampling, self.reuse = policy, sampling, sampling.reuse
        # By prompt the lengths of its completions, in the order of generations, and these; equal on all ranks.
        self._kept: dict[str, tuple[list[int], Draft]] = {}
        self._used: set[str] = set()  # prompts whose drafts this phase has used, since a draft makes one completion
        self._counts: defaultdict[str, float] = defaultdict(float)  # of this phase
        self._seconds_per_token: float | None = None  # of the last phase that had no drafts

    def generate(
        self, engine: RolloutEngine, prompts: list[list[int]], num_generations: int, seeds: list[int], version: int
    ) -> list[list[Completion]]:
        """Sample as ``RolloutEngine.generate`` does, with the synced weights of ``version``, from the drafts on."""
        start = time.perf_counter()
        drafts = [draft for prompt in prompts for draft in self._take(prompt, num_generations)]
        requests = [seed + g for seed in seeds for g in range(num_generations)]
        if not any(len(draft.tokens) for draft in drafts if draft is not None):
            groups = engine.generate(prompts, num_generations, self.sampling, seeds)
            done, reused = [completion for group in groups for completion in group], [0] * len(requests)
            verified = start
        else:
            rows = [prompts[i // num_generations] for i in range(len(requests))]
            begun, reused = self._verify(rows, drafts, requests, version)
            verified = time.perf_counter()
            done = self._finish(engine, rows, requests, begun, version)
        counts = {
            "completions": len(done),
            "drafts": sum(draft is not None for draft in drafts),
            "whole": sum(len(each.token_ids) == count for each, count in zip(done, reused, strict=True)),
            "tokens": sum(len(each.token_ids) for each in done),
            "reused": sum(reused),
            "verifying": verified - start,
            "sampling": time.perf_counter() - verified,
        }
        for name, count in counts.items():
            self._counts[name] += count
        return [done[first : first + num_generations] for first in range(0, len(done), num_generations)]

    def noting(self, score: Callable[[PolicyBatch], tuple[Tensor, ...]]) -> Callable[[PolicyBatch], tuple[Tensor, ...]]:
        """Return a function that scores a batch as ``score`` does, and adds what ``remember`` takes."""

        def scored(batch: PolicyBatch) -> tuple[Tensor, ...]:
            mask, found = batch["completion_mask"], list[tuple[Tensor, ...]]()
            tokens = batch["completion_ids"][mask]

            def watch(logprobs: Tensor) -> None:
                first = sum(len(ids) for ids, *_ in found)
                found.append(
                    describe_tokens(self._cut(logprobs), tokens[first : first + len(logprobs)], self.reuse.buckets)
                )

            with self.policy.watching(watch):
                scores = score(batch)
            return (*scores, *(spread_rows(torch.cat(parts), mask) for parts in zip(*found, strict=True)))

        return scored

    def remember(self, rollouts: Sequence[Rollout], *noted: Tensor) -> dict[str, float]:
        """Keep a phase's completions as the drafts of their prompts, and return the phase's metrics (collective).

        Args:
            rollouts: of this rank, prompt by prompt.
            noted: of their tokens, ``ids``, ``logprobs`` and ``places`` of a ``Draft``, each [N, Tc, ...].
        """
        lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
        columns, device = torch.arange(noted[0].shape[1]), noted[0].device
        mask = (columns < torch.tensor(lengths)[:, None]).to(device)
        tokens = [token for rollout in rollouts for token in rollout.completion.token_ids]
        everything = Draft(torch.tensor(tokens, dtype=torch.int32), *(each[mask].cpu() for each in noted))
        groups = [list(group) for _, group in groupby(range(len(rollouts)), key=lambda i: rollouts[i].group)]
        mine = {}
        parts = everything.split([sum(lengths[i] for i in group) for group in groups])
        for group, part in zip(groups, parts, strict=True):
            # copies: a view keeps, and sends to other ranks, the completions of all prompts
            mine[self._key(rollouts[group[0]].prompt_ids)] = ([lengths[i] for i in group], Draft.join([part]))
        self._kept |= dict(from_all_ranks(list(mine.items())))
        ranks = from_all_ranks([dict(self._counts)])
        counts = defaultdict(float, {name: sum(rank.get(name, 0.0) for rank in ranks) for name in ranks[0]})
        self._used, self._counts = set(), defaultdict(float)
        drawn = counts["tokens"] - counts["reused"]
        if not counts["drafts"] and drawn:
            self._seconds_per_token = counts["sampling"] / drawn
        rate = self._seconds_per_token or counts["sampling"] / max(1, drawn)
        metrics = {
            "tokens": counts["reused"] / max(1, counts["tokens"]),
            "prefix_length": counts["reused"] / max(1, counts["drafts"]),
            "whole": counts["whole"] / max(1, counts["completions"]),
            "verification_time": counts["verifying"] / len(ranks),
            "saved_time": (counts["tokens"] * rate - counts["sampling"] - counts["verifying"]) / len(ranks),
        }
        return {f"reuse/{name}": value for name, value in metrics.items()}

    @property
    def reused(self) -> int:
        """How many tokens of this phase are taken over so far."""
        return int(self._counts["reused"])

    def state_dict(self) -> dict[str, Any]:
        """Return the drafts, which are equal on all ranks."""
        drafts = Draft.join(draft for _, draft in self._kept.values())._asdict() if self._kept else {}
        lengths = {key: lengths for key, (lengths, _) in self._kept.items()}
        return {"settings": self._settings(), "lengths": lengths, **drafts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the drafts of a ``state_dict``, unless they were cut up or ended in another way."""
        self._kept, self._used, self._counts = {}, set(), defaultdict(float)
        if state["settings"] != self._settings():
            rank_zero_info("sampling.reuse: other buckets or stop strings than in the checkpoint, so drafts begin anew")
            return
        if state["lengths"]:
            sizes = [sum(lengths) for lengths in state["lengths"].values()]
            parts = Draft(*(state[name] for name in Draft._fields)).split(sizes)
            self._kept = dict(zip(state["lengths"], zip(state["lengths"].values(), parts, strict=True), strict=True))

    def _settings(self) -> dict[str, Any]:
        return {"buckets": self.reuse.buckets, "stop": list(self.sampling.stop)}

    @staticmethod
    def _key(prompt: list[int]) -> str:
        return hashlib.blake2b(str(prompt).encode(), digest_size=16).hexdigest()

    def _take(self, prompt: list[int], num_generations: int) -> list[Draft | None]:
        """Return the drafts of a prompt's completions, once in a phase; None = there is none."""
        key = self._key(prompt)
        found = []
        if key in self._kept and key not in self._used:
            lengths, drafts = self._kept[key]
            found = drafts.split(lengths)
        self._used.add(key)
        return [*found[:num_generations], *[None] * (num_generations - len(found))]

    def _cut(self, logprobs: Tensor) -> Tensor:
        """Return the log-probs [K, V] of what is drawn from."""
        if self.sampling.top_k == 0 and self.sampling.top_p == 1:
            return logprobs
        return truncate(logprobs, self.sampling.top_k, self.sampling.top_p).log_softmax(-1)

    @torch.no_grad()
    def _verify(
        self, prompts: list[list[int]], drafts: list[Draft | None], seeds: list[int], version: int
    ) -> tuple[list[Completion], list[int]]:
        """Return the beginning of each completion, and how many of its tokens are the draft's."""
        device = self.policy.model.device
        place = torch.device("cpu") if device.type == "mps" else device  # sums in float64, which MPS does not have
        most = self.sampling.max_completion_length
        asked = [(i, Draft(*(each[:most] for each in draft))) for i, draft in enumerate(drafts) if draft is not None]
        lengths = [len(draft.tokens) for _, draft in asked]
        numbers = {key: row for row, key in enumerate(dict.fromkeys(tuple(prompts[i]) for i, _ in asked))}
        prompt_ids, prompt_mask = pad_rows([list(prompt) for prompt in numbers])
        completion_ids, mask = pad_rows([draft.tokens.tolist() for _, draft in asked])
        index = torch.tensor([numbers[tuple(prompts[i])] for i, _ in asked])
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "prompt_index")
        values = (prompt_ids, prompt_mask, completion_ids, mask, index)
        batch = {name: value.to(device) for name, value in zip(names, values, strict=True)}
        known = Draft.join(draft for _, draft in asked)
        pairs = zip(asked, lengths, strict=True)
        uniforms = [np.random.default_rng([seeds[i], STREAM]).random((length, 2)) for (i, _), length in pairs]
        chunks = [torch.tensor(rows) for rows in self.policy.plan_forwards(cast(PolicyBatch, batch))]
        number = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, torch.arange(sum(lengths)))
        order = torch.cat([number[rows][mask[rows]] for rows in chunks])  # of the tokens in the chunks
        columns = [each[order].to(place) for each in (*known, torch.from_numpy(np.concatenate(uniforms)))]
        found: list[tuple[Tensor, Tensor]] = []

        def watch(logprobs: Tensor) -> None:
            first = sum(len(tokens) for tokens, _ in found)
            now = self._cut(logprobs.to(place))
            *draft, drawn = (column[first : first + len(now)] for column in columns)
            tokens = verify_tokens(now, Draft(*draft), drawn, self.reuse.lenience)
            found.append((tokens, now.gather(1, tokens[:, None])[:, 0]))

        with self.policy.watching(watch):
            for rows in chunks:
                self.policy.completion_scores(take_chunk(cast(PolicyBatch, batch), rows), self.sampling.temperature)
        tokens, logprobs = (torch.cat(parts).cpu()[order.argsort()] for parts in zip(*found, strict=True))
        same = torch.zeros_like(mask).masked_scatter(mask, tokens == known.tokens).long().cumprod(1).sum(1).tolist()
        begun, reused = [Completion([], [], "", "length", version)] * len(prompts), [0] * len(prompts)
        mine = zip(asked, tokens.split(lengths), logprobs.split(lengths), same, strict=True)
        for (i, _), ids, scores, count in mine:
            reused[i] = count
            begun[i] = Completion(ids[: count + 1].tolist(), scores[: count + 1].tolist(), "", "length", version)
        return begun, reused

    def _finish(
        self, engine: RolloutEngine, prompts: list[list[int]], seeds: list[int], begun: list[Completion], version: int
    ) -> list[Completion]:
        """Let the engine go on with what is not whole yet."""
        # Temperature 0: this ledger draws nothing, and needs no random numbers.
        ledger = Ledger(seeds, replace(self.sampling, temperature=0.0), self.policy, started=begun)
        ended = ledger.end_started()
        done = ledger.completions(version)
        going = [i for i, whole in enumerate(ended) if not whole]
        if going:
            found = cast(InProcessEngine, engine).generate(
                [prompts[i] for i in going],
                1,
                self.sampling,
                [seeds[i] for i in going],
                started=[begun[i] for i in going],
            )
            for i, (completion,) in zip(going, found, strict=True):
                done[i] = completion
        return [
            replace(each, versions=None) if set(each.token_versions) == {each.policy_version} else each for each in done
        ]


def describe_tokens(logprobs: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``ids``, ``logprobs`` and ``places`` of a ``Draft`` of ``tokens`` int [K] from log q [K, V]."""
    ids = logprobs.topk(min(k, logprobs.shape[1])).indices
    places = torch.zeros(len(tokens), 2, device=tokens.device)
    rare = (ids != tokens[:, None]).all(1).nonzero()[:, 0]
    if len(rare):
        others = logprobs[rare].exp().scatter(1, ids[rare], 0.0)
        before = others * (torch.arange(others.shape[1], device=others.device) < tokens[rare, None])
        own = others.gather(1, tokens[rare, None])
        total = others.sum(1, keepdim=True).clamp(min=torch.finfo(others.dtype).tiny)
        places[rare] = torch.cat([before.sum(1, keepdim=True), own], 1) / total
    return ids.int(), gather_buckets(logprobs, ids), places


def verify_tokens(logprobs: Tensor, draft: Draft, uniforms: Tensor, lenience: float) -> Tensor:
    """Draw a token by p at each place of a draft, the draft's own token as often as possible; see ``Drafts``.

    Args:
        logprobs: [K, V], log p, nats.
        draft: K tokens.
        uniforms: float64 [K, 2] in [0, 1).
        lenience: > 0.

    Returns:
        tokens int [K].
    """
    tokens, ids, k = draft.tokens.long(), draft.ids.long(), draft.ids.shape[1]
    p, q = gather_buckets(logprobs, ids).exp(), draft.logprobs.exp()  # [K, k + 1]
    own = ids == tokens[:, None]
    bucket = torch.where(own.any(1), own.int().argmax(1), k)[:, None]
    accepted = uniforms[:, 0] * q.gather(1, bucket)[:, 0] < lenience * p.gather(1, bucket)[:, 0]
    drawn = (~accepted | (bucket[:, 0] == k)).nonzero()[:, 0]
    p, q, ids, rare = p[drawn], q[drawn], ids[drawn], accepted[drawn]
    # By how much p counts in each bucket: after a rejection what p has beyond q, else only in the bucket of all others.
    beyond = (p - torch.minimum(q, lenience * p)).clamp(min=0) / p.clamp(min=torch.finfo(p.dtype).tiny)
    others = torch.arange(k + 1, device=p.device) == k
    factor = torch.where(rare[:, None], others, beyond)
    whole = logprobs[drawn].exp()
    weights = (whole * factor[:, k:]).scatter(1, ids, p[:, :k] * factor[:, :k])
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, whole)  # by rounding nothing may be beyond q
    begin, size = draft.places[drawn].double().unbind(1)
    even = uniforms[drawn, 1]
    return tokens.index_copy(0, drawn, invert_cdf(weights, torch.where(rare, begin + size * even, even)))


def spread_rows(rows: Tensor, mask: Tensor) -> Tensor:
    """Put rows [K, k] of kept places back into the shape of ``mask`` [N, T] (K True entries): [N, T, k], zero elsewhere."""
    spread = torch.zeros(*mask.shape, rows.shape[1], dtype=rows.dtype, device=rows.device)
    spread[mask] = rows
    return spread


def check_reuse(sampling: Sampling, engine: RolloutEngine, environment: Environment | None) -> None:
    """Refuse what cannot go on from the part of a completion that is accepted.

    Raises:
        ValueError: it is refused; the message says what to change.
    """
    name = type(engine).__name__
    if environment is not None:
        raise ValueError(
            "sampling.reuse: a completion with calls of tools cannot go on from a draft, whose environment is gone: leave "
            "model.environment or model.sampling.reuse out"
        )
    if sampling.thinking is not None and sampling.thinking.budgets:
        raise ValueError(
            "sampling.reuse: a thinking budget cannot be kept in a completion that goes on from a draft: leave "
            "sampling.thinking.budget or sampling.reuse out"
        )
    if sampling.partial is not None:
        raise ValueError(
            "sampling.reuse begins completions that end in their phase, and sampling.partial carries them over: leave one of "
            "them out"
        )
    if "started" not in inspect.signature(engine.generate).parameters:
        raise ValueError(
            f"sampling.reuse: {name}.generate takes no beginnings (started) to go on from: leave model.engine or "
            "model.sampling.reuse out"
        )
    if engine.max_staleness > 0:
        raise ValueError(
            f"sampling.reuse: {name} may sample from weights that are {engine.max_staleness} phases older than those that "
            "accept a draft (max_staleness): set it to 0, or leave model.sampling.reuse out"
        )


def refuse_reuse(sampling: Sampling | None, who: str) -> None:
    """Refuse reuse in a method that does not learn from scored completions of its own.

    Raises:
        ValueError: it was asked for.
    """
    if sampling is not None and sampling.reuse is not None:
        raise ValueError(
            f"{who}: sampling.reuse needs the probabilities of completions that the trainer scores after sampling them, as "
            "GRPO, PPO and online DPO do: leave it out"
        )
