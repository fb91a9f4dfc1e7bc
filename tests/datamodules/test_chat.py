"""Which tokens are learned, in text and in conversations, and which rows are refused."""

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizerFast

from datamodules.tokens.encoding import (
    Dialogue,
    Message,
    Tokens,
    encode_document,
    encode_example,
    encode_prompt,
    render,
)
from datamodules.tokens.picture import PICTURE, token_picture
from modules.networks.tiny import BOS, CHAT_TEMPLATE, END_OF_TURN, EOS, tiny_tokenizer

STRIPPING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' and not loop.last else m['content'] "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\nYou are "
    "helpful<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|im_start|>' + message['role'] + '\n\n' + message['content'] | "
    "trim + '<|im_end|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
QWEN3 = (  # thoughts stay in turns behind the last user message only, and the last turn always has some
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 "
    "%}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thoughts = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in "
    "m.content else '') %}"
    "{% if loop.index0 > ns.last and (loop.last or thoughts) %}<think>\n{{ thoughts.strip('\n') }}\n</think>\n\n{% "
    "endif %}{{ content }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor '
    "%}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
FAMILIES = {"SmolLM2": (SMOLLM2, END_OF_TURN), "Llama-3": (LLAMA3, END_OF_TURN), "Mistral": (MISTRAL, EOS)}
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
LEADING_BOS = "{{ bos_token }}" + CHAT_TEMPLATE
TWO_ENDS = CHAT_TEMPLATE.replace("<|im_end|>\\n", "<|im_end|><|eos|>\\n")


def tokenizer_with(template: str = CHAT_TEMPLATE, adds: str = "") -> PreTrainedTokenizerFast:
    """Make the tiny tokenizer with another template, or one that adds BOS or EOS by itself, as Llama's and T5's do."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    single = [token for token in (BOS, "$A", EOS) if token == "$A" or token in adds]
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def pad_is_eos() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def turns(*contents: str, system: str | None = None) -> list[Message]:
    """Make messages of user and assistant in turn."""
    start = [Message(role="system", content=system)] if system else []
    return start + [
        Message(role=("user", "assistant")[index % 2], content=content) for index, content in enumerate(contents)
    ]


def learned(tokenizer: PreTrainedTokenizerFast, tokens: Tokens) -> str:
    """Return the supervised text, with | where unsupervised tokens stand between."""
    parts: list[list[int]] = [[]]
    for token, supervised in zip(tokens.ids, tokens.supervised, strict=True):
        if supervised:
            parts[-1].append(token)
        elif parts[-1]:
            parts.append([])
    return "|".join(str(tokenizer.decode(part)) for part in parts if part)


@pytest.mark.parametrize(
    "tokenizer",
    [
        tiny_tokenizer(),
        pad_is_eos(),
        tokenizer_with(adds=BOS),
        tokenizer_with(adds=EOS),
        tokenizer_with(adds=BOS + EOS),
    ],
)
def test_text_learns_the_completion_and_exactly_one_end(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = encode_example(tokenizer, "What is 2+2?", "four", "row")
    assert sum(tokens.supervised) == len("four") + 1  # one token per byte
    assert tokens.ids[-1] == tokenizer.eos_token_id and tokens.supervised[-1]
    assert tokens.ids.count(tokenizer.eos_token_id) == 1
    assert tokens.supervised == sorted(tokens.supervised)
    assert learned(tokenizer, tokens) == "four" + EOS


def test_text_prompt_has_the_bos_that_the_tokenizer_adds_and_never_two() -> None:
    assert encode_prompt(tiny_tokenizer(), "ab", "row")[1] == [102, 103]  # byte 97 is token 5 + 97
    for adds in (BOS, BOS + EOS):
        assert encode_prompt(tokenizer_with(adds=adds), "ab", "row")[1] == [1, 102, 103]
        assert encode_prompt(tokenizer_with(adds=adds), BOS + "ab", "row")[1] == [1, 102, 103]
        assert encode_example(tokenizer_with(adds=adds), BOS + "a", "b", "row").ids == [1, 102, 103, 2]


def test_a_completion_that_brings_its_end_gets_no_second() -> None:
    assert encode_example(tiny_tokenizer(), "a", "b" + EOS, "row") == encode_example(tiny_tokenizer(), "a", "b", "row")


@pytest.mark.parametrize(
    "tokenizer", [tiny_tokenizer(), pad_is_eos(), tokenizer_with(adds=BOS), tokenizer_with(adds=BOS + EOS)]
)
def test_every_assistant_turn_is_learned_with_its_end_of_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    dialogue = turns("hi", "hello", "and?", "bye", system="be brief")
    tokens = encode_example(tokenizer, [], dialogue, "row")
    assert learned(tokenizer, tokens) == f"hello{END_OF_TURN}|bye{END_OF_TURN}"
    assert sum(tokens.supervised) == len("hello") + 1 + len("bye") + 1
    assert tokenizer.decode(tokens.ids) == render(tokenizer, dialogue, "row", open_turn=False)
    assert not tokens.supervised[-1]  # the newline behind the last end of turn


@pytest.mark.parametrize("adds", ["", BOS, BOS + EOS])
def test_one_bos_behind_a_template_that_writes_it(adds: str) -> None:
    tokenizer = tokenizer_with(LEADING_BOS, adds)
    ids = encode_example(tokenizer, turns("hi"), turns("?", "hello")[1:], "row").ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    end = tokenizer.get_vocab()[END_OF_TURN]
    opening = 1 + 1 + len("\nassistant\n")  # the user's end of turn, the next start of turn, one token per byte
    assert encode_prompt(tokenizer, turns("hi"), "row")[1] == ids[: ids.index(end) + opening]


def test_sampling_prompt_is_what_training_put_before_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    tokens = encode_example(tokenizer, "2+2?", "4", "row", chat=True, system="be brief")
    text, ids = encode_prompt(tokenizer, "2+2?", "row", chat=True, system="be brief")
    assert tokens.ids[: len(ids)] == ids and tokens.supervised.index(True) == len(ids)
    assert text == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert encode_prompt(tokenizer, turns("x", system="mine"), "row", system="yours")[0].count("system") == 1


def test_message_prompts_keep_their_own_assistant_turns_unlearned() -> None:
    tokenizer = tiny_tokenizer()
    tokens = encode_example(tokenizer, turns("a", "context", "b"), [Message(role="assistant", content="answer")], "row")
    assert learned(tokenizer, tokens) == f"answer{END_OF_TURN}"


def test_changing_the_prompt_changes_no_label() -> None:
    tokenizer = tiny_tokenizer()
    one, two = (encode_example(tokenizer, prompt, "same answer", "row") for prompt in ("short", "quite another prompt"))
    labels = [
        [token for token, keep in zip(tokens.ids, tokens.supervised, strict=True) if keep] for tokens in (one, two)
    ]
    assert labels[0] == labels[1]


def test_a_template_without_end_token_gets_one_learned() -> None:
    tokenizer = tokenizer_with(PLAIN)
    tokens = encode_example(tokenizer, [], turns("hi", "hello", "and?", "bye"), "row")
    assert learned(tokenizer, tokens) == f"hello{EOS}|bye{EOS}"


def test_only_the_first_of_two_ends_is_learned() -> None:
    assert (
        learned(tiny_tokenizer(), encode_example(tokenizer_with(TWO_ENDS), [], turns("hi", "hello"), "row"))
        == f"hello{END_OF_TURN}"
    )


def test_special_tokens_inside_an_answer_do_not_end_it() -> None:
    for text in (f"one {END_OF_TURN} two", "end", "|>", "assistant", "trailing \n"):
        assert (
            learned(tiny_tokenizer(), encode_example(tiny_tokenizer(), [], turns("hi", text), "row"))
            == text + END_OF_TURN
        )


def test_an_end_of_turn_that_is_written_out_is_there_once() -> None:
    assert (
        learned(tiny_tokenizer(), encode_example(tiny_tokenizer(), [], turns("hi", f"one{END_OF_TURN}\n"), "row"))
        == f"one{END_OF_TURN}"
    )
    with pytest.raises(ValueError, match="row: assistant message 1 is empty"):
        encode_example(tiny_tokenizer(), [], turns("hi", END_OF_TURN), "row")


def test_an_end_of_turn_that_is_special_only_as_an_added_token_ends_a_turn() -> None:
    tokenizer = tokenizer_with(CHAT_TEMPLATE.replace(END_OF_TURN, "<|over|>"))
    tokenizer.add_tokens([AddedToken("<|over|>", special=True)])
    assert "<|over|>" not in tokenizer.all_special_tokens
    assert (
        learned(tokenizer, encode_example(tokenizer, [], turns("hi", "one", "and", "two"), "row"))
        == "one<|over|>|two<|over|>"
    )


def test_what_a_template_writes_before_an_answer_is_learned_with_it() -> None:
    thinking = CHAT_TEMPLATE.replace(
        "message['content']", "('<think></think>' if message['role'] == 'assistant' else '') + message['content']"
    )
    tokens = encode_example(tokenizer_with(thinking), [], turns("hi", "think"), "row")
    assert learned(tiny_tokenizer(), tokens) == f"<think></think>think{END_OF_TURN}"


NO_TEMPLATE = tiny_tokenizer()
NO_TEMPLATE.chat_template = None
REFUSING = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHAT_TEMPLATE
REFUSED: list[tuple[PreTrainedTokenizerFast, Dialogue, Dialogue, str]] = [
    (tiny_tokenizer(), [], turns("hi"), "no supervised token"),
    (tiny_tokenizer(), [], [], "no supervised token"),
    (tiny_tokenizer(), [], turns("hi", "hello")[1:], "starts with an assistant turn"),
    (tiny_tokenizer(), [], turns("hi", " \n"), "assistant message 1 is empty"),
    (tiny_tokenizer(), "a", "", "the completion is empty"),
    (tiny_tokenizer(), "a", " \n", "the completion is empty"),
    (tiny_tokenizer(), "a", EOS, "the completion is empty"),
    (tiny_tokenizer(), "", "b", "the prompt is empty and the tokenizer adds no BOS"),
    (tiny_tokenizer(), "a", turns("b", "c"), "the prompt is text and the completion a list of messages"),
    (NO_TEMPLATE, [], turns("hi", "hello"), "this tokenizer has none"),
    (tokenizer_with(REFUSING), [], turns("hi", "hello"), "the chat template refuses these messages: system first"),
    (
        tokenizer_with(STRIPPING),
        [],
        turns("a", "<think>x</think>b", "c", "d"),
        "rewrites what stands before assistant message 3",
    ),
    (tiny_tokenizer(), [], turns("hi", "hello", " "), "user message 2 is empty"),
    (tiny_tokenizer(), [], turns("hi", EOS), "assistant message 1 is empty"),
    (
        tiny_tokenizer(),
        [],
        [Message(role="system", content="x"), *turns("a", "b")[1:]],
        "starts with an assistant turn",
    ),
    (
        tokenizer_with(CHAT_TEMPLATE.replace("message['content']", "message['content'] | upper")),
        [],
        turns("hi", "hello"),
        "changes its text",
    ),
]


@pytest.mark.parametrize(("tokenizer", "prompt", "completion", "message"), REFUSED)
def test_rows_that_cannot_be_learned_are_refused_by_name(
    tokenizer: PreTrainedTokenizerFast, prompt: Dialogue, completion: Dialogue, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        encode_example(tokenizer, prompt, completion, "data.jsonl:7")
    assert str(raised.value).startswith("data.jsonl:7") and "\n" not in str(raised.value)


def test_prompts_that_cannot_be_sampled_from_are_refused() -> None:
    with pytest.raises(ValueError, match="row: the prompt is empty"):
        encode_prompt(tiny_tokenizer(), "", "row")
    with pytest.raises(ValueError, match="row: a system message needs a chat prompt"):
        encode_prompt(tiny_tokenizer(), "a", "row", system="be brief")
    no_end = tiny_tokenizer()
    no_end.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no end token"):
        encode_example(no_end, "a", "b", "row")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad_equals_eos", [False, True])
def test_every_family_of_templates_learns_one_end_per_turn(family: str, pad_equals_eos: bool) -> None:
    template, ending = FAMILIES[family]
    tokenizer = tokenizer_with(template, adds=BOS)
    if pad_equals_eos:
        tokenizer.pad_token = tokenizer.eos_token
    dialogue = turns("hi", "hello", "and?", "bye")
    tokens = encode_example(tokenizer, [], dialogue, "row")
    space = " " if family == "Mistral" else ""
    assert learned(tokenizer, tokens) == f"{space}hello{ending}|{space}bye{ending}"
    end = tokenizer.convert_tokens_to_ids(ending)
    assert sum(token == end and keep for token, keep in zip(tokens.ids, tokens.supervised, strict=True)) == 2
    text = str(tokenizer.decode(tokens.ids))
    assert text == render(tokenizer, dialogue, "row", open_turn=False) and text.count(BOS) == (family != "SmolLM2")


def test_a_template_that_trims_ends_the_answer_where_it_does() -> None:
    tokenizer = tokenizer_with(LLAMA3)
    assert learned(tokenizer, encode_example(tokenizer, [], turns("hi", " hello \n"), "row")) == "hello" + END_OF_TURN


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), pad_is_eos(), tokenizer_with(adds=BOS + EOS)])
@pytest.mark.parametrize(
    "written", ["<|endoftext|>", EOS, "<|endoftext|>\n", EOS + "<|endoftext|>", "<|endoftext|> " + EOS]
)
def test_an_end_token_written_out_is_not_an_answer(tokenizer: PreTrainedTokenizerFast, written: str) -> None:
    assert encode_example(tokenizer, "a", "b" + written, "row") == encode_example(tokenizer, "a", "b", "row")
    assert encode_example(tokenizer, turns("a"), "b" + written, "row") == encode_example(
        tokenizer, turns("a"), "b", "row"
    )
    assert encode_document(tokenizer, "ab" + written, "row") == encode_document(tokenizer, "ab", "row")
    for bad, what in (
        (lambda: encode_example(tokenizer, "a", written, "row"), "completion"),
        (lambda: encode_document(tokenizer, written, "row"), "text"),
    ):
        with pytest.raises(ValueError, match=f"row: the {what} is empty"):
            bad()
    inside = encode_example(tokenizer, "a", "x<|endoftext|>y", "row")
    assert sum(inside.supervised) == len("x<|endoftext|>y") + 1  # inside an answer it is text


def test_a_document_is_learned_whole() -> None:
    assert encode_document(tiny_tokenizer(), "ab", "row") == Tokens([102, 103, 2], [False, True, True], whole=True)
    for adds in (BOS, BOS + EOS):
        for text in ("ab", BOS + "ab", BOS + BOS + "ab"):
            assert encode_document(tokenizer_with(adds=adds), text, "row") == Tokens(
                [1, 102, 103, 2], [False, True, True, True], whole=True
            )
    with pytest.raises(ValueError, match="row: the text is empty"):
        encode_document(tiny_tokenizer(), " \n", "row")


def test_what_the_loss_is_on() -> None:
    tokenizer, dialogue = tiny_tokenizer(), turns("hi", "hello", "and?", "bye", system="be brief")
    every, last, everything = (
        encode_example(tokenizer, [], dialogue, "row", loss_on=on) for on in ("assistant", "last", "all")
    )
    assert every.ids == last.ids == everything.ids
    assert learned(tokenizer, every) == f"hello{END_OF_TURN}|bye{END_OF_TURN}"
    assert learned(tokenizer, last) == f"bye{END_OF_TURN}"
    assert everything.supervised == [False] + [True] * (len(every.ids) - 1)
    first = encode_example(tokenizer, [], dialogue, "row", unlearned={4})
    assert learned(tokenizer, first) == f"hello{END_OF_TURN}"
    assert learned(tokenizer, encode_example(tokenizer, [], dialogue, "row", unlearned={2})) == f"bye{END_OF_TURN}"
    assert learned(tokenizer, encode_example(tokenizer, "a", "b", "row", loss_on="last")) == "b" + EOS
    assert encode_example(tokenizer, "a", "b", "row", loss_on="all") == Tokens([102, 103, 2], [False, True, True])


def test_a_template_that_drops_thoughts_can_learn_the_last_turn() -> None:
    tokenizer = tokenizer_with(QWEN3)
    first: Message = {"role": "assistant", "content": "b", "reasoning_content": "x"}
    last: Message = {"role": "assistant", "content": "d", "reasoning_content": "y"}
    dialogue = [*turns("a"), first, *turns("c"), last]
    tokens = encode_example(tokenizer, [], dialogue, "row", loss_on="last")
    assert learned(tokenizer, tokens) == f"<think>\ny\n</think>\n\nd{END_OF_TURN}"
    assert tokenizer.decode(tokens.ids) == render(tokenizer, dialogue, "row", open_turn=False) and "x" not in str(
        tokenizer.decode(tokens.ids)
    )
    with pytest.raises(
        ValueError, match="such as <think> of earlier turns; set data.loss_on: last, or give each turn a row of its own"
    ) as raised:
        encode_example(tokenizer, [], dialogue, "row")
    assert str(raised.value).endswith("assistant\\n[<think>\\nx\\n</think>\\n\\nb<|im_end|>]\\n")
    alone = encode_example(tokenizer, [], dialogue[:2], "row")
    assert learned(tokenizer, alone) == f"<think>\nx\n</think>\n\nb{END_OF_TURN}"
    with pytest.raises(
        ValueError,
        match="row: assistant message 1: the chat template changes its reasoning; use a template that writes a reasoning",
    ):
        encode_example(tiny_tokenizer(), [], dialogue[:2], "row")


def test_tools_and_their_calls() -> None:
    tokenizer, tools = tokenizer_with(QWEN3), [{"type": "function", "function": {"name": "add"}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    dialogue: list[Message] = [
        *turns("1+1"),
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "r"},
    ]
    dialogue += [{"role": "tool", "content": ""}, {"role": "assistant", "content": "2", "reasoning_content": "s"}]
    tokens = encode_example(tokenizer, [], dialogue, "row", tools=tools)
    made = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert (
        learned(tokenizer, tokens)
        == f"<think>\nr\n</think>\n\n{made}{END_OF_TURN}|<think>\ns\n</think>\n\n2{END_OF_TURN}"
    )
    assert str(tokenizer.decode(tokens.ids)).startswith(
        '<|im_start|>system\n{"type": "function", "function": {"name": "add"}}\n<|im_end|>'
    )
    with pytest.raises(ValueError, match="row: the row has tools and the chat template does not write them"):
        encode_example(tiny_tokenizer(), [], turns("a", "b"), "row", tools=tools)
    with pytest.raises(
        ValueError,
        match="row: assistant message 1: the chat template changes its tool call; use a template that writes a tool call",
    ):
        encode_example(
            tiny_tokenizer(), [], [*turns("1+1"), {"role": "assistant", "content": "", "tool_calls": [call]}], "row"
        )


@pytest.mark.parametrize("template", [LEADING_BOS, LLAMA3])
def test_two_bos_tokens_of_a_template_are_refused(template: str) -> None:
    doubled = tokenizer_with("{{ bos_token }}" + template)
    with pytest.raises(ValueError, match="row: two BOS tokens at the start") as raised:
        encode_example(doubled, [], turns("hi", "hello"), "row")
    assert f": {BOS}{BOS}<|im_start|>user" in str(raised.value) and f"[hello{END_OF_TURN}]" in str(raised.value)


def test_an_empty_mask_shows_its_tokens() -> None:
    with pytest.raises(ValueError, match="row: no supervised token") as raised:
        encode_example(tiny_tokenizer(), [], turns("hi", "hello"), "row", unlearned={1})
    assert str(raised.value).endswith(
        "user\\nhi<|im_end|>\\n<|im_start|>assistant\\nhello<|im_end|>\\n"
    )  # no brackets: nothing is learned
    with pytest.raises(ValueError, match=r"\(no tokens\)"):
        encode_example(tiny_tokenizer(), [], [], "row")


def test_a_long_picture_keeps_both_ends() -> None:
    tokens = encode_example(tiny_tokenizer(), "p" * 500, "c" * 500, "row")
    picture = token_picture(tiny_tokenizer(), tokens.ids, tokens.supervised)
    half = PICTURE // 2
    assert picture == "p" * half + " ... " + "c" * (half - len(EOS) - 1) + EOS + "]"


def test_a_system_message_of_the_row_wins_over_the_setting() -> None:
    tokens = encode_example(tiny_tokenizer(), [], turns("a", "b", system="mine"), "row", system="yours")
    assert "yours" not in str(tiny_tokenizer().decode(tokens.ids))
    assert "yours" in str(
        tiny_tokenizer().decode(encode_example(tiny_tokenizer(), [], turns("a", "b"), "row", system="yours").ids)
    )
