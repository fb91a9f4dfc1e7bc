"""Turns of a completion: replies between them are attended to, never drawn, and never tokenised again."""

import pytest
import torch
from conftest import Holder, ragged
from test_engine import engine_for, next_logits, tokens

from modules.rollout import Sampling
from modules.types import Completion

REPLY = [40, 41, 42]
SAMPLING = Sampling(max_completion_length=24)


def answer_once(seen: list[str]):
    """Reply to the first turn alone, and note the texts of all turns."""

    def reply(text: str) -> list[int] | None:
        seen.append(text)
        return REPLY if len(seen) == 1 else None

    return reply


def sample(policy: Holder, prompts: list[list[int]], seeds: list[int], count: int, budget: int = 65536):
    """Return the completions of each prompt, and the texts of the turns of each completion in one list."""
    texts: list[list[str]] = [[] for _ in range(count * len(prompts))]
    groups = engine_for(policy, budget).generate(prompts, count, SAMPLING, seeds, [answer_once(each) for each in texts])
    return groups, texts


@pytest.fixture
def talker(either: Holder) -> Holder:
    """A policy for which one token in four ends a turn."""
    either.stop_token_ids = frozenset(range(2, 300, 4))
    return either


def test_a_reply_stands_between_what_was_sampled(talker: Holder) -> None:
    prompts = ragged(6)
    groups, texts = sample(talker, prompts, list(range(0, 60, 10)), 4)
    free = engine_for(talker).generate(prompts, 4, SAMPLING, list(range(0, 60, 10)))
    several = 0
    for prompt, mine, first in zip(prompts, groups, free, strict=True):
        for completion, alone in zip(mine, first, strict=True):
            ids, turn = completion.token_ids, len(alone.token_ids)
            assert ids[:turn] == alone.token_ids  # the first turn is that of a run without replies
            if alone.finish == "length" or turn + 3 >= 24:
                assert (ids, completion.finish, completion.sampled) == (alone.token_ids, "length", None)
                continue
            several += 1
            assert ids[turn : turn + 3] == REPLY and len(ids) <= 24
            assert completion.sampled == [not turn <= place < turn + 3 for place in range(len(ids))]
            assert completion.sampled_ids == ids[:turn] + ids[turn + 3 :] and completion.length == len(ids) - 3
            assert completion.logprobs[turn : turn + 3] == [0.0] * 3
            logprobs = next_logits(talker, prompt, ids).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            expected = logprobs.masked_fill(~torch.tensor(completion.sampled), 0.0)
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
            silent = talker.stop_token_ids | {0}
            said = [[token for token in part if token not in silent] for part in (ids[:turn], ids[turn + 3 :])]
            assert completion.text == talker.tokenizer.decode(said[1])
            assert completion.transcript == talker.tokenizer.decode(ids[: -1 if completion.finish == "stop" else None])
    read = [text for texts_of_one in texts for text in texts_of_one[:1]]
    assert several > 8 and len(read) >= several


def test_a_completion_with_replies_does_not_depend_on_its_batch(talker: Holder) -> None:
    prompts, seeds = ragged(20), [100 * i for i in range(20)]
    together, _ = sample(talker, prompts, seeds, 2)
    assert tokens(sample(talker, prompts, seeds, 2, budget=150)[0]) == tokens(together)
    for index in (0, 17):
        assert tokens(sample(talker, [prompts[index]], [seeds[index]], 2)[0]) == [tokens(together)[index]]


def test_a_reply_that_leaves_no_room_ends_the_completion(talker: Holder) -> None:
    talker.stop_token_ids = frozenset(range(300))  # every turn is one token

    def run(length: int, reply: list[int]) -> Completion:
        replies = iter([reply, None])
        sampling = Sampling(max_completion_length=length)
        return engine_for(talker).generate([[7, 8]], 1, sampling, [1], [lambda text: next(replies)])[0][0]

    one = run(5, [9, 9, 9, 9])  # 1 + 4 tokens leave none of 5
    assert (len(one.token_ids), one.finish, one.sampled) == (1, "length", None)
    two = run(6, [9, 9, 9, 9])
    assert (two.token_ids[1:5], len(two.token_ids), two.finish) == ([9] * 4, 6, "stop")
    assert two.sampled == [True, False, False, False, False, True]


def test_replies_that_never_come_change_nothing(talker: Holder) -> None:
    prompts, seeds = ragged(6), list(range(0, 60, 10))
    plain = engine_for(talker).generate(prompts, 4, SAMPLING, seeds)
    assert engine_for(talker).generate(prompts, 4, SAMPLING, seeds, [lambda text: None] * 24) == plain
