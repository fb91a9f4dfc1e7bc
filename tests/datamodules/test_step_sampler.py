"""The plan of an epoch: micro-batches and ranks change neither the rows nor the denominator of a step."""

import random
from itertools import pairwise

import pytest
import torch

from datamodules.instruction import InstructionDataset
from datamodules.loaders.step_sampler import MicroBatch, StepSampler
from datamodules.tokens.encoding import Tokens
from modules.functional.masked import pad_rows

LENGTHS = random.Random(0).choices(range(2, 60), k=29)
WEIGHTS = [length // 2 for length in LENGTHS]
Step = tuple[frozenset[int], int]


def sampler(
    batch_size: int, accumulate: int, world: int, rank: int, shuffle: bool = True, epoch: int = 0, rows: int = 29
) -> StepSampler:
    return StepSampler(
        LENGTHS[:rows],
        WEIGHTS[:rows],
        batch_size,
        accumulate,
        world,
        rank,
        seed=3,
        shuffle=shuffle,
        current_epoch=lambda: epoch,
    )


def steps(batch_size: int, accumulate: int, world: int, epoch: int = 0, rows: int = 29) -> list[Step]:
    """Join what all ranks yield to the rows and the denominator of each optimiser step; no row occurs twice."""
    ranks = [list(sampler(batch_size, accumulate, world, rank, epoch=epoch, rows=rows)) for rank in range(world)]
    found = []
    for start in range(0, len(ranks[0]), accumulate):
        window = [batch for batches in ranks for batch in batches[start : start + accumulate]]
        (denominator,) = {batch.denominator for batch in window}
        used = [row for batch in window if batch.counts for row in batch.indices]
        assert len(used) == len(set(used))
        found.append((frozenset(used), denominator))
    return found


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "world"),
    [(2, 4, 1), (1, 8, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (1, 2, 4), (2, 1, 4), (1, 1, 8)],
)
def test_a_step_is_the_same_for_every_cut(batch_size: int, accumulate: int, world: int) -> None:
    for epoch in (0, 1):
        assert steps(batch_size, accumulate, world, epoch) == steps(8, 1, 1, epoch)


def test_an_epoch_uses_every_row_once_and_divides_by_what_it_uses() -> None:
    found = steps(2, 2, 2)
    assert sorted(row for rows, _ in found for row in rows) == list(range(29))
    assert [denominator for _, denominator in found] == [sum(WEIGHTS[row] for row in rows) for rows, _ in found]
    assert [len(rows) for rows, _ in found] == [8, 8, 8, 5]
    assert steps(2, 2, 2, epoch=1) != found


@pytest.mark.parametrize("rows", range(1, 30))
def test_ragged_ends_give_every_rank_as_many_batches_as_promised(rows: int) -> None:
    for batch_size, accumulate, world in ((1, 1, 3), (2, 2, 2), (3, 2, 4), (1, 4, 2), (8, 1, 1)):
        ranks = [sampler(batch_size, accumulate, world, rank, rows=rows) for rank in range(world)]
        yielded = [list(each) for each in ranks]
        assert [len(batches) for batches in yielded] == [len(each) for each in ranks] == [len(ranks[0])] * world
        flat = [batch for batches in yielded for batch in batches]
        assert all(1 <= len(batch.indices) <= batch_size for batch in flat)
        assert sorted(row for batch in flat if batch.counts for row in batch.indices) == list(range(rows))


def test_a_rank_without_a_row_gets_a_filler() -> None:
    (filler,) = sampler(1, 1, 2, 1, rows=1)
    assert filler._replace(step=()) == MicroBatch((0,), WEIGHTS[0], counts=False)
    dataset = InstructionDataset([Tokens([5, 6, 7], [False, True, True])], pad_id=0)
    batch = dataset[filler]
    assert batch["loss_mask"].tolist() == [[False] * 3] and batch["denominator"] == WEIGHTS[0]
    assert batch["attention_mask"].all()


def test_micro_batches_hold_rows_of_like_length_and_ranks_like_loads() -> None:
    lengths = random.Random(1).choices(range(1, 501), k=256)
    ranks = [list(StepSampler(lengths, lengths, 4, 8, 2, rank)) for rank in range(2)]
    padded = sum(max(lengths[row] for row in batch.indices) * 4 for batches in ranks for batch in batches)
    assert padded < 1.15 * sum(lengths)  # in the shuffled order it would be about 1.6
    for start in range(0, 32, 8):
        window = [batch for batches in ranks for batch in batches[start : start + 8]]
        for longer, shorter in pairwise(window[:8]):
            assert min(lengths[row] for row in longer.indices) >= max(lengths[row] for row in shorter.indices)
        loads = [sum(lengths[row] for batch in part for row in batch.indices) for part in (window[:8], window[8:])]
        assert abs(loads[0] - loads[1]) < 0.02 * sum(loads)


def test_the_first_micro_batch_of_a_step_names_all_of_its_rank() -> None:
    plan = list(sampler(2, 3, 2, 1))
    for start in range(0, len(plan), 3):
        assert plan[start].step == (plan[start]._replace(step=()), *plan[start + 1 : start + 3])
        assert all(batch.step == () for batch in plan[start + 1 : start + 3])


def test_ranks_take_turns_with_the_longer_row() -> None:
    loads = [
        [sum(row + 1 for row in batch.indices) for batch in StepSampler(range(1, 9), [1] * 8, 4, 1, 2, rank)]
        for rank in range(2)
    ]
    assert loads == [[8 + 5 + 4 + 1], [7 + 6 + 3 + 2]]


def test_without_shuffling_steps_follow_the_rows() -> None:
    plan = list(sampler(4, 1, 1, 0, shuffle=False))
    assert [sorted(batch.indices) for batch in plan] == [
        list(range(start, min(start + 4, 29))) for start in range(0, 29, 4)
    ]


def test_starting_inside_an_epoch_gives_the_rest_from_the_step_begun_and_other_epochs_whole() -> None:
    whole = list(sampler(2, 2, 1, 0, epoch=5))
    for position in range(len(whole) + 1):
        resumed = sampler(2, 2, 1, 0, epoch=5)
        resumed.start_at(5, position)
        begun = position if position == len(whole) else position // 2 * 2  # two micro-batches a step
        assert list(resumed) == whole[begun:]
        assert resumed.begun == (5, len(whole))
        resumed.current_epoch = lambda: 6
        assert list(resumed) == list(sampler(2, 2, 1, 0, epoch=6))


def test_the_position_is_counted_before_the_batch_is_handed_out() -> None:
    each = sampler(2, 2, 1, 0, epoch=2)
    iterator = iter(each)
    for position in range(1, len(each) + 1):
        next(iterator)
        assert each.begun == (2, position)


def test_padding_is_on_the_right_and_masks_come_from_lengths() -> None:
    ids, mask = pad_rows([[7, 0, 2], [2]], fill=2)  # 2 is end and pad at once, 0 a real token
    assert ids.tolist() == [[7, 0, 2], [2, 2, 2]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    batch = InstructionDataset([Tokens([7, 0, 2], [False, True, True]), Tokens([9, 2], [False, True])], pad_id=2)[
        MicroBatch((1, 0), 11)
    ]
    assert batch["input_ids"].tolist() == [[9, 2, 2], [7, 0, 2]]
    assert batch["attention_mask"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["loss_mask"].tolist() == [[False, True, False], [False, True, True]]
    assert (
        batch["denominator"].dtype == torch.float32 and batch["denominator"] == 11 and batch["denominator"].shape == ()
    )
