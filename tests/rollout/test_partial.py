"""Partial rollouts by themselves: what ends a completion, the settings, and the groups that a phase takes."""

import random
from dataclasses import replace

import pytest

from modules.rollout import InProcessEngine, PartialRollouts, Sampling
from modules.rollout.phases.partial import repeats_at_end
from modules.rollout.phases.segments import count_least, gather_segments, go_on
from modules.types import Completion, Rollout


def has_copies(tokens: list[int], times: int) -> bool:
    """The definition, pattern by pattern."""
    ends = (tokens[-size:] * times for size in range(1, len(tokens) // times + 1))
    return any(tokens[-len(end) :] == end for end in ends)


def test_a_repetition_is_found_at_the_end_alone():
    assert repeats_at_end([9, 4, 4, 4], 3) and not repeats_at_end([4, 4, 4, 9], 3)
    assert repeats_at_end([7, 1, 2, 3, 1, 2, 3], 2) and not repeats_at_end([7, 1, 2, 3, 1, 2, 3], 3)
    assert not repeats_at_end([], 2) and not repeats_at_end([1], 2)


def test_repetitions_are_those_of_the_definition():
    draw = random.Random(0)
    rows = [[draw.randrange(2) for _ in range(draw.randrange(14))] for _ in range(3000)]
    found = [(has_copies(row, times), repeats_at_end(row, times)) for row in rows for times in (2, 3, 4)]
    assert all(expected == mine for expected, mine in found)
    assert {expected for expected, _ in found} == {True, False}


@pytest.mark.parametrize(
    ("partial", "problem"),
    [
        ({"tokens_per_phase": 0}, "sampling.partial: tokens_per_phase must be >= 1, got 0"),
        ({"tokens_per_phase": 4, "max_repeats": 1}, "sampling.partial: max_repeats must be >= 2, got 1"),
        ({"tokens_per_phase": 8, "max_repeats": 4}, "max_repeats and learn_earlier do nothing where tokens_per_phase"),
        ({"tokens_per_phase": 8, "learn_earlier": False}, "do nothing where tokens_per_phase is at least max_compl"),
    ],
)
def test_settings_that_mean_nothing_are_refused(partial, problem):
    with pytest.raises(ValueError, match=problem):
        Sampling(max_completion_length=8, partial=PartialRollouts(**partial))


def test_what_goes_on_has_used_up_its_tokens_and_not_its_length():
    partial = PartialRollouts(3, max_repeats=3)

    def goes_on(tokens: list[int], finish: str) -> bool:
        return partial.goes_on(Completion(tokens, [0.0] * len(tokens), "", finish), 6)  # type: ignore[arg-type]

    assert goes_on([1, 2, 3], "length")
    assert not goes_on([1, 2, 3], "stop") and not goes_on([1, 2, 3], "abort")
    assert not goes_on([1, 2, 3, 4, 5, 6], "length")
    assert not goes_on([1, 1, 1], "length")  # it repeats itself


class Counting(InProcessEngine):
    """Goes on with the numbers 0, 1, 2, ...; the seed is the length at which a completion stops."""

    limits_segments = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, list[int]]] = []

    def generate(self, prompts, num_generations, sampling, seeds, replies=None, started=None):
        self.calls.append((sampling.max_completion_length, seeds))
        found = []
        for seed, old in zip(seeds, started, strict=True):
            length = min(seed, sampling.max_completion_length)
            versions = [*old.token_versions, *[2] * (length - len(old.token_ids))]
            finish = "stop" if length == seed else "length"
            found.append([Completion([*range(length)], [-1.0] * length, "", finish, 2, versions=versions)])
        return found


def rollout(group: int, tokens: int, until: int) -> Rollout:
    """A completion of ``until`` tokens, of which earlier weights sampled some."""
    done = tokens == until
    completion = Completion([*range(tokens)], [-1.0] * tokens, "", "stop" if done else "length", 1)
    return Rollout(str(group), "", [1], None, completion, group, {}, None, seed=None if done else until)


SETTINGS = Sampling(max_completion_length=12, partial=PartialRollouts(3))


def test_complete_groups_are_taken_in_the_order_in_which_they_were_begun():
    carried = [
        rollout(0, 6, 8),
        rollout(0, 2, 2),
        rollout(1, 3, 12),
        rollout(1, 3, 3),
        rollout(2, 1, 1),
        rollout(2, 3, 4),
    ]
    begun = [rollout(0, 1, 1), rollout(0, 2, 2), rollout(1, 3, 5), rollout(1, 1, 1)]
    engine = Counting()
    found = gather_segments(engine, SETTINGS, carried, begun, need=2, least=1)
    assert engine.calls == [(9, [8]), (6, [12, 4])]  # of equal length together, and three tokens each
    assert [(each.uid, each.group, each.seed) for each in found.rollouts] == [("0", 0, None)] * 2 + [("2", 1, None)] * 2
    assert [len(each.completion.token_ids) for each in found.rollouts] == [8, 2, 1, 4]
    assert [(each.uid, len(each.completion.token_ids), each.seed) for each in found.left] == [
        ("1", 6, 12),
        ("1", 3, None),
        ("0", 1, None),  # complete too, and there was no place for it
        ("0", 2, None),
        ("1", 3, 5),
        ("1", 1, None),
    ]
    assert found.metrics == {
        "partial/carried": 3 / 5,
        "partial/rounds": 1.0,
        "partial/segments": 6 / 4,  # of 8 tokens and of 4 in two phases
        "partial/sampled_tokens": 2.0 + 3 + 1 + (1 + 2 + 3 + 1),
    }


def test_a_phase_without_enough_groups_goes_on_with_the_first_of_them_alone():
    begun = [rollout(0, 3, 10), rollout(0, 2, 2), rollout(1, 3, 4), rollout(2, 3, 4)]
    engine = Counting()
    found = gather_segments(engine, SETTINGS, [], begun, need=3, least=1)
    assert engine.calls == [(6, [10]), (9, [10]), (12, [10])]
    assert [each.uid for each in found.rollouts] == ["0", "0"] and [each.uid for each in found.left] == ["1", "2"]
    assert found.metrics["partial/rounds"] == 4


def test_a_phase_takes_a_group_for_as_many_micro_batches_as_it_can_be_split_into():
    assert count_least(SETTINGS, need=16, updates=2, micro_batches=5, per_group=4) == 4
    assert count_least(SETTINGS, need=16, updates=2, micro_batches=5, per_group=1) == 10
    with pytest.raises(
        ValueError, match=r"lets no completion wait: 2 updates .* at least 10 groups, and a phase has 10"
    ):
        count_least(SETTINGS, need=10, updates=2, micro_batches=5, per_group=1)
    ordinary = Sampling(max_completion_length=12, partial=PartialRollouts(12))
    assert count_least(ordinary, need=10, updates=2, micro_batches=5, per_group=1) == 10


class Single(InProcessEngine):
    """Keeps to no budget of a phase, so that completions of different lengths take a call each."""

    limits_segments = False


def test_a_call_samples_as_much_of_each_completion_as_a_phase_allows(either):
    """In continuous and in static batches."""
    prompts, seeds = [[5, 6, 7], [8, 9]], [3, 40]
    whole = Sampling(max_completion_length=11)
    parts = Sampling(max_completion_length=11, partial=PartialRollouts(3))
    found = []
    for engine in (InProcessEngine(), Single()):
        engine.sync_weights(either, 0)
        unbroken = engine.generate(prompts, 1, whole, seeds)
        begun = []
        for row, (length, seed) in enumerate(zip((2, 7), seeds, strict=True)):
            done = replace(unbroken[row][0], token_ids=unbroken[row][0].token_ids[:length])
            done = replace(done, logprobs=done.logprobs[:length], finish="length")
            begun.append(Rollout("", "", prompts[row], None, done, row, {}, None, seed=seed))
        for lengths in ((5, 10), (8, 11), (11, 11)):
            begun = go_on(engine, begun, parts)
            for each, (expected,), length in zip(begun, unbroken, lengths, strict=True):
                assert each.completion.token_ids == expected.token_ids[:length]
        assert [each.seed for each in begun] == [None, None]
        found.append([each.completion.token_ids for each in begun])
    assert found[0] == found[1]
