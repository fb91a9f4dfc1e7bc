"""Scoring a phase: every distinct completion is scored once, and every row gets the same numbers."""

import math
import random
from dataclasses import replace

import pytest
import torch

from modules.networks import policy as networks
from modules.networks.policy import Policy
from modules.rollout.scoring import make_batch, score_in_chunks
from modules.trainer.cuts import cut_by_length
from modules.types import Completion, Rollout


def rollout(group: int, prompt: list[int], tokens: list[int]) -> Rollout:
    return Rollout(str(group), "", prompt, None, Completion(tokens, [0.0] * len(tokens), "", "stop"), group, {}, None)


@pytest.mark.parametrize("tokens", [1, 10_000], ids=["a completion at a time", "at once"])
def test_completions_are_scored_once_and_every_row_gets_its_numbers(monkeypatch, tokens):
    monkeypatch.setattr(networks, "CPU_TOKENS", tokens)
    policy = Policy("tiny", dropout=False)
    answers = {
        0: [[9, 8, 7], [9, 8], [9, 8, 7], [9, 8, 0]],
        1: [[9, 8, 7], [5]],
        2: [[6], [6], [6]],
    }  # 0 is also what pads
    batch = make_batch(
        [rollout(g, [20 + g] * (g + 1), row) for g, rows in answers.items() for row in rows], torch.device("cpu")
    )
    scored = []

    def score(part):
        scored.append(len(part["completion_ids"]))
        return (policy.completion_scores(part).logprobs,)

    with torch.no_grad():
        (logprobs,) = score_in_chunks(policy, score, batch)
        expected = policy.completion_scores(batch).logprobs
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    assert torch.equal(logprobs[0], logprobs[2])
    assert sum(scored) == 3 + 2 + 1
    assert len(scored) == (6 if tokens == 1 else 1)


def lognormal_phase(prompts: int = 32, each: int = 8) -> tuple[list[int], list[int], list[int]]:
    """Lengths of completions (lognormal, mean 60, at most 256), their prompts, and lengths of these."""
    draw = random.Random(0)
    widths = [min(256, max(1, round(draw.lognormvariate(math.log(47), 0.7)))) for _ in range(prompts * each)]
    return widths, [i // each for i in range(prompts * each)], [draw.randint(40, 120) for _ in range(prompts)]


def count_padded(chunks, widths, owners, befores) -> int:
    """Count the columns that are computed for the chunks, prompts included, by a plain loop."""
    total = 0
    for chunk in chunks:
        seen = {owners[place] for place in chunk}
        total += len(chunk) * max(widths[place] for place in chunk) + len(seen) * max(befores[each] for each in seen)
    return total


def test_few_columns_of_a_chunk_are_padding():
    """At lognormal lengths a phase of one width computes 3.9 times its tokens, groups of one width 2 times; chunks 1.5."""
    widths, owners, befores = lognormal_phase()
    assert 55 < sum(widths) / len(widths) < 65
    real = sum(widths) + sum(befores)
    groups = [[place for place in range(len(widths)) if owners[place] == owner] for owner in range(32)]
    chunks = cut_by_length(widths, owners, befores, most=16384, forward=64)
    assert sorted(place for chunk in chunks for place in chunk) == list(range(len(widths)))
    counts = [count_padded(each, widths, owners, befores) for each in ([range(len(widths))], groups, chunks)]
    assert counts[0] == 256 * 256 + 32 * max(befores)
    assert [round(count / real, 1) for count in counts] == [3.9, 2.0, 1.5]
    padding = [1 - sum(widths) / count_padded(each, widths, owners, [0] * 32) for each in (groups, chunks)]
    assert padding[0] > 0.5 and padding[1] < 0.22  # of the columns of completions


def test_no_chunk_is_larger_than_asked():
    widths, owners, befores = lognormal_phase()
    for most in (100, 400, 2000):
        for chunk in cut_by_length(widths, owners, befores, most, forward=10**6):
            assert len(chunk) == 1 or count_padded([chunk], widths, owners, befores) <= most


def test_completions_of_all_lengths_get_the_numbers_that_they_get_alone():
    """Also those with tokens of a tool, in trimmed chunks of other orders; rows that are not asked for stay zero."""
    policy, draw = Policy("tiny", dropout=False), random.Random(1)
    rows = [
        rollout(group, [20 + group] * (1 + 3 * group), [draw.randint(5, 200) for _ in range(draw.choice([1, 3, 40]))])
        for group in range(5)
        for _ in range(4)
    ]
    given = [False, True] * 20
    rows = [
        replace(each, completion=replace(each.completion, sampled=given))
        if len(each.completion.token_ids) == 40
        else each
        for each in rows
    ]
    batch = make_batch(rows, torch.device("cpu"))
    asked, shapes = torch.arange(len(rows))[1::2], []

    def score(part):
        shapes.append((*part["completion_ids"].shape, *part["prompt_ids"].shape))
        logprobs = policy.completion_scores(part).logprobs
        return logprobs, torch.stack([logprobs, -logprobs], 2)

    with torch.no_grad():
        logprobs, both = score_in_chunks(policy, score, batch, asked)
        for row, each in enumerate(rows):
            alone = policy.completion_scores(make_batch([each], torch.device("cpu"))).logprobs[0]
            expected = alone if row % 2 else torch.zeros_like(alone)
            torch.testing.assert_close(logprobs[row, : len(alone)], expected, atol=1e-5, rtol=0)
            assert not logprobs[row, len(alone) :].any()
    torch.testing.assert_close(both, torch.stack([logprobs, -logprobs], 2))
    assert len(shapes) > 1 and min(shape[1] for shape in shapes) < 40
