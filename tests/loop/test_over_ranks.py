"""Moments over all ranks: by hand, against a loop in one process, and two real processes against one with all rows."""

import math
import statistics
from pathlib import Path

import pytest
import torch
from programs import server
from torch import Tensor, distributed, multiprocessing
from torch.nn.functional import pad

from modules.functional.masked import masked_whiten
from modules.trainer.ranks import explained_variance, mean_and_error, whiten_over_ranks

DOUBLE = torch.float64
NUM_LABELS = 4  # label 1 is on rank 0 alone, 2 on rank 1 alone, 3 on none
ROWS = {0: (3, 5), 1: (2, 7)}  # rank: N, T
LABELS = {0: [0, 1, 0], 1: [2, 0]}
OUTCOMES = {0: [0.5, 2.0, 1.0], 1: [4.0]}


def rank_rows(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make x [N, T], values [N, T], mask [N, T] and label [N] of one rank, with NaN in masked columns."""
    generator = torch.Generator().manual_seed(rank)
    x, values = 3 * rank + torch.randn(2, *ROWS[rank], generator=generator)
    mask = torch.rand(*ROWS[rank], generator=generator) < 0.8
    return x.masked_fill(~mask, math.nan), values.masked_fill(~mask, math.nan), mask, torch.tensor(LABELS[rank])


def everything() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Join the rows of both ranks to [5, 7], padded to one width."""
    width = max(columns for _, columns in ROWS.values())
    parts = [[pad(x, (0, width - x.shape[1])) if x.dim() == 2 else x for x in rank_rows(rank)] for rank in ROWS]
    x, values, mask, label = (torch.cat(both) for both in zip(*parts, strict=True))
    return x, values, mask, label


def two_ranks(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    x, values, mask, label = rank_rows(rank)
    nothing = x[:0], mask[:0], label[:0]
    results = {
        "whitened": whiten_over_ranks(x, mask, label, NUM_LABELS),
        "scaled": whiten_over_ranks(x, mask, label, NUM_LABELS, shift_mean=False),
        "alone": whiten_over_ranks(
            *((x, mask, label) if rank == 0 else nothing), NUM_LABELS
        ),  # rank 1 has no row at all
        "explained": explained_variance(values, x, mask),
        "error": mean_and_error(OUTCOMES[rank]),
        "single": mean_and_error([7.0] if rank else []),
    }
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_give_what_one_rank_gives_with_all_rows(tmp_path: Path) -> None:
    server()
    multiprocessing.start_processes(two_ranks, (tmp_path,), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in ROWS)
    x, values, mask, label = everything()
    for name, shift_mean in (("whitened", True), ("scaled", False)):
        whole = whiten_over_ranks(x, mask, label, NUM_LABELS, shift_mean)
        torch.testing.assert_close(first[name], whole[:3, :5], atol=1e-6, rtol=0)
        torch.testing.assert_close(second[name], whole[3:], atol=1e-6, rtol=0)
    x0, _, mask0, label0 = rank_rows(0)
    own = whiten_over_ranks(x0, mask0, label0, NUM_LABELS)
    torch.testing.assert_close(first["alone"], own, atol=1e-6, rtol=0)
    assert second["alone"].shape == (0, 7)
    assert not torch.allclose(first["whitened"], own, atol=0.1)  # the moments of one rank are other moments

    assert first["explained"] == second["explained"] == pytest.approx(explained_variance(values, x, mask), abs=1e-9)
    x1, values1, mask1, _ = rank_rows(1)
    averaged = (explained_variance(rank_rows(0)[1], x0, mask0) + explained_variance(values1, x1, mask1)) / 2
    assert abs(averaged - first["explained"]) > 0.1  # a mean over ranks is another number

    outcomes = OUTCOMES[0] + OUTCOMES[1]
    assert (
        first["error"]
        == second["error"]
        == pytest.approx((statistics.mean(outcomes), statistics.stdev(outcomes) / 2), abs=1e-12)
    )
    assert first["single"] == second["single"] == (7.0, 0.0)


def test_whiten_hand_numbers_per_label() -> None:
    # label 0: 1, 2, 3, 6 with mean 3 and variance 14 / 4; label 1: 10, 30 with mean 20 and deviation 10
    x = torch.tensor([[1.0, 2.0, math.nan], [10.0, math.inf, 30.0], [3.0, 6.0, math.nan]])
    mask, label = x.isfinite(), torch.tensor([0, 1, 0])
    before = x.clone()
    expected = torch.tensor([[-1.06904, -0.53452, 0.0], [-1.0, 0.0, 1.0], [0.0, 1.60357, 0.0]])
    means = torch.tensor([[3.0], [20.0], [3.0]]) * mask
    result = whiten_over_ranks(x, mask, label, num_labels=2)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        whiten_over_ranks(x, mask, label, 2, shift_mean=False), expected + means, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        whiten_over_ranks(x, mask, label + 3, 9), expected, atol=1e-5, rtol=0
    )  # labels without rows
    together = whiten_over_ranks(x, mask, torch.zeros(3, dtype=torch.long), 1)
    torch.testing.assert_close(together, masked_whiten(x, mask), atol=1e-6, rtol=0)
    assert not torch.allclose(together, result, atol=0.1)
    torch.testing.assert_close(x, before, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_one_label_equals_masked_whiten_and_labels_equal_a_loop(shift_mean: bool) -> None:
    x, _, mask, label = everything()
    for case in (x, x.double(), x.double().requires_grad_()):
        result = whiten_over_ranks(case, mask, torch.zeros_like(label), 1, shift_mean)
        assert result.dtype == case.dtype and not result.requires_grad
        torch.testing.assert_close(result, masked_whiten(case.detach(), mask, shift_mean), atol=1e-6, rtol=0)
    result = whiten_over_ranks(x, mask, label, NUM_LABELS, shift_mean)
    for i, t in mask.nonzero().tolist():
        mates = [x[j, s].item() for j, s in mask.nonzero().tolist() if label[j] == label[i]]
        scaled = (x[i, t].item() - statistics.fmean(mates)) / math.sqrt(statistics.pvariance(mates) + 1e-8)
        assert result[i, t].item() == pytest.approx(scaled + (0 if shift_mean else statistics.fmean(mates)), abs=1e-5)
    assert (result[~mask] == 0).all()


def test_whiten_padding_row_order_and_nothing_kept() -> None:
    x, _, mask, label = everything()
    order = torch.tensor([4, 2, 0, 3, 1])
    wide = whiten_over_ranks(pad(x, (1, 2), value=math.nan)[order], pad(mask, (1, 2))[order], label[order], NUM_LABELS)
    torch.testing.assert_close(
        wide, pad(whiten_over_ranks(x, mask, label, NUM_LABELS), (1, 2))[order], atol=1e-6, rtol=0
    )
    assert torch.equal(whiten_over_ranks(x, torch.zeros_like(mask), label, NUM_LABELS), torch.zeros_like(x))
    constant = torch.full_like(x, 0.1)
    torch.testing.assert_close(
        whiten_over_ranks(constant, mask, label, NUM_LABELS), torch.zeros_like(x), atol=1e-6, rtol=0
    )


def test_explained_variance_hand_numbers() -> None:
    returns, mask = (
        torch.tensor([[1.0, 2.0], [3.0, math.nan], [6.0, math.inf]]),
        torch.tensor([[1, 1], [1, 0], [1, 0]]).bool(),
    )
    values = torch.tensor([[1.0, 2.0], [3.0, math.inf], [4.0, math.nan]])
    # errors 0, 0, 0, 2: mean .5, variance (3 * .25 + 2.25) / 4 = .75; returns: variance 3.5
    assert explained_variance(values, returns, mask) == pytest.approx(1 - 0.75 / 3.5, abs=1e-9)
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(returns + 5, returns, mask) == pytest.approx(1.0, abs=1e-9)  # an offset is no variance
    assert explained_variance(torch.full_like(values, 9.0), returns, mask) == pytest.approx(0.0, abs=1e-9)
    assert explained_variance(-returns, returns, mask) == pytest.approx(1 - 4, abs=1e-9)  # worse than a constant
    assert explained_variance(returns, values, mask) == pytest.approx(
        1 - 0.75 / 1.25, abs=1e-9
    )  # 1, 2, 3, 4: the order matters


def test_explained_variance_against_a_loop_and_invariances() -> None:
    returns, values, mask, _ = everything()
    pairs = [(returns[i, t].item(), values[i, t].item()) for i, t in mask.nonzero().tolist()]
    expected = 1 - statistics.pvariance([a - b for a, b in pairs]) / statistics.pvariance([a for a, _ in pairs])
    assert explained_variance(values, returns, mask) == pytest.approx(expected, abs=1e-6)
    order = torch.tensor([4, 2, 0, 3, 1])
    wide = [pad(x, (1, 2))[order] for x in (values, returns, mask)]
    assert explained_variance(*wide) == pytest.approx(expected, abs=1e-6)
    assert explained_variance(1000 * values, 1000 * returns, mask) == pytest.approx(expected, abs=1e-6)


def test_returns_that_do_not_vary_explain_nothing() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    values = torch.tensor([[0.1, 0.7, -0.3], [0.9, 0.2, 0.4]])
    for constant in (0.0, 0.1, -3.7):
        assert explained_variance(values, torch.full((2, 3), constant), mask) == 0.0
    advantages = 1.0 / 3 - values
    rounded = advantages + values  # a return of 1/3 by way of the advantages
    assert rounded.unique().numel() > 1 and explained_variance(values, rounded, mask) == 0.0
    assert explained_variance(values, values, torch.zeros_like(mask)) == 0.0
    small = 1.0 + 1e-4 * values  # little variance is some
    assert explained_variance(small, small, mask) == 1.0


def test_mean_and_error_hand_numbers() -> None:
    # 1, 2, 3, 6: mean 3, sample variance 14 / 3, over n = 4
    assert mean_and_error([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, math.sqrt(14 / 3 / 4)), abs=1e-12)
    assert mean_and_error([6.0, 1.0, 3.0, 2.0]) == pytest.approx((3.0, math.sqrt(14 / 12)), abs=1e-12)
    assert mean_and_error([5.0]) == (5.0, 0.0) and mean_and_error([]) == (0.0, 0.0)
    assert mean_and_error([2.0, 2.0, 2.0]) == (2.0, 0.0)
