"""Flags, empty thoughts and settings of chat templates: what prompts ask for, and what of a thought is learned."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_chat import QWEN3, tokenizer_with
from transformers import PreTrainedTokenizerFast

from datamodules import (
    InstructionDataModule,
    MixtureDataModule,
    PreferenceDataModule,
    Stream,
    StreamingDataModule,
    ThinkingFusion,
    VerifiableDataModule,
)
from datamodules.loaders.stream_loader import Pieces, Place
from datamodules.tokens.encoding import Tokens, encode_prompt, is_rendered, render
from modules.functional.thoughts import asks_for_thought, set_in_template
from modules.networks.tiny import END_OF_TURN
from modules.rollout import Calculator, Environment
from modules.rollout.tool_calls import ToolFormat

OPENING = "<|im_start|>assistant\n"
SWITCHED = QWEN3.replace(  # as Qwen3's own template opens an answer
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}",
)
EMPTY = "<think>\n\n</think>\n\n"
NEVER = {"enable_thinking": False}


@pytest.fixture
def qwen() -> PreTrainedTokenizerFast:
    """A tokenizer with a template of Qwen3's shape."""
    return tokenizer_with(SWITCHED)


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def say(*texts: str, **last: str) -> dict[str, Any]:
    """A conversation; the user begins."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    messages[-1] |= last
    return {"messages": messages}


def learned(data: InstructionDataModule) -> list[str]:
    """What the rows learn, as text."""
    data.setup("fit")
    return [supervised_text(data, row) for row in data.train_rows]


def supervised_text(data: InstructionDataModule, row: Tokens) -> str:
    return str(data.tokenizer.decode([token for token, keep in zip(row.ids, row.supervised, strict=True) if keep]))


def whole(data: InstructionDataModule) -> list[str]:
    return [str(data.tokenizer.decode(row.ids)) for row in data.train_rows]


def test_enable_thinking_false_ends_every_prompt_in_an_empty_thought(tmp_path, qwen):
    template = qwen.chat_template
    rows = write(tmp_path / "a.jsonl", {"prompt": "2+2?", "answer": "4"})
    for settings, end in ((NEVER, OPENING + EMPTY), ({"enable_thinking": True}, OPENING), (None, OPENING)):
        data = VerifiableDataModule(qwen, rows, chat_template_kwargs=settings, prompts_per_phase=1)
        data.setup("fit")
        data.setup("fit")
        (prompt,) = data.train_prompts
        assert prompt.text == "<|im_start|>user\n2+2?<|im_end|>\n" + end
        assert qwen.decode(prompt.ids) == prompt.text
        assert data.draw(0)["thinks"] == [None if settings is None else settings["enable_thinking"]]
    assert qwen.chat_template == template  # what the model is exported with
    pair = write(tmp_path / "b.jsonl", {"prompt": "2+2?", "chosen": "4", "rejected": "5"})
    pairs = PreferenceDataModule(qwen, pair, chat_template_kwargs=NEVER)
    pairs.setup("fit")
    assert str(qwen.decode(pairs.train_rows[0].prompt)).endswith(OPENING + EMPTY)
    assert qwen.decode(pairs.train_rows[0].completions[0]) == "4" + END_OF_TURN


def test_the_empty_thought_is_learned_where_the_model_writes_it_alone(tmp_path, qwen):
    rows = write(tmp_path / "a.jsonl", say("2+2?", "4"))
    injected = InstructionDataModule(qwen, rows, chat_template_kwargs=NEVER)
    assert learned(injected) == ["4" + END_OF_TURN] and OPENING + EMPTY + "4" in whole(injected)[0]
    written = InstructionDataModule(qwen, rows)
    assert learned(written) == [EMPTY + "4" + END_OF_TURN]
    thoughtful = write(tmp_path / "b.jsonl", say("2+2?", "4", reasoning_content="two twos"))
    with pytest.raises(ValueError, match="assistant message 1 unlike the prompt that it gives for it"):
        learned(InstructionDataModule(qwen, thoughtful, chat_template_kwargs=NEVER))


def test_every_module_of_supervised_rows_gives_the_template_its_settings(tmp_path, qwen):
    rows = write(tmp_path / "a.jsonl", say("2+2?", "4"))
    streams = {"chats": Stream(rows), "texts": Stream(write(tmp_path / "b.jsonl", {"text": "Four."}))}
    mixed = MixtureDataModule(qwen, streams, num_steps=1, loss_on="assistant", chat_template_kwargs=NEVER)
    assert learned(mixed) == ["4" + END_OF_TURN, "our." + qwen.eos_token]
    streamed = StreamingDataModule(qwen, rows, steps_per_epoch=1, chat_template_kwargs=NEVER)
    streamed.setup("fit")
    rows_read, _ = next(Pieces(streamed, 0, 1).batches(Place(), 0, 1))
    assert supervised_text(streamed, rows_read[0]) == "4" + END_OF_TURN


def test_prompts_that_are_rendered_with_or_without_an_empty_thought_stay_as_they_are(qwen):
    closed = tokenizer_with(set_in_template(SWITCHED, NEVER))
    for tokenizer in (qwen, closed):
        for end in ("", EMPTY, "<think>\n"):
            text = f"<|im_start|>user\nq<|im_end|>\n{OPENING}{end}"
            assert is_rendered(tokenizer, text) and encode_prompt(tokenizer, text, "row", chat=True)[0] == text
        assert not is_rendered(tokenizer, "q" + EMPTY)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"enable_thoughts": False}, "the chat template does not read 'enable_thoughts', so it would change nothing"),
        ({"enable_thinking": None}, "enable_thinking is None; a text, a number, true or false is expected"),
    ],
)
def test_settings_that_change_nothing_are_refused(tmp_path, qwen, settings, said):
    rows = write(tmp_path / "a.jsonl", say("2+2?", "4"))
    with pytest.raises(ValueError, match=said):
        InstructionDataModule(qwen, rows, chat_template_kwargs=settings).setup("fit")
    qwen.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no single one"):
        InstructionDataModule(qwen, rows, chat_template_kwargs=NEVER).setup("fit")


@pytest.mark.parametrize("value", [True, False, 3, 0.5, 'a"b\\c\n'])
def test_a_setting_reaches_the_template_as_it_is(value):
    tokenizer = tokenizer_with(set_in_template("\n{{ x }}{{ messages[0].content }}", {"x": value}))
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "!"}], tokenize=False)
    assert rendered == f"\n{value}!"


@pytest.mark.parametrize(
    ("turns", "mode"),
    [
        ([("user", "a /think"), ("assistant", "b"), ("user", "c /no_think")], False),
        ([("user", "a /no_think"), ("assistant", "b"), ("user", "c /think")], True),
        ([("system", "/no_think"), ("user", "a")], False),
        ([("system", "/no_think"), ("user", "a /think")], True),
        ([("user", "a /no_think"), ("assistant", "you may write /think"), ("tool", "/think")], False),
        ([("user", "a /no_think /think")], True),
        ([("user", "is /thinking or docs/think a flag?")], None),
        ([("user", "a")], None),
    ],
)
def test_the_last_flag_of_user_and_system_wins(turns, mode):
    assert asks_for_thought([{"role": role, "content": text} for role, text in turns]) is mode


def test_prompts_carry_their_mode(tmp_path, qwen):
    rows = write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b /think"}, {"prompt": "c /no_think"})
    for system, first in ((None, None), ("Be brief. /no_think", False)):
        data = VerifiableDataModule(qwen, rows, system=system, prompts_per_phase=3)
        data.setup("fit")
        assert [prompt.thinks for prompt in data.train_prompts] == [first, True, False]


def test_fused_rows_are_those_of_qwen3(tmp_path, qwen):
    """The two forms of table 9, whole; flags and thoughts are found again in what was rendered."""
    thinking = write(
        tmp_path / "t.jsonl", say("q", "a", reasoning_content="hm"), say("q", "<think>\nhm\n</think>\n\na")
    )
    plain = write(tmp_path / "p.jsonl", say("q", "a"))
    data = InstructionDataModule(qwen, ThinkingFusion(thinking, plain, unflagged=0.0))
    assert learned(data) == [f"<think>\nhm\n</think>\n\na{END_OF_TURN}"] * 2 + [f"{EMPTY}a{END_OF_TURN}"]
    thinks = f"<|im_start|>user\nq /think<|im_end|>\n{OPENING}<think>\nhm\n</think>\n\na{END_OF_TURN}"
    assert [text.strip() for text in whole(data)] == [
        thinks,
        thinks,
        f"<|im_start|>user\nq /no_think<|im_end|>\n{OPENING}{EMPTY}a{END_OF_TURN}",
    ]
    assert [asks_for_thought(text) for text in whole(data)] == [True, True, False]


def test_only_the_last_turn_gets_flag_and_thought(tmp_path, qwen):
    """Thoughts of earlier turns are gone from the history, and the last turn alone can be learned."""
    earlier = ("a", "<think>\nold\n</think>\n\nb")
    thinking = write(tmp_path / "t.jsonl", say(*earlier, "c", "<think>\nnew\n</think>\n\nd"))
    plain = write(tmp_path / "p.jsonl", say(*earlier, "c", "d"))
    fusion = ThinkingFusion(thinking, plain, unflagged=0.0)
    with pytest.raises(ValueError, match="such as <think> of earlier turns; set data.loss_on: last"):
        learned(InstructionDataModule(qwen, fusion))
    data = InstructionDataModule(qwen, fusion, loss_on="last")
    assert learned(data) == [f"<think>\nnew\n</think>\n\nd{END_OF_TURN}", f"{EMPTY}d{END_OF_TURN}"]
    history = f"<|im_start|>user\na<|im_end|>\n{OPENING}b<|im_end|>\n<|im_start|>user\nc "
    assert [text.startswith(history) for text in whole(data)] == [True, True]


def test_plain_rows_and_shares(tmp_path):
    thinking = write(
        tmp_path / "t.jsonl", *({"question": f"{i}=", "output": "<think>x</think>1", "answer": "1"} for i in range(400))
    )
    plain = write(
        tmp_path / "p.jsonl", {"prompt": "7=", "completion": "1"}, {"prompt": "8=", "completion": "<think></think>1"}
    )
    fusion = ThinkingFusion(thinking, plain, unflagged=0.25, separator="", empty="<think></think>", seed=1)
    rows = fusion.rows()
    flagged = [row.columns["question"].endswith("=/think") for row in rows[:400]]
    assert 260 <= sum(flagged) <= 340  # 300, within 4.6 standard errors
    assert {row.columns["question"].partition("=")[2] for row in rows[:400]} == {"", "/think"}
    assert rows[0].columns["answer"] == "1" and rows[0].columns["output"] == "<think>x</think>1"
    assert [(row.columns["prompt"], row.columns["completion"]) for row in rows[400:]] == [
        ("7=/no_think", "<think></think>1"),
        ("8=/no_think", "<think></think>1"),
    ]
    assert [row.columns for row in fusion.rows()] == [row.columns for row in rows]


def test_a_row_that_asks_not_to_think_gets_a_flag_in_any_case(tmp_path):
    rows = write(tmp_path / "t.jsonl", {"instruction": "Add. /no_think", "input": "1 2", "output": "<think>x</think>3"})
    fusion = ThinkingFusion(rows, write(tmp_path / "p.jsonl", {"prompt": "a", "completion": "b"}), unflagged=1.0)
    assert fusion.rows()[0].columns["input"] == "1 2 /think"
    asked = write(tmp_path / "m.jsonl", say("a /no_think", "<think>\nx\n</think>\n\nb"))
    (first, _) = ThinkingFusion(asked, write(tmp_path / "p.jsonl", {"prompt": "a", "completion": "b"}), 1.0).rows()
    assert first.columns["messages"][0]["content"] == "a /no_think /think"


def test_prompts_get_flags_alone(tmp_path):
    rows = write(tmp_path / "t.jsonl", {"prompt": "a", "answer": "1"})
    asked = [row.columns for row in ThinkingFusion(rows, rows, 0.0, prompts=True).rows()]
    assert asked == [{"prompt": "a /think", "answer": "1"}, {"prompt": "a /no_think", "answer": "1"}]


@pytest.mark.parametrize(
    ("thinking", "plain", "said"),
    [
        ({"prompt": "a", "completion": "b"}, None, r"t.jsonl:1: .*ThinkingFusion's thinking and has no thought"),
        (say("a", f"{EMPTY}b"), None, "thinking and has no thought"),
        (None, {"prompt": "a", "completion": "<think>x</think>b"}, r"p.jsonl:1: .*plain and has a thought: remove it"),
        (None, say("a", "b", reasoning_content="x"), "plain and has a thought"),
        (None, {"prompt": "a", "completion": "b", "reasoning": "x"}, "plain and has a thought"),
        ({"text": "a"}, None, "needs messages, or a prompt with a completion; found text"),
        ({"prompt": "a"}, None, "has no answer behind|has no thought"),
        (say("a"), None, "no answer behind the last message of the user: set ThinkingFusion's prompts: true"),
    ],
)
def test_rows_of_the_other_kind_are_refused(tmp_path, thinking, plain, said):
    good = {"prompt": "a", "completion": "<think>x</think>b"}, {"prompt": "a", "completion": "b"}
    files = write(tmp_path / "t.jsonl", thinking or good[0]), write(tmp_path / "p.jsonl", plain or good[1])
    with pytest.raises(ValueError, match=said):
        ThinkingFusion(*files).rows()


@pytest.mark.parametrize("values", [{"unflagged": 1.5}, {"empty": "<think>x</think>"}, {"empty": "<think>"}])
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="unflagged must lie|empty must be an empty thought"):
        ThinkingFusion("t.jsonl", "p.jsonl", **values)


def test_thoughts_stay_in_a_completion_with_tools_and_leave_the_history_of_the_next_prompt(qwen):
    """Behind results, the tokens that the policy goes on from are what it sampled, and what the template writes."""
    tools = Environment(Calculator).tools()
    form = ToolFormat(qwen, tools, {qwen.convert_tokens_to_ids(END_OF_TURN)})
    user: Any = {"role": "user", "content": "2*3?"}
    function = {"name": "calculate", "arguments": {"expression": "2*3"}}
    call: Any = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    call["tool_calls"] = [{"type": "function", "function": function}]
    _, ids = encode_prompt(qwen, [user], "row", tools=tools)
    turn = f"<think>\nhm\n</think>\n\n<tool_call>\n{json.dumps(function)}\n</tool_call>{END_OF_TURN}"
    assert [(found.name, found.arguments) for found in form.read(turn.removesuffix(END_OF_TURN))] == [
        ("calculate", {"expression": "2*3"})
    ]
    ids += qwen(turn).input_ids + form.write([("calculate", "6")])
    result: Any = {"role": "tool", "content": "6"}
    assert qwen.decode(ids) == render(qwen, [user, call, result], "row", open_turn=True, tools=tools)
    answered: Any = [user, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n6"}, user]
    assert encode_prompt(qwen, answered, "row")[0] == (
        f"<|im_start|>user\n2*3?<|im_end|>\n{OPENING}6<|im_end|>\n<|im_start|>user\n2*3?<|im_end|>\n{OPENING}"
    )
