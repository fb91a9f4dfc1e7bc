"""The text of a completion: what was sampled, without end and pad tokens."""

import pytest
import torch

from modules.generation import check_stop
from modules.networks.policy import Policy
from modules.rewards import ExactMatch, NumericMatch, RegexFormat, ThinkAnswerFormat, WeightedSum
from modules.rollout import Sampling
from modules.rollout.last_answers import find_last_answers
from modules.rollout.sampling import Ledger
from modules.types import InstructionBatch

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


@pytest.fixture(scope="module")
def policy() -> Policy:
    """The tiny policy with the tags as special tokens."""
    policy = Policy("tiny", dropout=False)
    policy.tokenizer.add_special_tokens({"additional_special_tokens": TAGS})
    policy.model.resize_token_embeddings(len(policy.tokenizer))
    return policy


def completion(policy: Policy, text: str, **settings):
    """Return the completion that draws the tokens of a text one by one."""
    ids = policy.tokenizer(text, add_special_tokens=False).input_ids
    ledger = Ledger([0], Sampling(temperature=0.0, max_completion_length=len(ids), **settings), policy)
    for token in ids:
        logits = torch.zeros(1, policy.model.config.vocab_size)
        logits[0, token] = 9.0
        if bool(ledger.draw(logits, torch.tensor([0]))[1]):
            break
    return ledger.completions(0)[0]


def test_special_tokens_that_say_something_stay(policy: Policy) -> None:
    eos, pad = policy.tokenizer.eos_token, policy.tokenizer.pad_token
    text = "<think>a</think><answer>4</answer>"
    found = completion(policy, text + eos)
    assert (found.text, found.finish) == (text, "stop")
    assert completion(policy, f"a{pad}b").text == "ab"


@pytest.mark.parametrize("special", [True, False])
def test_a_stop_string_is_cut_off_or_kept_on_request(policy: Policy, special: bool) -> None:
    stop, text = ("</answer>", "</stop>")[not special], "<answer>4"
    for keep in (False, True):
        found = completion(policy, f"{text}{stop} and more", stop=(stop,), keep_stop=keep)
        assert (found.text, found.finish) == (text + stop * keep, "stop")
        assert policy.tokenizer.decode(found.token_ids) == text + stop  # its tokens are there in any case


@pytest.mark.parametrize(
    "reward", [ThinkAnswerFormat(), RegexFormat(".*</answer>"), ExactMatch(r".*<answer>(.*)<\/answer>")]
)
def test_a_tag_that_a_reward_looks_for_must_be_kept(reward) -> None:
    for asked in (reward, WeightedSum([reward, NumericMatch()])):
        with pytest.raises(ValueError, match=f"cuts '</answer>' off, and the reward {reward.name} looks for it"):
            check_stop(asked, Sampling(stop=("</answer>",)))
        check_stop(asked, Sampling(stop=("</answer>",), keep_stop=True))
        check_stop(asked, Sampling(stop=("\n", ".")))
    check_stop(NumericMatch(), Sampling(stop=("</answer>",)))


def test_a_held_out_answer_keeps_the_same_tokens(policy: Policy) -> None:
    ids = policy.tokenizer("ab<answer>4</answer>" + policy.tokenizer.eos_token, add_special_tokens=False).input_ids
    row = torch.tensor([ids])
    supervised = torch.arange(len(ids))[None] >= 2
    batch = InstructionBatch(
        input_ids=row, attention_mask=torch.ones_like(row).bool(), loss_mask=supervised, denominator=supervised.sum()
    )
    assert find_last_answers(batch, policy)["answer"] == ["<answer>4</answer>"]
