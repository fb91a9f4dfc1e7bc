"""A turn has the same tokens in SFT, in preferences, in a prompt and at inference, for every template and tokenizer."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_python import PreTrainedTokenizer

from datamodules import PreferenceDataModule
from datamodules.tokens.encoding import (
    Message,
    TokenisedText,
    continuation_ids,
    encode_example,
    encode_prompt,
    encode_rendered,
    render,
)
from datamodules.tokens.special import special_ids

TEXTS = [
    "the cat sat on the mat",
    "user assistant system",
    "what is the answer to this ?",
    "the answer is 42 .\n\n- the cat",
]
MARKS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>", "<|eot|>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>\n\n{{ m.content | trim }}<|eot|>{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }} {% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
QWEN3 = (  # the last answer alone has thoughts
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last "
    "%}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI3 = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (  # its marks of roles are plain text
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
TEMPLATES = {
    "ChatML": (CHATML, "<|im_end|>"),
    "Llama-2": (LLAMA2, "</s>"),
    "Llama-3": (LLAMA3, "<|eot|>"),
    "Mistral": (MISTRAL, "</s>"),
    "Gemma": (GEMMA, "<|im_end|>"),
    "Qwen3": (QWEN3, "<|im_end|>"),
    "Phi-3": (PHI3, "<|end|>"),
    "Zephyr": (ZEPHYR, "</s>"),
}


def made(kind: str) -> Tokenizer:
    """Make a tokenizer with merges that puts a space before every text, before the first text only, or before none."""
    bare = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(byte_fallback=kind == "prepend"))
    alphabet = sorted({*"".join(TEXTS), *map(chr, range(10, 127)), "\u2581"})
    if kind == "prepend":  # Llama-2's
        bare.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        bare.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    elif kind == "bytes":  # GPT-2's
        bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bare.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    else:
        scheme = "first" if kind == "first" else "always"
        bare.pre_tokenizer, bare.decoder = (
            part.Metaspace(prepend_scheme=scheme) for part in (pre_tokenizers, decoders)
        )
    settings = {"vocab_size": len(alphabet) + 60, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.UnigramTrainer if kind == "unigram" else trainers.BpeTrainer
    bare.train_from_iterator(TEXTS * 5, trainer(**settings, **({"unk_token": " "} if kind == "unigram" else {})))
    strips = ("<|end|>", "<|user|>", "<|assistant|>")  # as Phi-3's take the line break behind them
    bare.add_special_tokens([AddedToken(mark, special=True, normalized=False, rstrip=mark in strips) for mark in MARKS])
    start = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", bare.token_to_id("<s>"))])
    trims = [processors.ByteLevel(trim_offsets=True)] if kind == "bytes" else []  # leaves spaces out of the offsets
    bare.post_processor = processors.Sequence([*trims, start])
    return bare


KINDS = ("prepend", "first", "unigram", "bytes")
BARE = {kind: made(kind) for kind in KINDS}


def tokenizer_of(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=BARE[kind], bos_token="<s>", eos_token="</s>", chat_template=template, model_max_length=1000
    )


def talk(*contents: str) -> list[Message]:
    return [Message(role=("user", "assistant")[i % 2], content=content) for i, content in enumerate(contents)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_has_the_tokens_of_its_text_and_of_its_prompts(name: str, kind: str) -> None:
    template, ending = TEMPLATES[name]
    tokenizer = tokenizer_of(kind, template)
    dialogue = talk("what is the answer ?", "the answer is 42 .", "the cat ?", "sat on the mat")
    if name == "Qwen3":
        dialogue = dialogue[:2]
        with pytest.raises(ValueError, match="row: the chat template rewrites what stands before assistant message 3"):
            encode_example(tokenizer, [], talk("a", "b", "c", "d"), "row")
    tokens = encode_example(tokenizer, [], dialogue, "row")
    text = render(tokenizer, dialogue, "row", open_turn=False)
    assert tokens.ids == tokenizer(text, add_special_tokens=False).input_ids
    assert tokens.ids.count(tokenizer.bos_token_id) == text.count("<s>")
    ends = [i for i, keep in enumerate(tokens.supervised) if keep and not (tokens.supervised + [False])[i + 1]]
    assert [tokenizer.convert_ids_to_tokens(tokens.ids[i]) for i in ends] == [ending] * (len(dialogue) // 2)
    begins = [i for i, keep in enumerate(tokens.supervised) if keep and not tokens.supervised[i - 1]]
    for turn, begin, end in zip(range(1, len(dialogue), 2), begins, ends, strict=True):
        _, prompt = encode_prompt(tokenizer, dialogue[:turn], "row")
        asked = [dict(message) for message in dialogue[:turn]]
        assert prompt == tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert tokens.ids[:begin] == prompt
        answer = tokenizer.decode(tokens.ids[begin : end + 1])
        assert dialogue[turn]["content"] in answer and dialogue[turn - 1]["content"] not in answer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_preferences_and_written_prompts_have_the_tokens_of_sft(name: str, kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind, TEMPLATES[name][0])
    answers = ("the cat", "\nthe mat .\n")
    row = {
        "prompt": talk("what is it ?"),
        **{c: talk("", a)[1:] for c, a in zip(("chosen", "rejected"), answers, strict=True)},
    }
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    data = PreferenceDataModule(tokenizer, str(tmp_path / "pairs.jsonl"))
    data.setup("fit")
    (pair,) = data.train_rows
    text, prompt = encode_prompt(tokenizer, talk("what is it ?"), "row")
    assert pair.prompt == prompt
    for answer, completion in zip(answers, pair.completions, strict=True):
        tokens = encode_example(tokenizer, talk("what is it ?"), answer, "row")
        assert tokens.ids[: len(prompt + completion)] == prompt + completion
        if name != "Qwen3":  # its template writes more before the answer than the prompt ends in
            written = encode_rendered(tokenizer, text, answer.strip() if name == "Gemma" else answer, "row")
            assert written is None or written.ids[: len(prompt)] == prompt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("what is the answer ?", " the cat"),
        ("what is the answer ? ", "the cat"),  # a space that merges with the word behind it
        ("the answer is\n\n", "42 ."),  # GPT-2 takes two line breaks for one token at the end of a text alone
        ("the answer is\n", "\n42 ."),
        ("the an", "swer"),
        ("caf", "\u00e9"),
        ("e", "\u0301 the"),
    ],
)
def test_a_text_has_the_tokens_of_its_prompt_and_one_that_goes_on(kind: str, prompt: str, completion: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokens = encode_example(tokenizer, prompt, completion, "row")
    asked = encode_prompt(tokenizer, prompt, "row")[1]
    assert asked == tokenizer(prompt).input_ids and tokens.ids[: len(asked)] == asked
    assert tokens.supervised == [False] * len(asked) + [True] * (len(tokens.ids) - len(asked))
    assert tokens.ids[-1] == tokenizer.eos_token_id and tokens.ids.count(tokenizer.bos_token_id) == 1
    if kind == "bytes" or completion.isascii():
        assert tokenizer.decode(tokens.ids[1:-1]) == prompt + completion  # no space is put between them
    together = tokenizer(prompt + completion).input_ids
    if together[: len(asked)] == asked:
        assert tokens.ids[:-1] == together


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_text_decodes_to_its_characters(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    text = " the answer is  42 .\n\n- <|im_end|>the cat </s>"
    whole = TokenisedText(tokenizer, text, special_ids(tokenizer))
    assert whole.part(0, len(text)) == tokenizer(text, add_special_tokens=False).input_ids
    for cut in range(len(text) + 1):
        before, behind = whole.prompt(0, cut), whole.part(cut, len(text))
        assert before == tokenizer(text[:cut], add_special_tokens=False).input_ids
        if kind == "bytes":
            assert tokenizer.decode(before + behind) == text
    if kind != "bytes":  # a text that goes on has no space in front
        assert tokenizer.decode([*continuation_ids(tokenizer, "x"), *continuation_ids(tokenizer, "the")]).endswith(
            "xthe"
        )


def test_a_slow_tokenizer_is_refused_in_one_sentence() -> None:
    class Letters(PreTrainedTokenizer):
        vocab_size = 300

        def get_vocab(self) -> dict[str, int]:
            return {chr(i): i for i in range(300)}

        def _tokenize(self, text: str, **kwargs: object) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return ord(token)

        def _convert_id_to_token(self, index: int) -> str:
            return chr(index)

    with pytest.raises(ValueError, match=r"Letters is a slow tokenizer.*; use a folder with a tokenizer\.json"):
        encode_example(Letters(eos_token="a", unk_token="b"), "a", "b", "row")
