"""Divergences between a teacher's and a student's next-token distributions, computed without whole rows of logits.

Letters: K tokens that carry loss, H hidden size, V vocabulary, k tokens that the teacher finds most likely.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from modules.functional.logprobs import vocabulary_logprobs
from modules.functional.ranges import check_numbers

ROWS = 4096  # tokens whose logits are computed together


class Divergence(ABC):
    """A distance D >= 0 of the student's distribution from the teacher's, 0 only where they are equal.

    It is a sum of terms over the vocabulary, so that slices of the vocabulary can be added. A class of yours needs
    ``terms`` alone; the gradient is found from it.
    """

    @abstractmethod
    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return each entry's term [..., V] from log-probabilities [..., V] in nats; -inf is a probability of 0."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return D [...], in nats, from the log-probabilities [..., V] of all outcomes."""
        return self.terms(student, teacher).sum(-1)


class ForwardKL(Divergence):
    """KL(teacher || student) = sum of p_T log(p_T / p_S): the student covers all that the teacher may say."""

    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        return expect(teacher, teacher - student)


class ReverseKL(Divergence):
    """KL(student || teacher) = sum of p_S log(p_S / p_T): the student says only what the teacher finds likely."""

    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        return expect(student, student - teacher)


class JSD(Divergence):
    """beta KL(teacher || M) + (1 - beta) KL(student || M) with M = beta p_T + (1 - beta) p_S (GKD, 2306.13649 eq. 1).

    It is bounded, and 0.5 weighs both sides alike. As in TRL, 0 stands for the forward KL and 1 for the reverse KL,
    which the formula itself approaches only after division by beta or 1 - beta.

    Args:
        beta: [0, 1], share of the teacher in the mixture.
    """

    def __init__(self, beta: float = 0.5) -> None:
        check_numbers("JSD", beta=(beta, "[0, 1]"))
        self.beta = beta

    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.beta in (0, 1):
            return (ReverseKL() if self.beta else ForwardKL()).terms(student, teacher)
        mixture = torch.logaddexp(teacher + math.log(self.beta), student + math.log1p(-self.beta))
        return self.beta * expect(teacher, teacher - mixture) + (1 - self.beta) * expect(student, student - mixture)


def expect(logprobs: Tensor, values: Tensor) -> Tensor:
    """Multiply ``values`` [..., V] by the probabilities exp(``logprobs``) [..., V]; a probability of 0 gives 0."""
    probabilities = logprobs.exp()
    return probabilities * values.masked_fill(probabilities == 0, 0.0)


class LazyLogits(NamedTuple):
    """The logits states @ weight.T + bias of K tokens, which are computed a slice of the vocabulary at a time."""

    states: Tensor  # [K, H], of a model of any width
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]

    def take(self, columns: slice, temperature: float) -> Tensor:
        """Compute the logits [K, v] of some columns, divided by ``temperature``."""
        bias = None if self.bias is None else self.bias[columns]
        return linear(self.states, self.weight[columns], bias) / temperature

    def split(self, rows: int) -> list["LazyLogits"]:
        """Return consecutive parts of at most ``rows`` tokens."""
        return [self._replace(states=states) for states in self.states.split(rows)]


def measure_divergence(
    divergence: Divergence, student: LazyLogits, teacher: LazyLogits, temperature: float, entries: int
) -> Tensor:
    """Return D [K] in nats of the whole distributions, with the gradient of the student.

    The logits of both models are computed by tiles of tokens x vocabulary, and again in the backward pass. So at most a
    few tiles are in memory.

    Args:
        divergence: the distance.
        student: logits [K, V], with gradient.
        teacher: logits [K, V] of the same tokens and the same vocabulary, which get no gradient.
        temperature: > 0; the logits of both are divided by it.
        entries: of a tile, >= 1.
    """
    rows = max(1, min(ROWS, entries, len(student.states)))
    columns = max(1, entries // rows)
    parts = zip(student.split(rows), teacher.split(rows), strict=True)
    settings = divergence, temperature, columns, torch.is_grad_enabled()
    return torch.cat([_Tiles.apply(settings, *mine, *theirs) for mine, theirs in parts])


class _Tiles(torch.autograd.Function):
    """D of each token over tiles of the vocabulary.

    With s the student's log-probs and z its logits, D = sum of f(s), so dD/dz_v = f'(s_v) - p_v sum over u of f'(s_u).
    The sum is kept from the forward pass, and f' is found by autograd in each tile.
    """

    @staticmethod
    def forward(
        ctx: Any,
        settings: tuple[Divergence, float, int, bool],
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_states: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
    ) -> Tensor:
        divergence, temperature, columns, learns = settings
        student, teacher = LazyLogits(states, weight, bias), LazyLogits(teacher_states, teacher_weight, teacher_bias)
        with torch.autocast(states.device.type, enabled=False):
            normalizers = [_normalize(each, columns, temperature) for each in (student, teacher)]
            found, slope_sums = torch.zeros_like(normalizers[0]), torch.zeros_like(normalizers[0])
            for tile in _slices(len(weight), columns):
                mine = student.take(tile, temperature) - normalizers[0][:, None]
                theirs = teacher.take(tile, temperature) - normalizers[1][:, None]
                found += divergence.terms(mine, theirs).sum(-1)
                if learns:
                    slope_sums += _find_slopes(divergence, mine, theirs).sum(-1)
        ctx.save_for_backward(*student, *teacher, *normalizers, slope_sums)
        ctx.settings = settings
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        divergence, temperature, columns, _ = ctx.settings
        *sides, mine, theirs, slope_sums = ctx.saved_tensors
        student, teacher = LazyLogits(*sides[:3]), LazyLogits(*sides[3:])
        wanted = ctx.needs_input_grad[1:4]
        to_states = torch.zeros_like(student.states) if wanted[0] else None
        to_weight = torch.empty_like(student.weight) if wanted[1] else None
        to_bias = torch.empty_like(student.bias) if student.bias is not None and wanted[2] else None
        with torch.autocast(gradient.device.type, enabled=False):
            for tile in _slices(len(student.weight), columns):
                logprobs = student.take(tile, temperature) - mine[:, None]
                slopes = _find_slopes(divergence, logprobs, teacher.take(tile, temperature) - theirs[:, None])
                logits = (slopes - logprobs.exp() * slope_sums[:, None]) * (gradient / temperature)[:, None]  # [K, v]
                if to_states is not None:
                    to_states.addmm_(logits, student.weight[tile])
                if to_weight is not None:
                    torch.mm(logits.T, student.states, out=to_weight[tile])
                if to_bias is not None:
                    to_bias[tile] = logits.sum(0)
        return None, to_states, to_weight, to_bias, None, None, None


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _normalize(logits: LazyLogits, columns: int, temperature: float) -> Tensor:
    """Return the logarithm [K] of the sum of exp(logits) over the whole vocabulary."""
    total = torch.full((len(logits.states),), -math.inf, dtype=logits.states.dtype, device=logits.states.device)
    for tile in _slices(len(logits.weight), columns):
        total = torch.logaddexp(total, logits.take(tile, temperature).logsumexp(-1))
    return total


def _find_slopes(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the derivative [K, v] of each term by the student's log-prob."""
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(divergence.terms(leaf, teacher).sum(), leaf)
    return slopes


class Buckets(NamedTuple):
    """The k tokens that the teacher finds most likely, and one bucket for all other tokens together."""

    ids: Tensor  # int [K, k]
    logprobs: Tensor  # [K, k + 1], the teacher's, nats; the last one is the bucket's


@torch.no_grad()
def find_buckets(teacher: LazyLogits, k: int, temperature: float, entries: int) -> Buckets:
    """Find the ``k`` most likely tokens of the teacher and the probability of all others, 1 <= k < V.

    The rest is summed over its own tokens and not taken from 1, so it keeps its digits however small it is.

    Args:
        teacher: logits [K, V].
        k: tokens that keep a bucket of their own.
        temperature: > 0; the logits are divided by it.
        entries: of logits that may be in memory, >= 1.
    """
    found = []
    for part in teacher.split(max(1, entries // len(teacher.weight))):
        logprobs = _whole_logprobs(*part, temperature)
        ids = logprobs.topk(k, dim=-1).indices
        found.append((ids, gather_buckets(logprobs, ids)))
    ids, logprobs = (torch.cat(each) for each in zip(*found, strict=True))
    return Buckets(ids, logprobs)


def fill_buckets(student: LazyLogits, ids: Tensor, temperature: float, entries: int) -> Tensor:
    """Return the student's log-probabilities [K, k + 1] of the teacher's tokens ``ids`` [K, k] and of all others.

    With gradients, the logits of a chunk of tokens are dropped and computed again in the backward pass. The other
    arguments are those of ``find_buckets``.
    """

    def fill(states: Tensor, ids: Tensor) -> Tensor:
        return gather_buckets(_whole_logprobs(states, student.weight, student.bias, temperature), ids)

    size = max(1, entries // len(student.weight))
    pairs = list(zip(student.states.split(size), ids.split(size), strict=True))
    if torch.is_grad_enabled() and len(pairs) > 1:
        return torch.cat([checkpoint(fill, *pair, use_reentrant=False) for pair in pairs])
    return torch.cat([fill(*pair) for pair in pairs])


def gather_buckets(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probabilities [..., k + 1] of the tokens ``ids`` [..., k], and of all others as the last one.

    >>> gather_buckets(torch.tensor([0.5, 0.2, 0.2, 0.1]).log(), torch.tensor([0])).exp()
    tensor([0.5000, 0.5000])
    """
    rest = logprobs.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, ids), rest], -1)


def _whole_logprobs(states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    with torch.autocast(states.device.type, enabled=False):
        return vocabulary_logprobs(linear(states, weight, bias), temperature)


def keep_first(mask: Tensor, first: float | None) -> Tensor:
    """Return the keep-mask [N, T] of the first tokens of each row that ``mask`` [N, T] keeps.

    first: a share of the row's kept tokens, in (0, 1) and rounded up, or a number of tokens >= 1; None = all.

    >>> keep_first(torch.tensor([[True, False, True, True, True]]), 0.5)
    tensor([[ True, False,  True, False, False]])
    """
    if first is None:
        return mask
    # float64 and a little less, so that 0.3 of 10 tokens are 3
    most = first if first >= 1 else (mask.sum(1, keepdim=True).double() * first - 1e-9).ceil()
    return mask & (mask.cumsum(1) <= most)
