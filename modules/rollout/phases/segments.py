"""Samples completions in segments, one a phase, and chooses the complete groups that a phase trains on."""

import inspect
from collections.abc import Collection, Sequence
from dataclasses import replace

from modules.rollout.engine import RolloutEngine
from modules.rollout.phases.dynamic_sampling import Gathered, number_groups
from modules.rollout.sampling import Sampling
from modules.trainer.ranks import from_all_ranks
from modules.types import Completion, Rollout


def check_partial(engine: RolloutEngine, sampling: Sampling, environment: object | None) -> None:
    """Refuse partial rollouts with what cannot go on from a beginning.

    Raises:
        ValueError: an engine without ``started``, thinking budgets, or an environment.
    """
    if sampling.partial is None:
        return
    if "started" not in inspect.signature(engine.generate).parameters:
        raise ValueError(
            f"sampling.partial: {type(engine).__name__}.generate takes no beginnings (started), so that completions cannot "
            "go on in the next phase: leave model.engine or sampling.partial out"
        )
    if engine.max_staleness > 0:
        raise ValueError(
            f"sampling.partial: {type(engine).__name__} samples ahead (max_staleness {engine.max_staleness}), before it is "
            "known which completions go on: set max_staleness to 0 or leave sampling.partial out"
        )
    if sampling.thinking is not None and sampling.thinking.budgets:
        raise ValueError(
            "sampling.partial: a thinking budget cannot be kept in a completion that goes on in another phase: leave "
            "sampling.partial or sampling.thinking.budget out"
        )
    if environment is not None:
        raise ValueError(
            "sampling.partial: a completion with tools cannot go on in another phase, because its environment is not kept: "
            "leave sampling.partial or model.environment out"
        )


def require_all_segments(sampling: Sampling, method: str) -> None:
    """Refuse to leave tokens of earlier phases out of the loss of a method that learns from whole completions.

    Raises:
        ValueError: ``sampling.partial.learn_earlier`` is False.
    """
    if sampling.partial is not None and not sampling.partial.learn_earlier:
        raise ValueError(
            f"sampling.partial.learn_earlier is false, and {method} learns from whole completions: leave it at true"
        )


def cut_to_segment(sampling: Sampling) -> Sampling:
    """Return the settings of a first segment."""
    assert sampling.partial is not None
    length = min(sampling.partial.tokens_per_phase, sampling.max_completion_length)
    return replace(sampling, max_completion_length=length, partial=None)


def count_least(sampling: Sampling, need: int, updates: int, micro_batches: int, per_group: int) -> int:
    """Count the groups without which a phase cannot make its updates.

    Args:
        sampling: of whole completions.
        need: groups of an ordinary phase of this rank.
        updates: of a pass.
        micro_batches: of an update.
        per_group: micro-batches that a group may be split into.

    Raises:
        ValueError: these are all groups of the phase, so that no completion could wait for the next.
    """
    assert sampling.partial is not None
    least = updates * -(-micro_batches // per_group)
    if least >= need and sampling.partial.tokens_per_phase < sampling.max_completion_length:
        raise ValueError(
            f"sampling.partial lets no completion wait: {updates} updates of {micro_batches} micro-batches take at least "
            f"{least} groups, and a phase has {need} on this rank; raise data.prompts_per_phase, or lower "
            "data.updates_per_phase or trainer.accumulate_grad_batches"
        )
    return min(need, least)


def begin_rollouts(rollouts: Sequence[Rollout], seeds: Sequence[int], sampling: Sampling) -> list[Rollout]:
    """Give those that go on in the next segment their seeds.

    Args:
        rollouts: after their first segment, prompt by prompt.
        seeds: one per prompt, that of its first completion.
        sampling: of whole completions.
    """
    per_prompt = len(rollouts) // max(1, len(seeds))
    own = [seed + number for seed in seeds for number in range(per_prompt)]
    return [keep_seed(rollout, seed, sampling) for rollout, seed in zip(rollouts, own, strict=True)]


def keep_seed(rollout: Rollout, seed: int, sampling: Sampling) -> Rollout:
    """Return the rollout with this seed if it goes on, else without one."""
    assert sampling.partial is not None
    on = sampling.partial.goes_on(rollout.completion, sampling.max_completion_length)
    return replace(rollout, seed=seed if on else None)


def go_on(
    engine: RolloutEngine, rollouts: Sequence[Rollout], sampling: Sampling, groups: Collection[int] | None = None
) -> list[Rollout]:
    """Sample one more segment of each rollout that is not complete, or of those of some groups, with the engine's weights.

    An engine that does not keep to ``sampling.partial`` has one length for all completions of a call, so that those of
    different lengths take a call each.
    """
    assert sampling.partial is not None
    found = list(rollouts)
    calls: dict[int, list[int]] = {}
    for place, rollout in enumerate(rollouts):
        if rollout.seed is not None and (groups is None or rollout.group in groups):
            limit = len(rollout.completion.token_ids) + sampling.partial.tokens_per_phase
            limit = sampling.max_completion_length if engine.limits_segments else limit
            calls.setdefault(min(limit, sampling.max_completion_length), []).append(place)
    for limit, places in calls.items():
        segment = sampling if engine.limits_segments else replace(sampling, max_completion_length=limit, partial=None)
        chosen = [rollouts[place] for place in places]
        seeds = [rollout.seed for rollout in chosen if rollout.seed is not None]
        started = [rollout.completion for rollout in chosen]
        completions: list[list[Completion]] = engine.generate(  # type: ignore[call-arg]
            [rollout.prompt_ids for rollout in chosen], 1, segment, seeds, started=started
        )
        for place, seed, (completion,) in zip(places, seeds, completions, strict=True):
            found[place] = keep_seed(replace(rollouts[place], completion=completion), seed, sampling)
    return found


def gather_segments(
    engine: RolloutEngine,
    sampling: Sampling,
    carried: Sequence[Rollout],
    begun: Sequence[Rollout],
    need: int,
    least: int,
) -> Gathered:
    """Go on with carried groups, and choose the groups that this phase trains on (collective).

    Args:
        engine: with the weights of this phase.
        sampling: of whole completions.
        carried: groups of earlier phases in the order in which they were begun, complete or not.
        begun: groups that this phase has begun, after their first segment.
        need: groups to train on, at most.
        least: groups to train on, at least; every rank samples until all have them.

    Returns:
        the chosen groups, without scores, and what is left to the next phase.
    """
    rollouts = go_on(engine, number_groups(carried, 0), sampling)
    rollouts += number_groups(begun, len({rollout.group for rollout in rollouts}))
    rounds = 1
    while not all(from_all_ranks([len(complete := find_complete(rollouts)) >= least])):
        # Only the first groups, as many as are missing: if all went on, none would be left to the next phase.
        waiting = [group for group in dict.fromkeys(rollout.group for rollout in rollouts) if group not in complete]
        missing = set(waiting[: max(0, least - len(complete))])
        rollouts = go_on(engine, rollouts, sampling, missing)
        rounds += 1
    chosen = set(complete[:need])
    left = [rollout for rollout in rollouts if rollout.group not in chosen]
    groups = len({rollout.group for rollout in rollouts})
    sampled = count_sampled(rollouts) - count_sampled(carried)
    taken = [rollout for rollout in rollouts if rollout.group in chosen]
    segments = [len(set(rollout.completion.token_versions)) for rollout in taken]
    metrics = {
        "carried": 1 - len(chosen) / groups,
        "rounds": float(rounds),
        "segments": sum(segments) / len(segments),
        "sampled_tokens": float(sum(from_all_ranks([sampled]))),
    }
    named = {f"partial/{name}": value for name, value in metrics.items()}
    return Gathered(number_groups(taken, 0), left=left, metrics=named)


def count_sampled(rollouts: Sequence[Rollout]) -> int:
    """Count the tokens of some rollouts."""
    return sum(len(rollout.completion.token_ids) for rollout in rollouts)


def find_complete(rollouts: Sequence[Rollout]) -> list[int]:
    """Return the groups of which every completion is complete, in order."""
    going = {rollout.group for rollout in rollouts if rollout.seed is not None}
    return [group for group in dict.fromkeys(rollout.group for rollout in rollouts) if group not in going]
