"""The built-in tiny models and their byte tokenizer: a real Llama of under a million parameters, without download."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Built-in models and their weights: None = random; the files hold what configs/tiny/sft.yaml learned, in 16 bits. The
# calculator's: with --data.train ProductCalls --data.train.num_examples 4000 --data.val null --data.batch_size 16
# --model.optimizer.lr 2e-3 --trainer.max_epochs 4, and again from there with --data.train.num_examples 3200
# --trainer.max_epochs 3 --seed_everything 1. The chains':
# python -m modules fit --config configs/tiny/sft.yaml --data.train ChainLessons --data.train.num_examples 48000
# --data.val null --data.batch_size 16 --model.optimizer.lr 2e-3 --model.optimizer.betas '[0.9, 0.98]'
# --trainer.max_epochs 1
BUILT_IN = {
    "tiny": None,
    "tiny-small": None,
    "tiny-addition": Path(__file__).with_name("tiny_addition.safetensors"),
    "tiny-calculator": Path(__file__).with_name("tiny_calculator.safetensors"),
    "tiny-chains": Path(__file__).with_name("tiny_chains.safetensors"),
}

PAD, BOS, EOS, TURN, END_OF_TURN = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' "
    "}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte and five special tokens: a vocabulary of 261.

    It has a ChatML template and adds no special token by itself.
    """
    alphabet = bytes_to_unicode()
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *(alphabet[byte] for byte in range(256))))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[TURN, END_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(name: str = "tiny", seed: int = 0) -> LlamaForCausalLM:
    """Make a built-in model: 0.89 M parameters, fp32, hidden size 128, 4 layers, 4 heads.

    ``tiny`` has random weights that depend on ``seed`` alone, and so has ``tiny-small``, a student of half the width
    and depth with 0.12 M parameters. ``tiny-addition`` has learned two-digit addition in the
    format of the source ``Addition``; about half of its sampled answers are right. ``tiny-calculator`` has learned the
    conversations of ``ProductCalls``: it calls the calculator at half of the time, and guesses otherwise.
    ``tiny-chains`` has learned ``ChainLessons``: it thinks about 3 of 100 ``Chains`` and guesses the others; where the
    prompt opens the thought it is right about 97 of 100, and a fifth of its thoughts mix digits and letters.

    Args:
        name: a name in ``BUILT_IN``.
        seed: of the random weights.
    """
    half = 2 if name == "tiny-small" else 1
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=128 // half,
        intermediate_size=384 // half,
        num_hidden_layers=4 // half,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    learned = BUILT_IN[name]
    if learned is not None:
        model.load_state_dict({key: weight.float() for key, weight in load_file(learned).items()}, strict=False)
        model.tie_weights()
    return model
