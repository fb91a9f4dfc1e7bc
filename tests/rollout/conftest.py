"""Small real models of several architectures, and the policy record that engines read."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from modules.networks.loading import read_max_positions
from modules.networks.tiny import tiny_model, tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZES |= {
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
FAST = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama3-rope": LlamaConfig(**SIZES, rope_parameters={**LLAMA3, "original_max_position_embeddings": 16}),
    "mistral": MistralConfig(**SIZES, sliding_window=None, head_dim=24),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "tiny": tiny_model().config,
}
GENERAL = {
    "gpt2": GPT2Config(
        vocab_size=300,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mistral-sliding": MistralConfig(**SIZES, sliding_window=20),
}


@dataclass
class Holder:
    """A model with its tokenizer and end tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: frozenset[int]

    @property
    def max_positions(self) -> int | None:
        return read_max_positions(self.model.config)


def build(config: PreTrainedConfig) -> Holder:
    """Make a random model whose biases and norm weights are not the usual zeros and ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return Holder(model, tiny_tokenizer(), frozenset({2}))


@pytest.fixture(params=[*FAST, *GENERAL])
def policy(request: pytest.FixtureRequest) -> Holder:
    """Give every architecture in turn, of both paths."""
    return build({**FAST, **GENERAL}[request.param])


@pytest.fixture(params=["qwen3", "gpt2"])
def either(request: pytest.FixtureRequest) -> Holder:
    """Give one architecture of each path."""
    return build({**FAST, **GENERAL}[request.param])


@pytest.fixture
def qwen3() -> Holder:
    """Give one architecture of the fast path."""
    return build(FAST["qwen3"])


def ragged(count: int) -> list[list[int]]:
    """Make prompts of 1 to 9 tokens."""
    return [[5 + (7 * i + 11 * j * j) % 250 for j in range(1 + (5 * i) % 9)] for i in range(count)]
