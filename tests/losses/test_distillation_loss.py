"""Divergences of next-token distributions: by hand, against a naive loop in float64, in tiles of every size."""

import math

import pytest
import torch
from torch import Tensor

from modules.losses import JSD, Divergence, ForwardKL, ReverseKL
from modules.losses.distillation import (
    LazyLogits,
    fill_buckets,
    find_buckets,
    gather_buckets,
    keep_first,
    measure_divergence,
)

DOUBLE = torch.float64
TEACHER, STUDENT = (torch.tensor(p, dtype=DOUBLE).log() for p in ((0.7, 0.2, 0.1), (0.5, 0.3, 0.2)))
KINDS = [ForwardKL(), ReverseKL(), JSD(0.5), JSD(0.1), JSD(0.0), JSD(1.0)]
NAMES = [f"{type(kind).__name__}{getattr(kind, 'beta', '')}" for kind in KINDS]
TOKENS, WORDS = 7, 11


def naive(kind: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """D of one pair of distributions [V], by the formulas and a loop over the vocabulary."""
    beta = {ForwardKL: 0.0, ReverseKL: 1.0}.get(type(kind), getattr(kind, "beta", 0.0))
    total = torch.zeros((), dtype=student.dtype)
    for p, q in zip(teacher.exp(), student.exp(), strict=True):
        if beta in (0, 1):
            total = total + (q * (q / p).log() if beta else p * (p / q).log())
        else:
            m = beta * p + (1 - beta) * q
            total = total + beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()
    return total


def make_sides(seed: int = 0) -> tuple[LazyLogits, LazyLogits]:
    """A student with a bias and a wider teacher without one, in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(*shape, generator=generator, dtype=DOUBLE) for shape in ((TOKENS, 3), (WORDS, 3), (WORDS,))]
    other = [torch.randn(*shape, generator=generator, dtype=DOUBLE) for shape in ((TOKENS, 5), (WORDS, 5))]
    return LazyLogits(*(each.requires_grad_() for each in draw)), LazyLogits(*other, None)


def whole(logits: LazyLogits, temperature: float = 1.0) -> Tensor:
    return logits.take(slice(None), temperature).log_softmax(-1)


def test_hand_numbers():
    # .7 ln(.7/.5) + .2 ln(.2/.3) + .1 ln(.1/.2) = .235531 - .081093 - .069315
    assert float(ForwardKL()(STUDENT, TEACHER)) == pytest.approx(0.085123, abs=1e-6)
    # .5 ln(.5/.7) + .3 ln(.3/.2) + .2 ln(.2/.1) = -.168236 + .121640 + .138629
    assert float(ReverseKL()(STUDENT, TEACHER)) == pytest.approx(0.092033, abs=1e-6)
    # M = (.6, .25, .15): half of .022730 = KL(teacher || M) and half of .021072 = KL(student || M)
    assert float(JSD()(STUDENT, TEACHER)) == pytest.approx(0.021901, abs=1e-6)
    # M = .25 T + .75 S = (.55, .275, .175)
    to_teacher = 0.7 * math.log(0.7 / 0.55) + 0.2 * math.log(0.2 / 0.275) + 0.1 * math.log(0.1 / 0.175)
    to_student = 0.5 * math.log(0.5 / 0.55) + 0.3 * math.log(0.3 / 0.275) + 0.2 * math.log(0.2 / 0.175)
    assert float(JSD(0.25)(STUDENT, TEACHER)) == pytest.approx(0.25 * to_teacher + 0.75 * to_student, abs=1e-12)
    assert float(JSD(0.0)(STUDENT, TEACHER)) == float(ForwardKL()(STUDENT, TEACHER))
    assert float(JSD(1.0)(STUDENT, TEACHER)) == float(ReverseKL()(STUDENT, TEACHER))
    with pytest.raises(ValueError, match="beta"):
        JSD(1.5)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_it_is_zero_where_both_are_equal_and_only_there_and_has_no_gradient_there(kind):
    same = TEACHER.clone().requires_grad_()
    logprobs = same.log_softmax(-1)
    kind(logprobs, TEACHER).backward()
    assert float(kind(TEACHER, TEACHER)) == pytest.approx(0.0, abs=1e-15)
    assert float(same.grad.abs().max()) < 1e-15
    assert float(kind(STUDENT, TEACHER)) > 1e-3 and float(kind(TEACHER, STUDENT)) > 1e-3


@pytest.mark.parametrize("kind", KINDS[:4], ids=NAMES[:4])
def test_a_probability_of_zero_adds_nothing_on_its_own_side(kind):
    never = torch.tensor([0.5, 0.5, 0.0], dtype=DOUBLE).log()
    shared = torch.tensor([0.9, 0.1, 0.0], dtype=DOUBLE).log()
    two = kind(never[:2], shared[:2])
    assert float(kind(torch.tensor([0.5, 0.5, 1e-30], dtype=DOUBLE).log(), shared)) == pytest.approx(
        math.inf if isinstance(kind, ReverseKL) else float(two), abs=1e-12
    )
    if not isinstance(kind, JSD):  # where both have none, a mixture has none either
        assert float(kind(never, shared)) == pytest.approx(float(two), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize(("entries", "temperature"), [(1000, 1.0), (TOKENS * 4, 2.0), (5, 1.0), (1, 0.7)])
def test_tiles_of_every_size_equal_a_loop_and_so_do_gradients(kind, entries, temperature):
    student, teacher = make_sides()
    weights = torch.linspace(0.5, 2.0, TOKENS, dtype=DOUBLE)
    found = measure_divergence(kind, student, teacher, temperature, entries)
    (found * weights).sum().backward()
    gradients = [part.grad.clone() for part in student]
    again = LazyLogits(*(part.detach().clone().requires_grad_() for part in student))
    mine, theirs = whole(again, temperature), whole(teacher, temperature)
    expected = torch.stack([naive(kind, one, other) for one, other in zip(mine, theirs, strict=True)])
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    for part, gradient in zip(again, gradients, strict=True):
        torch.testing.assert_close(gradient, part.grad, atol=1e-12, rtol=1e-9)
    swapped = torch.stack([naive(kind, other, one) for one, other in zip(mine, theirs, strict=True)])
    if getattr(kind, "beta", 0) != 0.5:
        assert not torch.allclose(found, swapped, atol=1e-3)  # the sides are not alike


def test_frozen_parts_get_no_gradient_and_nothing_is_learned_where_none_is_asked():
    student, teacher = make_sides()
    frozen = student._replace(weight=student.weight.detach(), bias=None)
    measure_divergence(ForwardKL(), frozen, teacher, 1.0, 8).sum().backward()
    assert student.states.grad is not None and student.weight.grad is None
    with torch.inference_mode():
        assert measure_divergence(JSD(), student, teacher, 1.0, 8).shape == (TOKENS,)
    nothing = LazyLogits(torch.zeros(0, 3, dtype=DOUBLE), student.weight, student.bias)
    empty = measure_divergence(ReverseKL(), nothing, teacher._replace(states=torch.zeros(0, 5, dtype=DOUBLE)), 1.0, 8)
    assert empty.shape == (0,) and float(empty.detach().sum()) == 0


def test_buckets_by_hand():
    # The teacher's two most likely of four are tokens 2 and 0; the others have .1 + .05.
    teacher = torch.tensor([0.25, 0.1, 0.6, 0.05], dtype=DOUBLE).log()
    student = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=DOUBLE).log()
    eye = torch.eye(4, dtype=DOUBLE)
    found = find_buckets(LazyLogits(teacher[None], eye, None), 2, 1.0, 100)
    assert found.ids.tolist() == [[2, 0]]
    torch.testing.assert_close(found.logprobs.exp(), torch.tensor([[0.6, 0.25, 0.15]], dtype=DOUBLE))
    mine = fill_buckets(LazyLogits(student[None], eye, None), found.ids, 1.0, 100)
    torch.testing.assert_close(mine.exp(), torch.tensor([[0.2, 0.4, 0.4]], dtype=DOUBLE))
    # .6 ln 3 + .25 ln(.25/.4) + .15 ln(.15/.4)
    expected = 0.6 * math.log(3) + 0.25 * math.log(0.625) + 0.15 * math.log(0.375)
    assert float(ForwardKL()(mine, found.logprobs)) == pytest.approx(expected, abs=1e-12)
    # Fewer outcomes tell less: at most the divergence of the whole vocabulary, and less than without the bucket.
    assert expected < float(ForwardKL()(student, teacher))


@pytest.mark.parametrize("kind", KINDS[:3], ids=NAMES[:3])
@pytest.mark.parametrize("entries", [1000, WORDS, 1])
def test_buckets_have_the_gradient_of_a_loop_in_chunks_of_every_size(kind, entries):
    student, teacher = make_sides()
    known = find_buckets(teacher, 3, 1.5, entries)
    loss = kind(fill_buckets(student, known.ids, 1.5, entries), known.logprobs)
    loss.sum().backward()
    again = LazyLogits(*(part.detach().clone().requires_grad_() for part in student))
    total = torch.zeros((), dtype=DOUBLE)
    for mine, theirs, ids in zip(whole(again, 1.5), whole(teacher, 1.5), known.ids.tolist(), strict=True):
        assert set(ids) == set(theirs.topk(3).indices.tolist())
        others = [word for word in range(WORDS) if word not in ids]
        both = [torch.stack([*(p.exp()[i] for i in ids), p.exp()[others].sum()]).log() for p in (mine, theirs)]
        total = total + naive(kind, *both)
    total.backward()
    assert float(loss.sum()) == pytest.approx(float(total), abs=1e-12)
    for part, other in zip(student, again, strict=True):
        torch.testing.assert_close(part.grad, other.grad, atol=1e-12, rtol=1e-9)


def test_with_all_tokens_but_one_the_buckets_are_the_vocabulary():
    student, teacher = make_sides()
    known = find_buckets(teacher, WORDS - 1, 1.0, 1000)
    cut = ReverseKL()(fill_buckets(student, known.ids, 1.0, 1000), known.logprobs)
    torch.testing.assert_close(cut, measure_divergence(ReverseKL(), student, teacher, 1.0, 1000))


def test_a_bucket_of_almost_nothing_keeps_its_digits():
    """Where the first token has all but e^-50, 1 - p is 0 in every precision, and the bucket still has -50."""
    logits = torch.tensor([50.0, 0.0, math.log(2)])
    found = gather_buckets(logits.log_softmax(-1), torch.tensor([0]))
    assert float(found[1]) == pytest.approx(math.log(3) - 50, abs=1e-4)
    student = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    loss = ReverseKL()(gather_buckets(student.log_softmax(-1), torch.tensor([0])), found)
    loss.backward()
    # 1/3 ln(1/3) + 2/3 (ln(2/3) - (ln 3 - 50))
    assert float(loss) == pytest.approx(math.log(1 / 3) / 3 + 2 / 3 * (math.log(2 / 3) - math.log(3) + 50), abs=1e-3)
    assert student.grad.isfinite().all() and float(student.grad[0]) < 0


def test_first_tokens():
    mask = torch.tensor([[True] * 10, [True, False, True, True] + [False] * 6])
    assert keep_first(mask, None) is mask
    assert keep_first(mask, 0.3).sum(1).tolist() == [3, 1]  # 3 of 10; 0.9 of 3 is rounded up
    assert keep_first(mask, 0.34).sum(1).tolist() == [4, 2]
    assert keep_first(mask, 2).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 2]]
    assert torch.equal(keep_first(mask, 100), mask)


class Squares(Divergence):
    """A divergence of one's own: the sum of squared differences of probabilities."""

    def terms(self, student, teacher):
        return (student.exp() - teacher.exp()).square()


def test_a_divergence_of_ones_own_needs_its_terms_alone():
    student, teacher = make_sides()
    measure_divergence(Squares(), student, teacher, 1.0, 20).sum().backward()
    again = LazyLogits(*(part.detach().clone().requires_grad_() for part in student))
    (whole(again).exp() - whole(teacher).exp()).square().sum().backward()
    for part, other in zip(student, again, strict=True):
        torch.testing.assert_close(part.grad, other.grad, atol=1e-12, rtol=1e-9)
