"""The scalar head and its form as a sequence classifier: fp32, and a pad token that ends no completion."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modules.networks.scalar_head import ScalarHead, add_scoring_pad, make_sequence_classifier
from modules.networks.tiny import tiny_model, tiny_tokenizer

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "tiny": lambda vocabulary: tiny_model(),
    "gpt2": lambda vocabulary: GPT2LMHeadModel(
        GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
    "llama": lambda vocabulary: LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, **SMALL)
    ),  # no spare row, and an embedding that knows the pad
    "qwen2": lambda vocabulary: Qwen2ForCausalLM(
        Qwen2Config(vocab_size=vocabulary + 11, **SMALL)
    ),  # spare rows, as the real ones have
}


def bytes_tokenizer(special: list[str], **roles) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte after the special ones."""
    vocabulary = {token: i for i, token in enumerate((*special, *bytes_to_unicode().values()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


END = "<|endoftext|>"
CHATML = [END, "<|im_start|>", "<|im_end|>"]
TOKENIZERS = {  # of real families, with the pad that they are usually given
    "tiny": tiny_tokenizer,
    "gpt2": lambda: bytes_tokenizer([END], bos_token=END, eos_token=END, unk_token=END, pad_token=END),
    "llama": lambda: bytes_tokenizer([END], eos_token=END, pad_token=END),
    "qwen2": lambda: bytes_tokenizer(
        CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>", extra_special_tokens=CHATML
    ),
}


def test_head_is_the_linear_map():
    head = ScalarHead(2, num_heads=3)
    head.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]])
    scores = head(torch.tensor([[3.0, 5.0], [1.0, 1.0]]))
    assert scores.tolist() == [[3.0, 5.0, 1.0], [1.0, 1.0, 1.0]]  # third head: 2 x 3 - 5, 2 x 1 - 1


def test_head_computes_in_fp32_under_autocast():
    # bfloat16 has 8 significant bits: 1 + 1/512 would be 1, and two scores that differ by it a tie
    head = ScalarHead(1)
    head.weight.data.fill_(1.0)
    states = torch.tensor([[1.0], [1.0 + 1 / 512]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head(states)
        rounded = torch.nn.functional.linear(states, head.weight)
    assert scores.dtype == torch.float32
    assert scores[1] - scores[0] == 1 / 512
    assert rounded[1] == rounded[0]


def test_heads_start_at_unit_size_and_differ():
    torch.manual_seed(0)
    head = ScalarHead(4095, num_heads=2)
    assert head.weight.std().item() == pytest.approx(1 / 64, rel=0.03)  # 1 / sqrt(4095 + 1)
    assert not torch.equal(head.weight[0], head.weight[1])


@pytest.mark.parametrize(
    ("name", "stops", "pad", "added"),
    [
        ("tiny", {2, 4}, 0, 0),  # its own
        ("gpt2", {0}, 257, 1),  # the only special token ends completions: 256 bytes and 1 special before the new one
        ("qwen2", {2}, 0, 0),  # <|endoftext|> is not how this model ends
        ("qwen2", {0, 2}, 1, 0),  # <|endoftext|> ends it too: <|im_start|>
        ("qwen2", {0, 1, 2}, 259, 1),
    ],
)
def test_pad_ends_no_completion(name, stops, pad, added):
    tokenizer = TOKENIZERS[name]()
    before = (len(tokenizer), tokenizer.pad_token_id)
    padded = add_scoring_pad(tokenizer, stops)
    assert (padded.pad_token_id, len(padded), padded.padding_side) == (pad, before[0] + added, "right")
    assert (len(tokenizer), tokenizer.pad_token_id) == before  # ours is not changed
    assert padded("a").input_ids == tokenizer("a").input_ids


@pytest.mark.parametrize("name", MODELS)
def test_classifier_scores_the_last_token(name):
    torch.manual_seed(1)
    tokenizer = TOKENIZERS[name]()
    model = MODELS[name](len(tokenizer)).eval()
    eos, weight = tokenizer.eos_token_id, torch.randn(model.config.hidden_size)
    before = torch.random.get_rng_state()
    padded = add_scoring_pad(tokenizer, {eos})
    classifier = make_sequence_classifier(model, weight, padded)
    assert torch.equal(torch.random.get_rng_state(), before)
    ids = torch.tensor([[40, 41, 42, eos, padded.pad_token_id], [40, 41, 42, 43, eos]])
    with torch.no_grad():
        scores = classifier(input_ids=ids, attention_mask=ids != padded.pad_token_id).logits[:, 0]
        last = [model.base_model(input_ids=row[None]).last_hidden_state[0, -1] for row in (ids[0, :4], ids[1])]
        before_eos = model.base_model(input_ids=ids[:1, :3]).last_hidden_state[0, -1]
    torch.testing.assert_close(scores, torch.stack(last) @ weight, atol=1e-5, rtol=1e-5)
    assert abs(scores[0] - before_eos @ weight) > 1e-3  # what transformers pools where pad is eos
