"""The clipped value loss: numbers by hand, a loop, gradients, and padding that must not matter."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from modules.losses.value import ClippedValue

DOUBLE = torch.float64
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # values, old_values, returns, mask, denominator


def take(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    denominator: Tensor | float,
    clip: float | None = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of a micro-batch that holds only what the class reads."""
    batch: Any = {
        "values": old_values,
        "returns": returns,
        "completion_mask": mask,
        "denominator": torch.as_tensor(denominator, dtype=DOUBLE),
    }
    return ClippedValue(clip)(values, batch)


def random_case() -> Case:
    generator = torch.Generator().manual_seed(0)
    values, old_values, returns = torch.randn(3, 4, 6, dtype=DOUBLE, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.7
    return values, old_values, returns, mask, torch.tensor(13.0, dtype=DOUBLE)


@pytest.mark.parametrize(
    ("value", "target", "clip", "loss", "slope", "cut"),
    [
        (1.0, 0.0, 0.2, 0.5, 1.0, 0),  # 1/2 max(1, .7^2 = .49): it moved away from its target, the way back stays open
        (1.0, 1.0, 0.2, 0.045, 0.0, 1),  # 1/2 max(0, .3^2 = .09)
        (0.0, 0.0, 0.2, 0.045, 0.0, 1),  # the same below V_old: clipped to .3
        (0.6, 1.0, 0.2, 0.08, -0.4, 0),  # inside: 1/2 .4^2
        (1.0, 1.0, None, 0.0, 0.0, 0),
        (1.0, 0.0, None, 0.5, 1.0, 0),
        (1.0, 1.0, 0.4, 0.005, 0.0, 1),  # clipped to .9
    ],
)
def test_hand_numbers(value: float, target: float, clip: float | None, loss: float, slope: float, cut: int) -> None:
    """The old value is 0.5."""
    values = torch.tensor([[value]], dtype=DOUBLE, requires_grad=True)
    old_values, returns = torch.tensor([[0.5]], dtype=DOUBLE), torch.tensor([[target]], dtype=DOUBLE)
    result, metrics = take(values, old_values, returns, torch.ones(1, 1, dtype=torch.bool), 1, clip)
    assert result.item() == pytest.approx(loss, abs=1e-12)
    assert torch.autograd.grad(result, values)[0].item() == pytest.approx(slope, abs=1e-12)
    assert metrics.keys() == {"value_clip_ratio"} and metrics["value_clip_ratio"] == cut


@pytest.mark.parametrize("clip", [0.1, 0.7, None])
def test_against_a_loop(clip: float | None) -> None:
    values, old_values, returns, mask, denominator = random_case()
    total, smaller, cut = 0.0, 0.0, 0
    for i, t in mask.nonzero().tolist():
        value, old, target = (x[i, t].item() for x in (values, old_values, returns))
        near = value if clip is None else min(max(value, old - clip), old + clip)
        total, smaller = (
            total + max((value - target) ** 2, (near - target) ** 2),
            smaller + min((value - target) ** 2, (near - target) ** 2),
        )
        cut += abs(near - target) > abs(value - target)
    loss, metrics = take(values, old_values, returns, mask, denominator, clip)
    assert loss.item() == pytest.approx(0.5 * total / 13, abs=1e-12)
    assert metrics["value_clip_ratio"].item() == pytest.approx(cut / mask.sum().item(), abs=1e-6)
    if clip is not None:
        assert 0 < cut < mask.sum()
        assert loss.item() - 0.5 * smaller / 13 > 0.1  # the minimum is another loss
    around_targets = take(values, returns, old_values, mask, denominator, clip)[0]
    assert not math.isclose(around_targets.item(), loss.item(), rel_tol=1e-3)


def test_default_clip_gradcheck_row_order_and_padding() -> None:
    values, old_values, returns, mask, denominator = random_case()
    reference = take(values, old_values, returns, mask, denominator, 0.2)[0]
    assert ClippedValue().clip == 0.2
    order = torch.tensor([2, 0, 3, 1])
    wide = [pad(x, (1, 3), value=math.nan)[order] for x in (values, old_values, returns)]
    shuffled = take(wide[0], wide[1], wide[2], pad(mask, (1, 3))[order], denominator)[0]
    torch.testing.assert_close(shuffled, reference, atol=1e-12, rtol=0)
    for clip in (0.2, None):
        leaf = values.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, c=clip: take(x, old_values, returns, mask, denominator, c)[0], (leaf,)
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_columns_reach_neither_loss_nor_metric_nor_gradient(bad: float) -> None:
    values, old_values, returns, mask, denominator = random_case()
    clean = values.clone().requires_grad_()
    reference, reference_metrics = take(clean, old_values, returns, mask, denominator)
    expected = torch.autograd.grad(reference, clean)[0]
    dirty = [x.masked_fill(~mask, bad) for x in (values, old_values, returns)]
    before = [x.clone() for x in dirty]
    with torch.autograd.set_detect_anomaly(True):  # raises for a NaN anywhere on the way back
        loss, metrics = take(dirty[0].requires_grad_(), dirty[1], dirty[2], mask, denominator)
        torch.testing.assert_close(torch.autograd.grad(loss, dirty[0])[0], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(loss, reference, atol=1e-12, rtol=0)
    assert metrics == reference_metrics and not metrics["value_clip_ratio"].requires_grad
    torch.testing.assert_close([x.detach() for x in dirty], before, atol=0, rtol=0, equal_nan=True)
    assert (expected[~mask] == 0).all() and (expected[mask] != 0).any()


def test_micro_batches_add_up_and_an_empty_one_gives_zero() -> None:
    values, old_values, returns, mask, denominator = random_case()
    whole = take(values, old_values, returns, mask, denominator)[0]
    parts = [take(values[i], old_values[i], returns[i], mask[i], denominator)[0] for i in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(parts[0] + parts[1], whole, atol=1e-12, rtol=0)
    leaf = values.clone().requires_grad_()
    empty, metrics = take(leaf, old_values, returns, torch.zeros_like(mask), 0)
    assert empty == 0 and metrics["value_clip_ratio"] == 0 and (torch.autograd.grad(empty, leaf)[0] == 0).all()


def test_errors_say_what_is_wrong() -> None:
    values, old_values, returns, mask, denominator = random_case()
    for clip in (0.0, -0.2, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"clip must be .*> 0, got {clip}"):
            take(values, old_values, returns, mask, denominator, clip)
    with pytest.raises(ValueError, match=r"shapes \[\(4, 6\), \(4, 6\), \(4, 1\), \(4, 6\)\]"):
        take(values, old_values, returns[:, :1], mask, denominator)
    with pytest.raises(ValueError, match="shapes"):
        take(values, old_values, returns, mask[0], denominator)
