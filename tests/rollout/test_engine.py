"""What the in-process engine alone does; ``test_conformance.py`` has what all engines do."""

import copy
import warnings
from typing import Any

import pytest
import torch
from conftest import FAST, Holder, build, ragged
from transformers import MambaConfig

from modules.rollout import InProcessEngine, Sampling
from modules.rollout import engine as engine_module
from modules.rollout.decoding.static import count_column_bytes
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


@pytest.mark.parametrize("num_generations", [1, 3])  # 12 and 36 rows
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


def test_models_without_keys_and_values_are_refused() -> None:
    mamba = build(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(
        ValueError, match="cannot sample from MambaForCausalLM: some of its layers keep no keys and values"
    ):
        InProcessEngine().sync_weights(mamba, 0)


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


def test_an_impossible_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="max_cache_gb 0"):
        InProcessEngine(0)


def test_beginnings_that_cannot_go_on_are_refused(either: Holder) -> None:
    engine, full = engine_for(either), Completion([3, 4], [-1.0, -1.0], "", "length")
    with pytest.raises(
        ValueError, match=r"1 x 2 completions, but 1 beginnings; beginnings \[0\] have max_completion_length"
    ):
        engine.generate([[5]], 2, settings(max_completion_length=2), [0], started=[full])
