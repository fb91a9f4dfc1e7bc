"""Scoring a phase: every distinct completion is scored once, and every row gets the same numbers."""

import pytest
import torch

from modules.networks.policy import Policy
from modules.rollout import scoring
from modules.rollout.scoring import make_batch, score_in_chunks
from modules.types import Completion, Rollout


def rollout(group: int, prompt: list[int], tokens: list[int]) -> Rollout:
    return Rollout(str(group), "", prompt, None, Completion(tokens, [0.0] * len(tokens), "", "stop"), group, {}, None)


@pytest.mark.parametrize("tokens", [1, 10_000], ids=["a prompt at a time", "at once"])
def test_completions_are_scored_once_and_every_row_gets_its_numbers(monkeypatch, tokens):
    monkeypatch.setattr(scoring, "SCORING_TOKENS", tokens)
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
        (logprobs,) = score_in_chunks(score, batch)
        expected = policy.completion_scores(batch).logprobs
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    assert torch.equal(logprobs[0], logprobs[2])
    assert sum(scored) == 3 + 2 + 1
    assert len(scored) == (3 if tokens == 1 else 1)
