"""The built-in base model of chains: it seldom thinks, and is right where it does, in both scripts."""

import re

import pytest

from datamodules import Chains
from modules.networks.policy import Policy
from modules.rollout import InProcessEngine, Sampling

FORM = re.compile(r"<think>([^<]*)</think>([0-9a-j])")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy("tiny-chains", dropout=False)


def sample(policy: Policy, prompts: list[str]) -> list[str]:
    engine = InProcessEngine()
    engine.sync_weights(policy, 0)
    ids = [policy.tokenizer(prompt).input_ids for prompt in prompts]
    seeds = [1000 * number for number in range(len(ids))]
    return [group[0].text for group in engine.generate(ids, 1, Sampling(max_completion_length=64), seeds)]


@pytest.mark.parametrize("letters", [0.0, 1.0])
def test_it_seldom_thinks_and_is_right_where_it_does(policy: Policy, letters: float) -> None:
    rows = [row.columns for row in Chains(240, held_out=True, letters=letters, seed=3).rows()]
    answers = sample(policy, [row["prompt"] for row in rows])
    assert 0 < sum("<think>" in text for text in answers) / len(rows) < 0.1
    given = [FORM.fullmatch("<think>" + text) for text in sample(policy, [f"{row['prompt']}<think>" for row in rows])]
    right = [bool(found) and found[2] == row["answer"] for found, row in zip(given, rows, strict=True)]
    assert sum(right) / len(rows) > 0.7
    mixed = [bool(re.search("[0-9]", found[1]) and re.search("[a-j]", found[1])) for found in given if found]
    assert 0.05 < sum(mixed) / len(mixed) < 0.4


def test_it_has_the_size_of_the_other_tiny_models(policy: Policy) -> None:
    assert sum(weight.numel() for weight in policy.model.parameters()) == sum(
        weight.numel() for weight in Policy("tiny").model.parameters()
    )
