"""What every engine does alike. ``engines.CASES`` lists them."""

import copy
import inspect
import random
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from conftest import FAST, GENERAL, Holder, build, ragged
from engines import CASES, EngineCase
from transformers import GenerationConfig

from modules.rollout import RolloutEngine, Sampling
from modules.types import Completion

ENDS = frozenset(range(2, 300, 25))  # 12 of 300 tokens
# What a model folder may bring along, and no engine may follow
OTHER_ENDS = set(range(3, 300, 4)) - ENDS
ADVERSE = {"do_sample": True, "top_k": 1, "repetition_penalty": 50.0, "max_length": 12, "min_new_tokens": 9}


def make_policy(case: EngineCase, seed: int = 0) -> Holder:
    """Make the policy of a case with several end tokens, and with a generation_config that would change everything."""
    policy = build({**FAST, **GENERAL}[case.policy])
    policy.stop_token_ids = ENDS
    policy.model.generation_config = GenerationConfig(
        **ADVERSE, eos_token_id=[*OTHER_ENDS], bos_token_id=1, pad_token_id=0
    )
    return policy


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> EngineCase:
    return CASES[request.param]


@pytest.fixture(scope="module")
def started_engine(case: EngineCase) -> Iterator[RolloutEngine]:
    """Give the engine of a case, which may take a while to start, to all tests of the case."""
    engine = case.make()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def first_policy(case: EngineCase) -> tuple[Holder, dict[str, torch.Tensor]]:
    """Give the policy of a case and its weights: workers start anew for a policy that they do not know."""
    policy = make_policy(case)
    return policy, copy.deepcopy(policy.model.state_dict())


@pytest.fixture
def policy(first_policy: tuple[Holder, dict[str, torch.Tensor]]) -> Holder:
    """Give the policy of a case as it was before other tests trained or spoilt it."""
    policy, weights = first_policy
    policy.model.load_state_dict(weights)
    policy.model.eval().zero_grad()
    return policy


@pytest.fixture
def engine(started_engine: RolloutEngine, policy: Holder) -> RolloutEngine:
    """Give the engine with the weights of ``policy``, as version 3."""
    started_engine.sync_weights(policy, 3)
    return started_engine


def settings(**values: Any) -> Sampling:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of top_p and top_k
        return Sampling(**values)


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def next_logits(policy: Holder, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Return the logits [Tc, V] from one plain forward of the whole row."""
    model = copy.deepcopy(policy.model).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()


def check_logprobs(policy: Holder, prompt: list[int], found: Completion, sampling: Sampling, tolerance: float) -> None:
    """Compare the log-probs of a completion with the softmax of its settings, worked out token by token."""
    logits = next_logits(policy, prompt, found.token_ids)
    assert len(found.logprobs) == len(found.token_ids)
    for row, token, logprob in zip(logits, found.token_ids, found.logprobs, strict=True):
        weights = (row / (sampling.temperature or 1.0)).exp()
        kept = weights.sort(descending=True).indices
        if sampling.top_k:
            kept = kept[: sampling.top_k]
        if sampling.top_p < 1:
            share = (weights[kept] / weights[kept].sum()).cumsum(0)
            kept = kept[: 1 + int((share < sampling.top_p).sum())]
        assert token in kept.tolist()
        assert logprob == pytest.approx(float((weights[token] / weights[kept].sum()).log()), abs=tolerance)


@pytest.mark.parametrize("num_generations", [1, 3])
def test_greedy_tokens_are_those_of_generate(
    engine: Any, policy: Holder, case: EngineCase, num_generations: int
) -> None:
    prompts, sampling = ragged(12), Sampling(temperature=0, max_completion_length=20)
    groups = engine.generate(prompts, num_generations, sampling, list(range(12)))
    reference = copy.deepcopy(policy.model).eval()
    reference.generation_config = GenerationConfig(pad_token_id=0)
    for prompt, group in zip(prompts, groups, strict=True):
        assert tokens([group]) == [[group[0].token_ids] * num_generations]
        if case.exact:
            ids = torch.tensor([prompt])
            asked = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": sorted(ENDS)}
            expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **asked)[0, len(prompt) :]
            assert group[0].token_ids == expected.tolist()
        check_logprobs(policy, prompt, group[0], sampling, case.tolerance)
        logits = next_logits(policy, prompt, group[0].token_ids)
        chosen = logits[range(len(logits)), group[0].token_ids]
        assert float((logits.max(-1).values - chosen).max()) <= 2 * case.tolerance


@pytest.mark.parametrize(
    "values", [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 7}, {"temperature": 0.7, "top_p": 0.8}]
)
def test_log_probs_are_those_of_the_distribution_drawn_from(
    engine: Any, policy: Holder, case: EngineCase, values: dict[str, float]
) -> None:
    sampling = settings(**values, max_completion_length=12)
    groups = engine.generate(ragged(5), 4, sampling, [9, 19, 29, 39, 49])
    for prompt, group in zip(ragged(5), groups, strict=True):
        for completion in group:
            check_logprobs(policy, prompt, completion, sampling, case.tolerance)


def test_samples_follow_the_model(engine: Any, policy: Holder) -> None:
    """First tokens of 2000 draws follow the softmax within 5 standard deviations, where at least 20 are expected."""
    draws = 2000
    firsts = [one.token_ids[0] for one in engine.generate([[11, 12]], draws, Sampling(max_completion_length=1), [0])[0]]
    probabilities = next_logits(policy, [11, 12], [0])[0].softmax(-1)
    seen = torch.bincount(torch.tensor(firsts), minlength=300).double()
    error = (seen - draws * probabilities).abs() / (draws * probabilities * (1 - probabilities)).sqrt()
    frequent = draws * probabilities > 20
    assert frequent.sum() > 5 and bool((error[frequent] < 5).all())


def test_seeds_alone_decide(engine: Any, case: EngineCase) -> None:
    """A completion is the same again, alone, in other groups, in another order, and as the beginning of a longer one."""
    prompts, sampling, seeds = ragged(20), Sampling(max_completion_length=10), [100 * i for i in range(20)]
    together = tokens(engine.generate(prompts, 2, sampling, seeds))
    assert tokens(engine.generate(prompts, 2, sampling, seeds)) == together
    backwards = engine.generate(prompts[::-1], 2, sampling, seeds[::-1])
    assert tokens(backwards)[::-1] == together
    for place in (0, 7, 19):
        assert tokens(engine.generate([prompts[place]], 2, sampling, [seeds[place]])) == [together[place]]
        assert tokens(engine.generate([prompts[place]], 1, sampling, [seeds[place] + 1])) == [[together[place][1]]]
        longer = engine.generate([prompts[place]], 1, Sampling(max_completion_length=15), [seeds[place]])[0][0]
        assert longer.token_ids[:10] == together[place][0]
    others = tokens(engine.generate(prompts, 2, sampling, [seed + 50 for seed in seeds]))
    assert (
        sum(a == b for ours, theirs in zip(together, others, strict=True) for a, b in zip(ours, theirs, strict=True))
        < 8
    )


def test_all_bits_of_a_seed_count(engine: Any) -> None:
    draws = [
        engine.generate([[7, 8, 9]], 4, Sampling(max_completion_length=10), [seed])[0]
        for seed in (50, 50 + 2**32, 50 + 2**61)
    ]
    assert len({str(tokens([draw])) for draw in draws}) == 3


def test_more_requests_than_fit_are_all_answered(engine: Any, policy: Holder, case: EngineCase) -> None:
    prompts, sampling, seeds = ragged(40), Sampling(max_completion_length=20), [100 * i for i in range(40)]
    expected = tokens(engine.generate(prompts, 2, sampling, seeds))
    small = case.small()
    small.sync_weights(policy, 3)
    assert tokens(small.generate(prompts, 2, sampling, seeds)) == expected
    small.close()


def test_what_befalls_an_engine_loses_and_changes_nothing(engine: Any, case: EngineCase) -> None:
    prompts, sampling, seeds = ragged(12), Sampling(max_completion_length=20), [100 * i for i in range(12)]
    expected = tokens(engine.generate(prompts, 3, sampling, seeds))
    blow = threading.Timer(0.05, case.disturb or len, [engine] if case.disturb else [()])
    blow.start()
    assert tokens(engine.generate(prompts, 3, sampling, seeds)) == expected
    blow.join()
    assert tokens(engine.generate(prompts, 3, sampling, seeds)) == expected


def test_every_end_token_ends_and_has_no_text(engine: Any, policy: Holder) -> None:
    groups = engine.generate(ragged(20), 8, Sampling(max_completion_length=16), list(range(0, 400, 20)))
    found = [completion for group in groups for completion in group]
    for completion in found:
        *before, last = completion.token_ids
        assert not ENDS & set(before)
        assert completion.finish == ("stop" if last in ENDS else "length")
        assert completion.finish == "stop" or len(completion.token_ids) == 16
        kept = [token for token in completion.token_ids if token not in ENDS | {0}]
        assert completion.text == policy.tokenizer.decode(kept)
    assert len({completion.token_ids[-1] for completion in found if completion.finish == "stop"}) > 5
    assert any(completion.finish == "length" for completion in found)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("characters", [2, 1])  # 1: a character of two bytes, each a token
def test_stop_strings_end_a_completion(engine: Any, policy: Holder, characters: int, keep: bool) -> None:
    """The stop string lies across a token border of a run without one; both agree up to the token that completes it."""
    decode, length = policy.tokenizer.decode, 40
    free = engine.generate([[20, 21]], 40, Sampling(max_completion_length=length), [4])[0]
    pairs = [one.token_ids[at : at + 2] for one in free for at in range(3, len(one.token_ids) - 1)]
    texts = [str(decode(pair)) for pair in pairs if all(5 <= token < 261 and token not in ENDS for token in pair)]
    stop = next(text for text in texts if len(text) == characters and "\ufffd" not in text)
    sampling = Sampling(max_completion_length=length, stop=("never", stop), keep_stop=keep)
    stopped = engine.generate([[20, 21]], 40, sampling, [4])[0]
    assert tokens([stopped]) != tokens([free])
    for before, after in zip(free, stopped, strict=True):
        said = [[t for t in before.token_ids[: n + 1] if t not in ENDS] for n in range(len(before.token_ids))]
        ends = [n + 1 for n, ids in enumerate(said) if stop in decode(ids)]
        assert after.token_ids == before.token_ids[: ends[0] if ends else None]
        assert after.finish == ("stop" if ends else before.finish)
        text, found, _ = before.text.partition(stop)
        assert after.text == text + found * keep


def test_a_special_token_may_be_a_stop_string(engine: Any, policy: Holder) -> None:
    turn = policy.tokenizer.convert_tokens_to_ids("<|im_start|>")
    prompts, seeds = [[5 + i] for i in range(40)], list(range(0, 400, 10))
    free = engine.generate(prompts, 8, Sampling(max_completion_length=20), seeds)
    cut = engine.generate(prompts, 8, Sampling(max_completion_length=20, stop=("<|im_start|>",)), seeds)
    pairs = [pair for groups in zip(free, cut, strict=True) for pair in zip(*groups, strict=True)]
    hits = [(whole, short) for whole, short in pairs if turn in whole.token_ids]
    assert hits
    for whole, short in hits:
        assert short.token_ids == whole.token_ids[: whole.token_ids.index(turn) + 1]
        assert short.finish == "stop" and "<|im_start|>" not in short.text


def test_texts_are_those_of_all_tokens_together(engine: Any, policy: Holder) -> None:
    """The tokenizer's tokens are bytes, so that characters lie across token borders, some of them broken."""
    groups = engine.generate(ragged(30), 8, Sampling(max_completion_length=24), list(range(0, 600, 20)))
    texts = [completion.text for group in groups for completion in group]
    decoded = [
        policy.tokenizer.decode([t for t in completion.token_ids if t not in ENDS | {0}])
        for group in groups
        for completion in group
    ]
    assert texts == decoded
    whole = [character for text in texts for character in text if ord(character) > 127 and character != "\ufffd"]
    assert whole and any("\ufffd" in text for text in texts)


def test_tokens_carry_the_version_of_their_weights(engine: Any, policy: Holder) -> None:
    for version in (3, 4, 17):
        engine.sync_weights(policy, version)
        for completion in engine.generate([[5, 6]], 3, Sampling(max_completion_length=4), [0])[0]:
            assert completion.policy_version == version
            assert completion.token_versions == [version] * len(completion.token_ids)


def test_new_weights_are_seen_after_a_sync(engine: Any, policy: Holder, case: EngineCase) -> None:
    sampling = Sampling(max_completion_length=6)
    before = engine.generate(ragged(4), 3, sampling, [0, 10, 20, 30])
    old = copy.deepcopy(policy)
    with torch.no_grad():
        for number, parameter in enumerate(policy.model.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    if engine.copies_weights:  # until then it has the old ones
        assert tokens(engine.generate(ragged(4), 3, sampling, [0, 10, 20, 30])) == tokens(before)
    engine.sync_weights(policy, 4)
    after = engine.generate(ragged(4), 3, sampling, [0, 10, 20, 30])
    assert tokens(after) != tokens(before)
    for prompt, group in zip(ragged(4), after, strict=True):
        for completion in group:
            check_logprobs(policy, prompt, completion, sampling, case.tolerance)
    with pytest.raises(AssertionError):
        check_logprobs(old, ragged(4)[0], after[0][0], sampling, case.tolerance)


@pytest.mark.parametrize("end", ["release", "close"])
def test_an_engine_that_was_put_away_comes_back_with_a_sync(engine: Any, policy: Holder, end: str) -> None:
    sampling = Sampling(max_completion_length=6)
    expected = tokens(engine.generate(ragged(4), 2, sampling, [0, 10, 20, 30]))
    getattr(engine, end)()
    getattr(engine, end)()  # twice does no harm
    engine.sync_weights(policy, 3)
    assert tokens(engine.generate(ragged(4), 2, sampling, [0, 10, 20, 30])) == expected


def test_the_models_generation_config_counts_for_nothing(engine: Any, policy: Holder, case: EngineCase) -> None:
    ids, sampling = torch.tensor([[5, 6, 7]]), Sampling(max_completion_length=24)
    bent = policy.model.eval().generate(ids, attention_mask=torch.ones_like(ids))[0].tolist()
    assert len(bent) == 12  # its max_length
    found = [c for group in engine.generate([[5, 6, 7]] * 4, 8, sampling, [0, 20, 40, 60]) for c in group]
    assert max(len(completion.token_ids) for completion in found) > 12 > min(len(c.token_ids) for c in found)
    assert any(OTHER_ENDS & set(completion.token_ids[:-1]) for completion in found)
    assert any(len(set(c.token_ids)) < len(c.token_ids) for c in found)  # repeated in spite of the penalty
    assert len({completion.token_ids[0] for completion in found}) > 5  # more than its top_k
    for completion in found[:4]:
        check_logprobs(policy, [5, 6, 7], completion, sampling, case.tolerance)


def test_impossible_requests_are_refused_in_one_sentence(engine: Any, case: EngineCase) -> None:
    sampling = Sampling(max_completion_length=60)
    with pytest.raises(ValueError, match=r"generate: prompts \[1\] have no tokens"):
        engine.generate([[1], []], 1, sampling, [0, 1])
    with pytest.raises(ValueError, match=r"70 tokens.*60.*130 tokens, the model has 128 positions"):
        engine.generate([[5] * 70], 1, sampling, [0])
    with pytest.raises(ValueError, match=r"num_generations 0 .*2 prompts need as many seeds, not 1"):
        engine.generate([[1], [2]], 0, sampling, [0])
    assert len(engine.generate([[5] * 68], 1, sampling, [0])[0][0].token_ids) <= 60  # 128 positions are enough
    assert engine.generate([], 4, sampling, []) == []
    fresh = case.make()
    with pytest.raises(ValueError, match="sync_weights"):
        fresh.generate([[1]], 1, sampling, [0])
    fresh.close()


def test_the_trainer_is_left_alone(engine: Any, policy: Holder) -> None:
    model = policy.model.train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    before = (torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate())
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):  # the trainer's precision context changes nothing
        engine.sync_weights(policy, 3)
        inside = engine.generate(ragged(3), 8, Sampling(max_completion_length=5), [0, 10, 20])
    assert inside == engine.generate(ragged(3), 8, Sampling(max_completion_length=5), [0, 10, 20])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (numpy.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("values", [{}, {"temperature": 0}, {"stop": (" 1",)}])
def test_a_completion_in_pieces_is_the_unbroken_one(engine: Any, policy: Holder, case: EngineCase, values: Any) -> None:
    assert ("started" in inspect.signature(engine.generate).parameters) == case.goes_on
    if not case.goes_on:
        return
    prompts, sampling, seeds = ragged(4), settings(**values, max_completion_length=20), [100 * i for i in range(4)]
    whole = [one for group in engine.generate(prompts, 3, sampling, seeds) for one in group]
    for lengths in ((7, 20), (1, 2, 13, 20)):
        done, begun = dict[int, Completion](), [Completion([], [], "", "length")] * 12
        for number, length in enumerate(lengths):
            engine.sync_weights(policy, 5 + number)
            going = [i for i in range(12) if i not in done]
            asked = [prompts[i // 3] for i in going], 1, replace(sampling, max_completion_length=length)
            found = engine.generate(*asked, [seeds[i // 3] + i % 3 for i in going], started=[begun[i] for i in going])
            for i, (each,) in zip(going, found, strict=True):
                begun[i] = each
                if each.finish == "stop" or length == 20:
                    done[i] = each
        for i, unbroken in enumerate(whole):
            expected = [5 + next(k for k, end in enumerate(lengths) if t < end) for t in range(len(done[i].token_ids))]
            assert done[i].token_versions == expected and done[i].policy_version == expected[-1]
            check_logprobs(policy, prompts[i // 3], done[i], sampling, case.tolerance)
            if not case.unbroken:
                continue
            assert (done[i].token_ids, done[i].text, done[i].finish) == (
                unbroken.token_ids,
                unbroken.text,
                unbroken.finish,
            )
            assert done[i].logprobs == pytest.approx(unbroken.logprobs, abs=case.tolerance)


def test_weights_that_are_not_finite_are_an_error(engine: Any, policy: Holder) -> None:
    with torch.no_grad():
        next(policy.model.parameters()).fill_(torch.nan)

    def sample() -> None:  # an engine may find it in either
        engine.sync_weights(policy, 4)
        engine.generate([[5, 6]], 2, Sampling(max_completion_length=3), [0])

    with pytest.raises((ValueError, RuntimeError), match="finite"):
        sample()
