"""Token log-probs, entropies and sequence sums."""

import math

import pytest
import torch

from modules.functional.logprobs import chosen_logprobs, sequence_logprobs, token_entropies, token_logprobs

DOUBLE = torch.float64


def random_logits(num_rows: int = 2, num_tokens: int = 3, vocabulary: int = 5) -> torch.Tensor:
    return torch.randn(num_rows, num_tokens, vocabulary, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)) * 3


def test_hand_numbers_with_and_without_temperature() -> None:
    logits = torch.tensor(
        [[[0.0, math.log(3.0)]]], dtype=DOUBLE
    )  # softmax (1/4, 3/4); at temperature 0.5 it is (1, 9) / 10
    for target, plain, sharp in ((0, 1 / 4, 1 / 10), (1, 3 / 4, 9 / 10)):
        targets = torch.tensor([[target]])
        assert token_logprobs(logits, targets).item() == pytest.approx(math.log(plain), abs=1e-12)
        assert token_logprobs(logits, targets, temperature=0.5).item() == pytest.approx(math.log(sharp), abs=1e-12)
    assert token_entropies(logits).item() == pytest.approx(math.log(4) - 0.75 * math.log(3), abs=1e-12)


def test_naive_loop_and_no_shift() -> None:
    logits, targets = random_logits(), torch.tensor([[0, 4, 2], [1, 1, 3]])
    expected = torch.zeros(2, 3, dtype=DOUBLE)
    entropies = torch.zeros(2, 3, dtype=DOUBLE)
    for i in range(2):
        for t in range(3):
            weights = [math.exp(logit / 0.7) for logit in logits[i, t].tolist()]
            expected[i, t] = math.log(weights[targets[i, t]] / sum(weights))
            plain = [math.exp(logit) for logit in logits[i, t].tolist()]
            entropies[i, t] = -sum(w / sum(plain) * math.log(w / sum(plain)) for w in plain)
    logprobs = token_logprobs(logits, targets, temperature=0.7)
    torch.testing.assert_close(logprobs, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(token_entropies(logits), entropies, atol=1e-9, rtol=0)
    shifted = token_logprobs(logits[:, :-1], targets[:, 1:], temperature=0.7)
    assert not torch.allclose(logprobs[:, 1:], shifted)
    assert not torch.allclose(
        logprobs, token_logprobs(logits, targets) / 0.7
    )  # dividing after the softmax is another thing


def test_half_precision_is_computed_in_float32_and_double_stays_double() -> None:
    logits, targets = random_logits(vocabulary=64), torch.zeros(2, 3, dtype=torch.long)
    half = logits.bfloat16()
    for temperature in (1.0, 0.7):
        result = token_logprobs(half, targets, temperature)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, token_logprobs(half.float(), targets, temperature), atol=0, rtol=0)
    assert token_entropies(half).dtype == torch.float32
    assert token_logprobs(logits, targets).dtype == token_entropies(logits).dtype == DOUBLE


def test_constant_shift_of_the_logits_changes_nothing() -> None:
    logits, targets = random_logits(), torch.tensor([[0, 4, 2], [1, 1, 3]])
    torch.testing.assert_close(
        token_logprobs(logits + 100.0, targets), token_logprobs(logits, targets), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(token_entropies(logits + 100.0), token_entropies(logits), atol=1e-9, rtol=0)


def test_entropy_limits_and_a_forbidden_token() -> None:
    assert token_entropies(torch.zeros(1, 1, 8, dtype=DOUBLE)).item() == pytest.approx(math.log(8), abs=1e-12)
    logits = torch.tensor([[[0.0, 0.0, -math.inf]]], dtype=DOUBLE, requires_grad=True)
    entropy = token_entropies(logits)
    assert entropy.item() == pytest.approx(math.log(2), abs=1e-12)
    entropy.sum().backward()
    assert logits.grad is not None and torch.equal(logits.grad, torch.zeros(1, 1, 3, dtype=DOUBLE))


def test_gradients() -> None:
    logits, targets = random_logits().requires_grad_(), torch.tensor([[0, 4, 2], [1, 1, 3]])
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, targets, 0.7), (logits,))
    assert torch.autograd.gradcheck(token_entropies, (logits,))


def test_sequence_sum_ignores_masked_columns_in_value_and_gradient() -> None:
    logprobs = torch.tensor(
        [[-1.0, -2.0, math.nan], [-4.0, -math.inf, math.inf], [math.nan] * 3], dtype=DOUBLE, requires_grad=True
    )
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    before = logprobs.detach().clone()
    result = sequence_logprobs(logprobs, mask)
    assert result.tolist() == [-3.0, -4.0, 0.0]  # a sum, not a mean: -1.5 would be the first row's mean
    result.sum().backward()
    assert logprobs.grad is not None and torch.equal(logprobs.grad, mask.to(DOUBLE))
    assert torch.equal(logprobs.detach().nan_to_num(7.0), before.nan_to_num(7.0))
    padded = sequence_logprobs(
        torch.nn.functional.pad(before, (0, 4), value=math.nan), torch.nn.functional.pad(mask, (0, 4))
    )
    assert torch.equal(padded, result)
    assert sequence_logprobs(before, mask * 0.5).tolist() == [-1.5, -2.0, 0.0]


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(random_logits(), torch.zeros(2, 3, dtype=torch.long), temperature)


def test_the_gradient_that_is_made_in_place_is_that_of_a_softmax() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets, weights = torch.tensor([4, 0, 2]), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found, whole = chosen_logprobs(logits, targets, temperature=0.7)
    expected = (logits / 0.7).log_softmax(-1)
    assert torch.allclose(found, expected[torch.arange(3), targets], atol=1e-12) and not whole.requires_grad
    (mine,) = torch.autograd.grad(found @ weights, logits)
    # d log p_y / d z_v = (1 if v = y else 0) - p_v, over the temperature
    by_hand = (torch.eye(5, dtype=torch.float64)[targets] - expected.exp()) * weights[:, None] / 0.7
    assert torch.allclose(mine, by_hand, atol=1e-12)
    (theirs,) = torch.autograd.grad(expected[torch.arange(3), targets] @ weights, logits)
    assert torch.allclose(mine, theirs, atol=1e-12)
