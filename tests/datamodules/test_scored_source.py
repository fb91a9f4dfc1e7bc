"""Sampled and scored completions as preferences, and the tokens of their rendered prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from callbacks.writers.prediction_writer import write_line
from datamodules.preference import PreferenceDataModule
from datamodules.sources.scored import Sampled, Scored
from datamodules.tokens.encoding import encode_example, encode_prompt, encode_rendered
from modules.networks.tiny import tiny_tokenizer
from modules.types import Completion, Rollout


def record(completion: str, reward: Any, uid: str = "u", **columns: Any) -> dict[str, Any]:
    return {"uid": uid, "prompt": "1+1=", "completion": completion, "reward": reward, "finish": "stop", **columns}


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return str(path)


def compared(path: str, **options: Any) -> list[tuple[list[str], list[int]]]:
    return [(row.columns["completions"], row.columns["ranks"]) for row in Scored(path, **options).rows()]


FOUR = (record("a", 0.0), record("b", 1.0), record("c", 0.4), record("d", 0.7))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (["b", "a"], [0, 1])),
        ({"pairs": "all"}, (["b", "d", "c", "a"], [0, 1, 2, 3])),
        ({"pairs": "all", "min_gap": 0.35}, (["b", "d", "c", "a"], [0, 0, 0, 1])),  # falls of 0.3, 0.3 and 0.4
        ({"min_gap": 0.9}, (["b", "a"], [0, 1])),
    ],
)
def test_best_against_worst_or_all(
    tmp_path: Path, options: dict[str, Any], expected: tuple[list[str], list[int]]
) -> None:
    assert compared(write(tmp_path / "a.jsonl", *FOUR), **options) == [expected]


def test_what_is_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        record("best", 1.0),
        record("other", 0.5, uid="v"),
        record("no reward", None),
        record("cut", 2.0, finish="length"),
        record("given up", 2.0, finish="abort"),
        record(" ", 2.0),
        record("best", 0.1),  # the same text again, whatever its reward
        record("worst", 0.2),
        record("tied", 0.5, uid="v"),
        record("same", 1.0, uid="w"),
        record("same", 0.0, uid="w"),
        record("lonely", 0.0, uid="x"),
        record("unscored", None, uid="y"),
    )
    for pairs in ("best_worst", "all"):
        source = Scored(path, pairs=pairs)  # type: ignore[arg-type]
        (row,) = source.rows()
        assert (row.columns["completions"], row.columns["ranks"], row.origin) == (
            ["best", "worst"],
            [0, 1],
            f"{path}:1",
        )
        assert source.skipped == 4  # v, w, x, y
        assert len(source.rows()) == 1 and source.skipped == 4


def test_equal_rewards_are_ranked_equal(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", record("a", 1), record("b", 0), record("c", 1))
    assert compared(path, pairs="all") == [(["a", "c", "b"], [0, 0, 1])]
    assert compared(path) == [(["a", "b"], [0, 1])]


def test_uid_decides_and_not_the_prompt(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", record("a", 1, "p#0"), record("b", 0, "p#1"), record("c", 0, "p#0"), record("d", 1, "p#1")
    )
    assert compared(path) == [(["a", "c"], [0, 1]), (["d", "b"], [0, 1])]


BROKEN: list[tuple[tuple[dict[str, Any], ...], str]] = [
    (
        (record("a", 1), {"uid": "u", "prompt": "x", "completion": "b"}),
        "a.jsonl:2: no reward; expected what PredictionWriter writes: uid, prompt",
    ),
    ((record("a", 1), record("b", "high")), "a.jsonl:2: reward is 'high', a number or null was expected"),
    ((record("a", 1), record("b", float("nan"))), "a.jsonl:2: reward is nan, a number"),
    ((record("a", 1), record("b", True)), "a.jsonl:2: reward is True, a number"),
    (
        (record("a", 1), record("b", 0, prompt="2+2=")),
        "a.jsonl:2: another prompt than .*a.jsonl:1, which has the same uid",
    ),
    ((record("a", 1), record("b", 0, prompt=[])), "a.jsonl:2: prompt holds a list, text was expected"),
    (
        (record("a", 1), {**record("b", 0), "completion": None}),
        "a.jsonl:2: completion holds a NoneType, text was expected",
    ),
    (
        (record("a", 1), record("b", 1)),
        "a.jsonl: none of 1 prompts has two finished completions whose rewards differ by more than 0.0",
    ),
]


@pytest.mark.parametrize(("records", "said"), BROKEN)
def test_broken_files_say_where_in_one_sentence(tmp_path: Path, records: tuple[dict[str, Any], ...], said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        Scored(write(tmp_path / "a.jsonl", *records)).rows()
    assert "\n" not in str(raised.value)


def test_arguments_and_missing_files() -> None:
    with pytest.raises(ValueError, match="pairs must be best_worst or all and min_gap at least 0, got 'best' and 0.0"):
        Scored("a.jsonl", pairs="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'all' and -1"):
        Scored("a.jsonl", pairs="all", min_gap=-1)
    with pytest.raises(ValueError, match="^missing.jsonl: no such file$"):
        Scored("missing.jsonl").rows()


BOS_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ "
    "message['content'] + '<|eos|>' }}{% endif %}"
    "{% endfor %}"
)


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


@pytest.mark.parametrize("template", [None, BOS_TEMPLATE])
@pytest.mark.parametrize("chat", [True, False])
def test_a_written_prompt_is_read_as_the_model_read_it(tmp_path: Path, template: str | None, chat: bool) -> None:
    tokenizer = with_template(template)
    text, ids = encode_prompt(tokenizer, "1+1=", "here", chat=chat)
    rollouts = [
        Rollout("u", text, ids, None, Completion([], [], answer, "stop"), 0, {}, reward)
        for answer, reward in (("2", 1.0), ("3", 0.0))
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(map(write_line, rollouts)))
    for wrapped in {chat, True} if chat else {False}:  # data.chat of the earlier run does no harm
        data = PreferenceDataModule(tokenizer, Scored(str(path)), chat=wrapped)
        data.setup("fit")
        (row,) = data.train_rows
        assert row.prompt == ids
        for answer, completion in zip(("2", "3"), row.completions, strict=True):
            learned = encode_example(tokenizer, "1+1=", answer, "here", chat=chat)
            assert row.prompt + completion == learned.ids[: len(learned.ids) - learned.supervised[::-1].index(True)]
            end = "<|im_end|>" if chat and template is None else "<|eos|>"
            assert tokenizer.decode(completion) == answer + end


def test_plain_text_is_not_taken_for_a_rendered_prompt() -> None:
    tokenizer = tiny_tokenizer()
    rendered, _ = encode_prompt(tokenizer, "x", "here", chat=True)
    assert encode_rendered(tokenizer, rendered, "y", "here") is not None
    assert encode_rendered(tokenizer, "x", "y", "here") is None
    assert encode_rendered(tokenizer, rendered + "x", "y", "here") is None
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # nothing to tell a prompt by
    )
    assert encode_rendered(tokenizer, rendered, "y", "here") is None
    tokenizer.chat_template = None
    assert encode_rendered(tokenizer, rendered, "y", "here") is None


def test_candidates_for_a_judge(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        record("b", None, answer="2"),
        record("only", 1.0, uid="v"),
        record("a", 1.0, answer="2"),
        record("b", 0.0, answer="2"),  # the same text again
        record("cut", 1.0, finish="length", answer="2"),
        record(" ", 1.0, answer="2"),
        record("x", 0.0, uid="w"),
        record("y", 0.0, uid="w"),
    )
    first, second = Sampled(path).rows()
    assert first.columns == {
        "prompt": "1+1=",
        "completions": ["b", "a"],
        "answer": "2",
    }  # in the order of sampling, whatever the rewards
    assert second.columns == {"prompt": "1+1=", "completions": ["x", "y"], "answer": None}
    assert (first.origin, second.origin) == (f"{path}:1", f"{path}:7")
    with pytest.raises(ValueError, match="none of 1 prompts has two finished completions that differ"):
        Sampled(write(tmp_path / "b.jsonl", record("a", 0.0), record("a", 1.0))).rows()
    with pytest.raises(ValueError, match="c.jsonl: no such file"):
        Sampled(str(tmp_path / "c.jsonl")).rows()
