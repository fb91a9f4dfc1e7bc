"""KL estimators: expected values and gradients, summed over all outcomes of a categorical with three classes."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modules.functional.kl import apply_estimator, k1, k2, k3, weighted_k3

DOUBLE = torch.float64
THETA = [0.3, -0.2, 0.5]
REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE)
Estimator = Callable[[Tensor, Tensor], Tensor]


def weighted_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return torch.exp(logprobs - logprobs.detach()) * (logprobs - ref_logprobs)


def expectation(estimator: Estimator) -> tuple[float, Tensor]:
    """Return value and sample gradient of E_{y ~ policy}[estimator]; the probabilities are constants, like samples."""
    theta = torch.tensor(THETA, dtype=DOUBLE, requires_grad=True)
    logprobs = theta.log_softmax(0)
    value = (logprobs.detach().exp() * estimator(logprobs, REFERENCE.log())).sum()
    return value.item(), torch.autograd.grad(value, theta)[0]


def exact_gradient(forward: bool) -> Tensor:
    theta = torch.tensor(THETA, dtype=DOUBLE, requires_grad=True)
    policy = theta.softmax(0)
    first, second = (REFERENCE, policy) if forward else (policy, REFERENCE)
    return torch.autograd.grad((first * (first.log() - second.log())).sum(), theta)[0]


def test_hand_numbers() -> None:
    logprobs, ref_logprobs = torch.tensor([math.log(0.5)], dtype=DOUBLE), torch.tensor([math.log(0.25)], dtype=DOUBLE)
    assert k1(logprobs, ref_logprobs).item() == pytest.approx(math.log(2), abs=1e-12)
    assert k2(logprobs, ref_logprobs).item() == pytest.approx(math.log(2) ** 2 / 2, abs=1e-12)
    assert k3(logprobs, ref_logprobs).item() == pytest.approx(0.5 - 1 + math.log(2), abs=1e-12)
    assert weighted_k3(logprobs, ref_logprobs).item() == pytest.approx(0.5 - 1 + math.log(2), abs=1e-12)
    assert not math.isclose(
        k3(ref_logprobs, logprobs).item(), k3(logprobs, ref_logprobs).item()
    )  # the direction matters


@pytest.mark.parametrize(
    ("estimator", "expected"), [(k1, 0.177386), (k2, 0.162928), (k3, 0.177386), (weighted_k3, 0.177386)]
)
def test_expected_values(estimator: Estimator, expected: float) -> None:
    assert expectation(estimator)[0] == pytest.approx(expected, abs=1e-6)
    if estimator is not k2:
        weights = [math.exp(x) for x in THETA]
        policy = [w / sum(weights) for w in weights]
        exact = sum(p * math.log(p / q) for p, q in zip(policy, REFERENCE.tolist(), strict=True))
        assert expectation(estimator)[0] == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (k1, (0.0, 0.0, 0.0)),
        (k2, (0.138796, -0.219580, 0.080784)),
        (weighted_k1, (0.138796, -0.219580, 0.080784)),
        (weighted_k3, (0.138796, -0.219580, 0.080784)),
        (k3, (0.153615, -0.285522, 0.131906)),
    ],
)
def test_expected_gradients(estimator: Estimator, expected: tuple[float, float, float]) -> None:
    torch.testing.assert_close(expectation(estimator)[1], torch.tensor(expected, dtype=DOUBLE), atol=1e-6, rtol=0)


def test_gradients_are_those_of_the_named_divergence() -> None:
    reverse, forward = exact_gradient(forward=False), exact_gradient(forward=True)
    torch.testing.assert_close(expectation(k2)[1], reverse, atol=1e-12, rtol=0)
    torch.testing.assert_close(expectation(weighted_k3)[1], reverse, atol=1e-12, rtol=0)
    torch.testing.assert_close(expectation(k3)[1], forward, atol=1e-12, rtol=0)
    assert not torch.allclose(reverse, forward, atol=1e-3)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_gradcheck_and_inputs_left_alone(estimator: Estimator) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(2, 3, dtype=DOUBLE, generator=generator, requires_grad=True)
    ref_logprobs = torch.randn(2, 3, dtype=DOUBLE, generator=generator)
    before = logprobs.detach().clone(), ref_logprobs.clone()
    assert torch.autograd.gradcheck(estimator, (logprobs, ref_logprobs))
    assert torch.equal(logprobs, before[0]) and torch.equal(ref_logprobs, before[1])


def test_limits_signs_and_constant_shift() -> None:
    logprobs = torch.linspace(-3, 0, 7, dtype=DOUBLE)
    for estimator in (k1, k2, k3, weighted_k3):
        assert torch.equal(estimator(logprobs, logprobs), torch.zeros(7, dtype=DOUBLE))
        other = logprobs.flip(0)
        torch.testing.assert_close(estimator(logprobs - 2, other - 2), estimator(logprobs, other), atol=1e-12, rtol=0)
    assert (k3(logprobs, logprobs.flip(0)) >= 0).all() and (k1(logprobs, logprobs.flip(0)) < 0).any()


def test_weight_changes_the_gradient_only() -> None:
    logprobs = torch.tensor([-1.0, -0.5], dtype=DOUBLE, requires_grad=True)
    ref_logprobs = torch.tensor([-0.7, -0.9], dtype=DOUBLE)
    value = weighted_k3(logprobs, ref_logprobs)
    torch.testing.assert_close(value, k3(logprobs, ref_logprobs), atol=1e-15, rtol=0)
    gradient = torch.autograd.grad(value.sum(), logprobs)[0]
    # d/dx [w k3] = k3 + (1 - exp(-d)) at w = 1, and k3 = exp(-d) - 1 + d, which leaves d = (-0.3, 0.4)
    torch.testing.assert_close(gradient, torch.tensor([-0.3, 0.4], dtype=DOUBLE), atol=1e-12, rtol=0)


def test_large_log_ratios_are_not_clamped() -> None:
    far, zero = torch.tensor([-50.0, 50.0], dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)
    expected = torch.tensor([math.exp(50) - 51, math.exp(-50) + 49], dtype=DOUBLE)
    torch.testing.assert_close(k3(far, zero), expected, atol=0, rtol=1e-12)


def test_the_weight_makes_samples_of_an_older_policy_right() -> None:
    """Tokens drawn by an older policy give value and gradient of the present KL; without its log-probs they do not."""
    old = torch.tensor([0.6, 0.1, 0.3], dtype=DOUBLE)

    def expected(old_logprobs: Tensor | None) -> tuple[float, Tensor]:
        theta = torch.tensor(THETA, dtype=DOUBLE, requires_grad=True)
        value = (old * weighted_k3(theta.log_softmax(0), REFERENCE.log(), old_logprobs)).sum()
        return value.item(), torch.autograd.grad(value, theta)[0]

    value, gradient = expected(old.log())
    assert value == pytest.approx(0.177386, abs=1e-6)
    torch.testing.assert_close(gradient, exact_gradient(forward=False), atol=1e-12, rtol=0)
    wrong_value, wrong_gradient = expected(None)
    assert abs(wrong_value - value) > 0.01 and not torch.allclose(wrong_gradient, gradient, atol=1e-2)


def test_an_estimator_gets_the_old_logprobs_if_it_asks_for_them() -> None:
    now, reference, old = (torch.tensor([x], dtype=DOUBLE) for x in (-1.0, -1.5, -1.0 - math.log(2)))
    assert apply_estimator(weighted_k3, now, reference, old).item() == pytest.approx(2 * k3(now, reference).item())
    for estimator in (k2, k3, lambda logprobs, ref_logprobs: logprobs - ref_logprobs):
        assert torch.equal(apply_estimator(estimator, now, reference, old), estimator(now, reference))
