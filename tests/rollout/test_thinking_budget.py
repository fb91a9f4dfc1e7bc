"""Thinking budgets: a thought that is too long is stopped by a text, which nobody sampled, and the answer follows."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAST, Holder, build, ragged
from test_engine import engine_for, next_logits, tokens
from transformers import PreTrainedTokenizerFast

from modules.networks.tiny import tiny_tokenizer
from modules.rollout import Sampling, Thinking
from modules.rollout.sampling import Ledger
from modules.rollout.thinking import STOP_TEXT, ThoughtWatch
from modules.types import Completion

EOS = 2
SHORT = "</think>"  # a token for each of its 8 bytes; <think> has 7


def one_token_tags() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a token for each tag, as Qwen3's has."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def play(
    budget: int | None,
    script: str,
    prompt: str = "7+=",
    tokenizer: Any = None,
    stop_text: str = SHORT,
    replies: list[Callable[[str], list[int] | None]] | None = None,
    length: int = 48,
) -> Completion:
    """Let a real ledger draw the tokens of a script, one at each step at which it gives none itself; | ends a turn."""
    policy = build(FAST["tiny"])
    policy.tokenizer = tokenizer or tiny_tokenizer()
    policy.model.config.vocab_size = 300
    wanted = [t for part in script.split("|") for t in [*policy.tokenizer(part).input_ids, EOS]][:-1]
    sampling = Sampling(temperature=0, max_completion_length=length, thinking=Thinking(budget, stop_text))
    watch = ThoughtWatch(
        sampling.thinking, policy.tokenizer, [policy.tokenizer(prompt).input_ids], [budget], 300, torch.device("cpu")
    )
    ledger = Ledger([0], sampling, policy, replies, watch)
    place = 0
    for _ in range(length):
        logits = torch.zeros(1, 300)
        logits[0, wanted[place] if place < len(wanted) else EOS] = 50.0
        given = ledger._given[0, ledger._counts[0]] >= 0
        _, finished = ledger.draw(logits, torch.tensor([0]))
        place += not bool(given)
        if bool(finished):
            break
    return ledger.completions(0)[0]


@pytest.mark.parametrize(
    ("budget", "script", "text", "given"),  # given = (first, number) of the tokens that nobody sampled
    [
        (0, "<think>0|", "<think></think>0", (7, 8)),
        (3, "<think>7+00|", "<think>7+0</think>0", (10, 8)),
        (4, "<think>7+0</think>0|", "<think>7+0</think>0", None),  # the tag has begun, and may end
        (11, "<think>7+0</think>0|", "<think>7+0</think>0", None),
        (2, "<think>7<70|", "<think>7<7</think>0", (10, 8)),  # what began was no tag
        (2, "<think>7<<0|", "<think>7<<</think>0", (10, 8)),
        (0, "04|", "04", None),
        (5, "<think>7|", "<think>7", None),  # it ended inside the thought
        (None, "<think>7+0+0|", "<think>7+0+0", None),
    ],
)
def test_a_thought_by_hand(budget, script, text, given):
    completion = play(budget, script)
    assert (completion.text, completion.finish) == (text, "stop") and completion.transcript is None
    count = len(text) + 1  # a token for each character, and the end token
    if given is None:
        assert completion.sampled is None and completion.length == count
        return
    assert completion.text.count("</think>") == 1
    assert completion.sampled == [not given[0] <= place < sum(given) for place in range(count)]
    assert completion.length == count - given[1] and completion.logprobs[given[0] : sum(given)] == [0.0] * given[1]


def test_a_prompt_that_opens_the_thought_starts_the_budget():
    assert play(0, "0|", prompt="7+=<think>\n").text == "</think>0"
    assert play(2, "7+0|", prompt="7+=<think>\n").text == "7+</think>0"
    assert play(2, "7+0|", prompt="7+=<think></think>").text == "7+0"


def test_tags_of_one_token_are_told_by_the_token():
    tags = one_token_tags()
    cut = play(2, "<think>7<0|", tokenizer=tags)  # a lone < is no beginning of a tag here
    assert cut.text == "<think>7<</think>0" and cut.sampled == [True, True, True, False, True, True]
    assert play(3, "<think>7<</think>0|", tokenizer=tags).sampled is None


def test_all_thoughts_of_a_completion_share_the_budget():
    tags = one_token_tags()
    again = play(3, "<think>7</think><think>890|", tokenizer=tags)  # 7 and the tag are two tokens, 8 is the third
    assert again.text == "<think>7</think><think>8</think>90"
    opened = tags("ok<think>").input_ids  # what a tool answers, and the next turn behind it
    turns = play(1, "<think>7|0|", tokenizer=tags, replies=[Once(opened)])
    assert turns.text == "</think>0" and turns.transcript is not None
    assert turns.transcript.startswith("<think>7</think>") and turns.transcript.endswith("ok<think></think>0")


class Once:
    """Replies to the first turn alone."""

    def __init__(self, ids: list[int]) -> None:
        self.ids: list[int] | None = ids

    def __call__(self, text: str) -> list[int] | None:
        ids, self.ids = self.ids, None
        return ids


def test_a_thought_that_opens_too_late_goes_on_to_the_end():
    completion = play(0, "abcdef<think>7777777777", length=20)
    assert completion.text == "abcdef<think>7777777" and completion.sampled is None and completion.finish == "length"


def opened(policy: Holder, count: int) -> list[list[int]]:
    return [[*prompt, *policy.tokenizer("<think>").input_ids] for prompt in ragged(count)]


def test_the_policy_goes_on_behind_the_stop_text(either: Holder) -> None:
    """Tokens before it are those of a run without a budget; those behind it follow the exact tokens before them."""
    prompts, seeds = opened(either, 6), list(range(0, 60, 10))
    thinking, stop = Thinking(5, SHORT), either.tokenizer(SHORT).input_ids
    free = engine_for(either).generate(prompts, 4, Sampling(max_completion_length=30), seeds)
    mine = engine_for(either).generate(prompts, 4, Sampling(max_completion_length=30, thinking=thinking), seeds)
    cut = 0
    for prompt, group, before in zip(prompts, mine, free, strict=True):
        for completion, alone in zip(group, before, strict=True):
            ids = completion.token_ids
            if len(alone.token_ids) <= 5:
                assert completion == alone
                continue
            cut += 1
            assert ids[:13] == alone.token_ids[:5] + stop and len(ids) > 13
            assert completion.sampled == [not 5 <= place < 13 for place in range(len(ids))]
            logprobs = next_logits(either, prompt, ids).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            expected = logprobs.masked_fill(~torch.tensor(completion.sampled), 0.0)
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    assert cut > 12


def test_budgets_are_drawn_by_the_seed_of_a_prompt_alone(either: Holder) -> None:
    prompts, seeds = opened(either, 20), [100 * i for i in range(20)]
    drawn = Sampling(max_completion_length=24, thinking=Thinking((0, 4, 4), SHORT))
    together = engine_for(either).generate(prompts, 3, drawn, seeds)
    assert tokens(engine_for(either, 150).generate(prompts, 3, drawn, seeds)) == tokens(together)
    stop = either.tokenizer(SHORT).input_ids
    budgets = [{0 if c.token_ids[:8] == stop else 4 for c in group} for group in together]
    assert all(len(each) == 1 for each in budgets) and {0} in budgets and {4} in budgets
    for budget in (0, 4):  # each is the run with that budget alone, whatever the others got
        chosen = [i for i, each in enumerate(budgets) if each == {budget}]
        alone = Sampling(max_completion_length=24, thinking=Thinking(budget, SHORT))
        again = engine_for(either).generate([prompts[i] for i in chosen], 3, alone, [seeds[i] for i in chosen])
        assert tokens(again) == [tokens(together)[i] for i in chosen]
    assert Thinking((0, 4, 4)).draw(7) == Thinking((0, 4, 4)).draw(7)
    shares = [Thinking((0, 4, 4)).draw(seed) for seed in range(3000)]
    assert 0.28 < shares.count(0) / 3000 < 0.39  # a third, within 6 standard errors


def test_prompts_without_thoughts_are_not_touched(either: Holder) -> None:
    sampling = Sampling(max_completion_length=30, thinking=Thinking(2, SHORT))
    plain, seeds = ragged(8), list(range(0, 80, 10))
    assert engine_for(either).generate(plain, 4, sampling, seeds) == engine_for(either).generate(
        plain, 4, Sampling(max_completion_length=30), seeds
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"budget": -1}, "budget must be a number >= 0, or several, got -1"),
        ({"budget": ()}, "budget must be a number >= 0, or several, got ()"),
        ({"stop_text": "stop"}, "stop_text must close the thought by one </think>, got 'stop'"),
        ({"stop_text": "</think></think>"}, "by one </think>"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(values, said):
    with pytest.raises(ValueError) as raised:
        Thinking(**values)
    assert said in str(raised.value)


def test_a_budget_needs_room_for_the_answer(qwen3: Holder) -> None:
    def ask(budget: int, length: int, prompt: list[int], **settings: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampling = Sampling(max_completion_length=length, thinking=Thinking(budget, SHORT), **settings)
        engine_for(qwen3).generate([prompt], 1, sampling, [0])

    (prompt,) = opened(qwen3, 1)
    ask(5, 14, prompt)
    with pytest.raises(
        ValueError, match="thought of 5 tokens and the stop text .8. leave no room for an answer in .*_length 13: raise"
    ):
        ask(5, 13, prompt)
    ask(5, 21, [5])
    with pytest.raises(ValueError, match="5 tokens behind <think> .7. and the stop text .8. leave no room"):
        ask(5, 20, [5])
    with pytest.raises(ValueError, match="the stop text holds '</think>', which is in sampling.stop"):
        ask(5, 40, prompt, stop=("</think>",))


def test_the_default_is_the_text_of_qwen3() -> None:
    assert Thinking(1).stop_text == STOP_TEXT and STOP_TEXT.endswith("directly now.\n</think>\n\n")
