import copy
import warnings
from typing import Any

import pytest
import torch
from conftest import FAST, Holder, build, ragged
from transformers import MambaConfig

from modules.rollout import InProcessEngine, Sampling
from modules.rollout import engine as engine_module
from modules.rollout.static import count_column_bytes
from modules.types import Completion


def engine_for(policy: Holder, columns: float = 1e6) -> InProcessEngine:
    engine = InProcessEngine(columns * count_column_bytes(policy.model) / 1e9)
    engine.sync_weights(policy, 3)
    return engine


def settings(**values: Any) -> Sampling:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Sampling(**values)


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def next_logits(policy: Holder, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Return the logits [Tc, V] from one plain forward of the whole row in evaluation mode."""
    model = copy.deepcopy(policy.model).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]


def test_which_architectures_are_fast(policy: Holder, request: pytest.FixtureRequest) -> None:
    run = engine_module.run_continuous if request.node.callspec.params["policy"] in FAST else engine_module.run_static
    assert engine_for(policy)._run is run


@pytest.mark.parametrize("num_generations", [1, 3])  # 12 rows: activations by row; 36 rows: transposed
def test_greedy_equals_transformers_generate(policy: Holder, num_generations: int) -> None:
    prompts = ragged(12)
    groups = engine_for(policy).generate(
        prompts, num_generations, Sampling(temperature=0, max_completion_length=20), list(range(12))
    )
    reference = copy.deepcopy(policy.model).eval()
    for prompt, group in zip(prompts, groups, strict=True):
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=2, pad_token_id=0
        )
        expected = out[0, len(prompt) :].tolist()
        assert [completion.token_ids for completion in group] == [expected] * num_generations


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 0},
    ],
)
def test_log_probs_are_those_of_the_distribution_drawn_from(either: Holder, values: dict[str, float]) -> None:
    prompts = ragged(5)
    sampling = settings(**values, max_completion_length=12)
    for prompt, group in zip(
        prompts, engine_for(either).generate(prompts, 4, sampling, [9, 19, 29, 39, 49]), strict=True
    ):
        for completion in group:
            logits = next_logits(either, prompt, completion.token_ids) / (sampling.temperature or 1.0)
            for step, token in enumerate(completion.token_ids):
                row = logits[step].double().exp()
                kept = row.sort(descending=True).indices
                if sampling.top_k:
                    kept = kept[: sampling.top_k]
                if sampling.top_p < 1:
                    share = (row[kept] / row[kept].sum()).cumsum(0)
                    kept = kept[: 1 + int((share < sampling.top_p).sum())]
                assert token in kept.tolist()
                assert completion.logprobs[step] == pytest.approx(float((row[token] / row[kept].sum()).log()), abs=1e-4)


def test_a_completion_does_not_depend_on_its_batch(either: Holder) -> None:
    """A prompt is sampled alone, among 40, and among 40 in little memory: other batch sizes, layouts and schedules."""
    prompts, sampling, seeds = ragged(40), Sampling(max_completion_length=10), [100 * i for i in range(40)]
    together = engine_for(either).generate(prompts, 2, sampling, seeds)
    for budget in (20, 150, 700):
        assert tokens(engine_for(either, budget).generate(prompts, 2, sampling, seeds)) == tokens(together)
    for index in (0, 17, 39):
        alone = engine_for(either).generate([prompts[index]], 2, sampling, [seeds[index]])
        assert tokens(alone) == [tokens(together)[index]]
        assert alone[0][1].logprobs == pytest.approx(together[index][1].logprobs, abs=1e-4)


def test_generation_g_uses_the_seed_plus_g(either: Holder) -> None:
    engine, sampling, prompt = engine_for(either), Sampling(max_completion_length=10), [7, 8, 9]
    group = engine.generate([prompt], 3, sampling, [50])[0]
    assert [engine.generate([prompt], 1, sampling, [50 + g])[0][0].token_ids for g in range(3)] == [
        c.token_ids for c in group
    ]
    assert engine.generate([prompt], 3, sampling, [50])[0] == group
    assert len({tuple(completion.token_ids) for completion in group}) == 3
    longer = engine.generate([prompt], 1, Sampling(max_completion_length=15), [50])[0][0]
    assert longer.token_ids[:10] == group[0].token_ids[:10]


def test_all_bits_of_a_seed_count(either: Holder) -> None:
    engine, sampling = engine_for(either), Sampling(max_completion_length=10)
    draws = [engine.generate([[7, 8, 9]], 1, sampling, [seed])[0][0].token_ids for seed in (50, 50 + 2**32, 50 + 2**61)]
    assert len(set(map(tuple, draws))) == 3


def test_a_special_token_may_be_a_stop_string(either: Holder) -> None:
    turn = either.tokenizer.convert_tokens_to_ids("<|im_start|>")
    engine, prompts = engine_for(either), [[5 + i] for i in range(40)]
    free = engine.generate(prompts, 8, Sampling(max_completion_length=20), list(range(0, 400, 10)))
    cut = engine.generate(
        prompts, 8, Sampling(max_completion_length=20, stop=("<|im_start|>",)), list(range(0, 400, 10))
    )
    pairs = [
        pair
        for groups in zip(free, cut, strict=True)
        for pair in zip(*groups, strict=True)
        if turn in pair[0].token_ids
    ]
    assert pairs
    for whole, short in pairs:
        assert short.token_ids == whole.token_ids[: whole.token_ids.index(turn) + 1]
        assert short.finish == "stop"


def test_models_without_keys_and_values_are_refused() -> None:
    mamba = build(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(
        ValueError, match="cannot sample from MambaForCausalLM: some of its layers keep no keys and values"
    ):
        InProcessEngine().sync_weights(mamba, 0)


def test_samples_follow_the_model(qwen3: Holder) -> None:
    """First tokens of 4000 draws follow the softmax within 5 standard deviations, for tokens expected at least 20
    times.
    """
    draws, prompt = 4000, [11, 12]
    firsts = [
        c.token_ids[0] for c in engine_for(qwen3).generate([prompt], draws, Sampling(max_completion_length=1), [0])[0]
    ]
    probabilities = next_logits(qwen3, prompt, [0])[0].double().softmax(-1)
    seen = torch.bincount(torch.tensor(firsts), minlength=300).double()
    error = (seen - draws * probabilities).abs() / (draws * probabilities * (1 - probabilities)).sqrt()
    frequent = draws * probabilities > 20
    assert frequent.sum() > 10 and bool((error[frequent] < 5).all())


def test_finish_reasons_and_text(either: Holder) -> None:
    """In one run nearly every token ends a completion, in the other none does."""
    prompts, sampling = ragged(6), Sampling(max_completion_length=8)
    either.stop_token_ids = frozenset(range(0, 300, 2))
    for group in engine_for(either).generate(prompts, 4, sampling, list(range(0, 60, 10))):
        for completion in group:
            assert [token % 2 for token in completion.token_ids[:-1]] == [1] * (len(completion.token_ids) - 1)
            assert (completion.finish == "stop") == (completion.token_ids[-1] % 2 == 0)
            assert completion.finish == "stop" or len(completion.token_ids) == 8
            assert len(completion.logprobs) == len(completion.token_ids) and completion.policy_version == 3
            kept = [token for token in completion.token_ids if token % 2 or token == 0]  # without stops
            assert completion.text == either.tokenizer.decode([token for token in kept if token])
    either.stop_token_ids = frozenset()
    for group in engine_for(either).generate(prompts, 4, sampling, list(range(0, 60, 10))):
        assert [(completion.finish, len(completion.token_ids)) for completion in group] == [("length", 8)] * 4


@pytest.mark.parametrize("characters", [2, 1])  # 1: a character of two bytes, each a token
def test_stop_strings_end_a_completion_and_leave_its_text(either: Holder, characters: int) -> None:
    """The stop string is taken from a run without one, across a token border. The runs agree up to the token that
    completes it.
    """
    prompt, decode = [20, 21], either.tokenizer.decode
    free = engine_for(either).generate([prompt], 30, Sampling(max_completion_length=40), [4])[0]
    pairs = [completion.token_ids[at : at + 2] for completion in free for at in range(9, len(completion.token_ids) - 1)]
    texts = [str(decode(pair)) for pair in pairs if all(5 <= token < 261 for token in pair)]
    stop = next(text for text in texts if len(text) == characters and "\ufffd" not in text)
    stopped = engine_for(either).generate([prompt], 30, Sampling(max_completion_length=40, stop=("never", stop)), [4])[
        0
    ]
    assert [completion.token_ids for completion in stopped] != [completion.token_ids for completion in free]
    for before, after in zip(free, stopped, strict=True):
        ends = [
            n
            for n in range(1, len(before.token_ids) + 1)
            if stop in decode(before.token_ids[:n], skip_special_tokens=True)
        ]
        assert after.token_ids == before.token_ids[: ends[0] if ends else None]
        assert after.finish == ("stop" if ends else before.finish)
        assert after.text == before.text.split(stop)[0]


def test_end_tokens_still_end_when_there_are_stop_strings(either: Holder) -> None:
    either.stop_token_ids = frozenset(range(0, 300, 2))
    plain, stop = (Sampling(max_completion_length=8, stop=stop) for stop in ((), ("never",)))
    assert engine_for(either).generate([[7]], 8, stop, [1]) == engine_for(either).generate([[7]], 8, plain, [1])


def test_a_prompt_is_computed_once(qwen3: Holder) -> None:
    prompts, total = ragged(20), sum(map(len, ragged(20)))
    for budget in (40, 300, 65536):
        engine = engine_for(qwen3, budget)
        engine.generate(prompts, 4, Sampling(max_completion_length=6), list(range(0, 200, 10)))
        assert engine.last_stats["prefill_tokens"] == total
        assert engine.last_stats["slots"] == min(80, budget // (9 + 6 - 1))


def test_continuous_batching_takes_fewer_steps_than_static(qwen3: Holder) -> None:
    """64 requests of skewed lengths share 8 slots. A static batch waits for its longest row, one step per token but the
    first.
    """
    qwen3.stop_token_ids = frozenset(range(0, 300, 6))
    prompts = [[30 + i, 40] for i in range(64)]
    engine = engine_for(qwen3, 8 * 25 + 2 * 8)  # rows and prompts that wait for a row
    groups = engine.generate(prompts, 1, Sampling(max_completion_length=24), list(range(64)))
    lengths = [len(group[0].token_ids) for group in groups]
    static = sum(max(lengths[start : start + 8]) - 1 for start in range(0, 64, 8))
    assert engine.last_stats["slots"] == 8
    assert max(lengths) - 1 <= engine.last_stats["decode_steps"] < static
    assert -(-sum(length - 1 for length in lengths) // 8) <= engine.last_stats["decode_steps"]


def test_global_random_state_modes_and_gradients_are_left_alone(either: Holder) -> None:
    model, state = either.model, torch.get_rng_state()
    model.train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    engine = engine_for(either)
    for temperature in (0, 1):
        engine.generate(ragged(3), 8, Sampling(temperature=temperature, max_completion_length=5), [0, 10, 20])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_autocast_around_the_call_changes_nothing(either: Holder) -> None:
    """A trainer calls the engine inside its precision context."""
    engine, sampling = engine_for(either), Sampling(max_completion_length=6)
    plain = engine.generate(ragged(20), 2, sampling, list(range(0, 200, 10)))
    with torch.autocast("cpu", torch.bfloat16):
        assert engine.generate(ragged(20), 2, sampling, list(range(0, 200, 10))) == plain


def test_updated_weights_are_used_without_a_copy(either: Holder) -> None:
    engine, sampling = engine_for(either), Sampling(temperature=0, max_completion_length=4)
    before = engine.generate([[5, 6]], 1, sampling, [0])[0][0]
    with torch.no_grad():
        for parameter in either.model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    engine.sync_weights(either, 4)
    after = engine.generate([[5, 6]], 1, sampling, [0])[0][0]
    assert (before.policy_version, after.policy_version) == (3, 4)
    assert before.logprobs != after.logprobs
    expected = next_logits(either, [5, 6], after.token_ids).log_softmax(-1).max(-1).values
    assert after.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


class Doubled(type(build(FAST["llama"]).model.lm_head)):  # type: ignore[misc]
    """A linear layer that does more than its weight says, as an adapter does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_adapter_layers_are_called_as_they_are(qwen3: Holder) -> None:
    for layer in qwen3.model.model.layers:
        layer.mlp.up_proj.__class__ = Doubled
    engine, prompts = engine_for(qwen3), ragged(6)
    assert engine._run is engine_module.run_continuous
    for prompt, group in zip(
        prompts, engine.generate(prompts, 4, Sampling(max_completion_length=6), list(range(0, 60, 10))), strict=True
    ):
        for completion in group:
            logprobs = next_logits(qwen3, prompt, completion.token_ids).log_softmax(-1)
            expected = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_fast_path_that_differs_is_not_used(qwen3: Holder) -> None:
    """A hook on a layer changes what the model computes, and the decode step does not know of it."""
    for layer in qwen3.model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: output * 1.5)
    with pytest.warns(UserWarning, match="differ by .* slower"):
        engine = engine_for(qwen3)
    assert engine._run is engine_module.run_static
    completion = engine.generate([[5, 6, 7]], 1, Sampling(max_completion_length=6), [0])[0][0]
    logprobs = next_logits(qwen3, [5, 6, 7], completion.token_ids).log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_impossible_requests_say_what_is_wrong(either: Holder) -> None:
    engine, sampling = engine_for(either), Sampling(max_completion_length=60)
    assert engine.generate([], 4, sampling, []) == []
    with pytest.raises(ValueError, match=r"prompts \[1\] have no tokens"):
        engine.generate([[1], []], 1, sampling, [0, 1])
    with pytest.raises(ValueError, match=r"70 tokens.*60.*130 tokens, the model has 128 positions"):
        engine.generate([[5] * 70], 1, sampling, [0])
    assert len(engine.generate([[5] * 68], 1, sampling, [0])[0][0].token_ids) <= 60
    with pytest.raises(ValueError, match=r"num_generations 0 .*2 prompts need as many seeds, not 1"):
        engine.generate([[1], [2]], 0, sampling, [0])
    with pytest.raises(ValueError, match="sync_weights"):
        InProcessEngine().generate([[1]], 1, sampling, [0])
    with pytest.raises(ValueError, match="max_cache_gb 0"):
        InProcessEngine(0)


def test_logits_that_are_not_finite_are_an_error(either: Holder) -> None:
    engine = engine_for(either)
    with torch.no_grad():
        next(either.model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        engine.generate([[5, 6]], 2, Sampling(max_completion_length=3), [0])


@pytest.mark.parametrize("values", [{}, {"temperature": 0}, {"stop": (" 1",)}])
def test_a_completion_in_pieces_is_the_unbroken_one(either: Holder, values: dict[str, Any]) -> None:
    prompts, sampling = ragged(4), settings(**values, max_completion_length=20)
    seeds = [100 * i for i in range(4)]
    engine = engine_for(either)
    whole = engine.generate(prompts, 3, sampling, seeds)
    for lengths in ((7, 20), (1, 2, 13, 20)):
        done: list[Completion | None] = [None] * 12
        begun = [Completion([], [], "", "length")] * 12
        for number, length in enumerate(lengths):
            engine.sync_weights(either, 5 + number)
            going = [i for i, each in enumerate(done) if each is None]
            found = engine.generate(
                [prompts[i // 3] for i in going],
                1,
                settings(**values, max_completion_length=length),
                [seeds[i // 3] + i % 3 for i in going],
                started=[begun[i] for i in going],
            )
            for i, (each,) in zip(going, found, strict=True):
                begun[i] = each
                done[i] = each if each.finish == "stop" or length == 20 else None
        for i, each in enumerate(done):
            assert each is not None
            unbroken = whole[i // 3][i % 3]
            assert (each.token_ids, each.text, each.finish) == (unbroken.token_ids, unbroken.text, unbroken.finish)
            assert each.logprobs == pytest.approx(unbroken.logprobs, abs=1e-4)
            # each token keeps the version of the weights that sampled it
            expected = [5 + next(k for k, end in enumerate(lengths) if t < end) for t in range(len(each.token_ids))]
            assert each.token_versions == expected and each.policy_version == expected[-1]


def test_beginnings_that_cannot_go_on_are_refused(either: Holder) -> None:
    engine, full = engine_for(either), Completion([3, 4], [-1.0, -1.0], "", "length")
    with pytest.raises(
        ValueError, match=r"1 x 2 completions, but 1 beginnings; beginnings \[0\] have max_completion_length"
    ):
        engine.generate([[5]], 2, settings(max_completion_length=2), [0], started=[full])
