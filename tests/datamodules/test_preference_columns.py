"""Every format of a preference row, what is refused, and the public files as they are."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from datamodules.formats.preference_shapes import PreferenceExample, dense_ranks, preference_example
from datamodules.formats.reading import Reading
from datamodules.formats.table import check_mapping
from datamodules.preference import PreferenceDataModule
from datamodules.sources import Files, Row
from datamodules.tokens.encoding import encode_example
from modules.networks.tiny import tiny_tokenizer

DATA = Path(__file__).parents[2].parent / "shared" / "data"
SYSTEM, USER, MORE = (
    {"role": "system", "content": "s"},
    {"role": "user", "content": "x"},
    {"role": "user", "content": "z"},
)
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
HH = "\n\nHuman: x \n\nAssistant: I said Human: hi\n\nHuman: z\n\nAssistant:"


def row(**columns: Any) -> Row:
    return Row(columns, "data.jsonl:3", "data")


def said(turn: dict[str, str]) -> dict[str, str]:
    return {"from": {"user": "human", "assistant": "gpt", "system": "system"}[turn["role"]], "value": turn["content"]}


def parts(turn: dict[str, str]) -> dict[str, Any]:
    content = turn["content"]
    return {
        "role": turn["role"],
        "content": [{"type": "text", "value": content[:1]}, {"type": "text", "value": content[1:]}],
        "loss_weight": float(turn["role"] == "assistant"),
    }


@pytest.mark.parametrize(
    ("columns", "mapping", "prompt"),
    [
        ({"prompt": "x", "chosen": "good", "rejected": "bad"}, {}, "x"),
        ({"question": "x", "response_j": "good", "response_k": "bad"}, {}, "x"),
        ({"question": "x", "prompt": "no", "chosen": "good", "rejected": "bad"}, {"question": "question"}, "x"),
        (
            {"q": "x", "win": "good", "loss": "bad", "output": {}},
            {"prompt": "q", "chosen": "win", "rejected": "loss"},
            "x",
        ),
        (
            {"q": "x", "pair": {"win": "good", "loss": "bad"}},
            {"prompt": "q", "chosen": "pair.win", "rejected": "pair.loss"},
            "x",
        ),
        ({"instruction": "x", "input": "", "chosen": "good", "rejected": "bad"}, {}, "x"),
        ({"instruction": "x", "input": "more", "chosen": "good", "rejected": "bad"}, {}, "x\n\nmore"),
        ({"prompt": [USER], "chosen": "good", "rejected": "bad"}, {}, [USER]),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, {}, [USER]),
        ({"prompt": "x", "chosen": [GOOD], "rejected": [BAD]}, {}, [USER]),
        ({"prompt": "x", "chosen": GOOD, "rejected": said(BAD)}, {}, [USER]),
        ({"prompt": "x", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]}, {}, [USER]),
        ({"prompt": "x", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, {}, [SYSTEM, USER]),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}, {}, [USER]),
        ({"chosen": [USER, BAD, MORE, GOOD], "rejected": [USER, BAD, MORE, BAD]}, {}, [USER, BAD, MORE]),
        (
            {
                "chosen_messages": [parts(SYSTEM), parts(USER), parts(GOOD)],
                "rejected_messages": [SYSTEM, USER, BAD],
            },
            {},
            [SYSTEM, USER],
        ),
        (
            {"conversations": [said(SYSTEM), said(USER)], "chosen": said(GOOD), "rejected": said(BAD)},
            {},
            [SYSTEM, USER],
        ),
        ({"chosen": HH + "good", "rejected": HH + "bad"}, {}, HH),
        ({"prompt": "x", "completions": ["good", "bad"]}, {}, "x"),
        (
            {"context": [USER], "completions": [{"rank": 0, "completion": [GOOD]}, {"rank": 1, "completion": [BAD]}]},
            {},
            [USER],
        ),
        ({"instruction": "x", "output_1": "good", "output_2": "bad", "preference": 1}, {}, "x"),
        ({"instruction": "x", "output_1": "good", "output_2": "bad", "preference": 1.4}, {}, "x"),
        ({"input": "x", "output_1": "good", "output_2": "bad", "label": "1"}, {}, "x"),
        (
            {"prompt": "x", "response1": "good", "response2": "bad", "annotator1": 2, "annotator2": 1, "annotator3": 1},
            {},
            "x",
        ),
        ({"prompt": "x", "response1": "good", "response2": "bad", "verdict": "1"}, {"label": "verdict"}, "x"),
    ],
)
def test_shapes_of_a_pair(columns: dict[str, Any], mapping: dict[str, str], prompt: object) -> None:
    check_mapping(mapping, "preference")
    assert preference_example(row(**columns), Reading("preference", mapping)) == PreferenceExample(
        prompt, ["good", "bad"], [0, 1], None, "data.jsonl:3"
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "ranks"),
    [
        ({"completions": ["a", "b", "c"]}, [0, 1, 2]),
        ({"completions": ["a", "b", "c"], "ranks": [4, 1, 4]}, [1, 0, 1]),
        ({"completions": ["a", "b", "c"], "scores": [0.5, 2, -1]}, [1, 0, 2]),
        ({"completions": ["a", "b", "c"], "scores": [1, None, 1], "ranks": [0, 1, 2]}, [0, 1, 2]),
        (
            {
                "completions": [
                    {"rank": 2, "completion": "a"},
                    {"rank": 0, "completion": "b"},
                    {"rank": 0, "completion": "c"},
                ]
            },
            [1, 0, 0],
        ),
        ({"output_1": "a", "output_2": "b", "preference": 2}, [1, 0]),
        ({"output_1": "a", "output_2": "b", "preference": 1.50001}, [1, 0]),
        ({"chosen": "a", "rejected": "b", "score_chosen": 5, "score_rejected": 1.5}, [0, 1]),
        ({"chosen": "a", "rejected": "b", "score_chosen": None, "score_rejected": None}, [0, 1]),
        ({"completion": "a", "label": True}, [0]),
        ({"completion": "a", "kto_tag": False}, [1]),
    ],
)
def test_ranks(columns: dict[str, Any], ranks: list[int]) -> None:
    example = preference_example(row(prompt="x", **columns), Reading("preference"))
    assert example is not None and example.ranks == ranks and example.completions == ["a", "b", "c"][: len(ranks)]


def test_a_labelled_conversation_is_its_last_turn() -> None:
    expected = PreferenceExample([USER, BAD, MORE], ["good"], [1], None, "data.jsonl:3")  # type: ignore[list-item]
    assert preference_example(row(messages=[USER, BAD, MORE, GOOD], label=False), Reading("preference")) == expected


@pytest.mark.parametrize("verdict", [0, 0.0, None, "Tie", "tie", 1.5, float("nan"), ""])
def test_ties_are_no_examples_whatever_the_answers_hold(verdict: object) -> None:
    assert preference_example(row(input="x", output_1="", output_2=True, label=verdict), Reading("preference")) is None
    assert preference_example(row(prompt="x", completions=["a", "b"], scores=[1, 1]), Reading("preference")) is None
    scored = row(prompt="x", **PAIR, chosen_score=4, rejected_score="4.0")
    assert preference_example(scored, Reading("preference")) is None


@pytest.mark.parametrize(
    ("votes", "ranks"), [((1, 2, 0), None), ((0, 0, 2), None), ((2, 0, 2), [1, 0]), ((1, 1, 1), [0, 1])]
)
def test_the_majority_of_annotators_decides(votes: tuple[int, ...], ranks: list[int] | None) -> None:
    example = preference_example(
        row(prompt="x", response1="a", response2="b", **{f"annotator{i + 1}": vote for i, vote in enumerate(votes)}),
        Reading("preference"),
    )
    assert (example and example.ranks) == ranks


def test_instructions_and_transcripts_become_messages_with_a_template() -> None:
    for columns in ({"instruction": "x"}, {"input": "x"}):
        example = preference_example(
            row(chosen="good", rejected="bad", **columns), Reading("preference"), template=True
        )
        assert example is not None and example.prompt == [USER]
    example = preference_example(row(chosen=HH + " good\n", rejected=HH + " bad"), Reading("preference"), template=True)
    assert example is not None and example.completions == ["good", "bad"]
    assert example.prompt == [USER, {"role": "assistant", "content": "I said Human: hi"}, MORE]
    plain = preference_example(row(chosen=HH + " good\n", rejected=HH + " bad"), Reading("preference"))
    assert plain is not None and plain.completions == [" good\n", " bad"]  # a base model sees the text as it is
    text = preference_example(row(prompt="x", chosen="good", rejected="bad"), Reading("preference"), template=True)
    assert text is not None and text.prompt == "x"


LLAMA_SMALL = {"significantly better": 1.0, "better": 2 / 3, "slightly better": 1 / 3, "negligibly better": 0.0}


@pytest.mark.parametrize(
    ("columns", "margins", "margin"),
    [
        ({"margin": 2}, None, 2.0),
        ({"margin": None, "strength": "better"}, LLAMA_SMALL, 2 / 3),
        ({"strength": 3}, {"3": 0.5}, 0.5),
        ({"preference": 1.25}, {"preference": 4.0}, 2.0),  # |2 * 1.25 - 3| = 0.5 of a sure verdict
        ({"preference": 2}, {"preference": 4.0}, 4.0),
        ({"preference": 2}, LLAMA_SMALL, None),
    ],
)
def test_margins(columns: dict[str, Any], margins: dict[str, float] | None, margin: float | None) -> None:
    answers = {"output_1": "a", "output_2": "b"} if "preference" in columns else {"chosen": "a", "rejected": "b"}
    example = preference_example(row(prompt="x", **answers, **columns), Reading("preference"), margins=margins)
    assert example is not None and example.margin == margin


PAIR = {"chosen": "a", "rejected": "b"}
BROKEN: list[tuple[dict[str, Any], str]] = [
    (
        {"prompt": "x", "chosen": "a"},
        "found the columns prompt, chosen; looked for a prompt .* with one of: chosen [+] rejected, completions",
    ),
    ({"prompt": "y", "instruction": "x", **PAIR}, "column 'instruction' .* has no use for it"),
    (
        {"prompt": "x", **PAIR, "score_chosen": 1, "score_rejected": 5},
        r"rejected answer scores 5 .* chosen one only 1 ",
    ),
    ({"prompt": "x", **PAIR, "score_chosen": 1}, "column 'score_chosen' .* has no use for it"),
    ({"x": "q", "y_w": "a", "y_l": "b"}, r"--data.columns '\{prompt: x, chosen: y_w, rejected: y_l\}'"),
    ({"prompt": "q", "good": "a", "bad": "b"}, r"--data.columns '\{chosen: good, rejected: bad\}'"),
    ({"prompt": "q", "completion": "a"}, "map others with data.columns$"),
    (
        {"instruction": "x", "input": "", "output_1": "a", "output_2": "b"},
        "found the columns instruction, input, output_1, output_2; looked for",
    ),
    (
        PAIR,
        r"there is no prompt, and chosen is not a transcript that starts with '\\n\\nHuman:'; name the column of the "
        r"prompt",
    ),
    ({"prompt": True, **PAIR}, "column 'prompt' holds a bool, text or a list of messages was expected"),
    ({"prompt": "x", "chosen": "a", "rejected": " \n"}, "rejected is empty$"),
    (
        {"prompt": "x", "chosen": True, "rejected": "b"},
        "chosen is a bool; the answers must all be text or all be messages",
    ),
    ({"prompt": "x", "chosen": "a", "rejected": None}, "rejected is a NoneType; the answers must all be text"),
    (
        {"prompt": "x", "chosen": "a", "rejected": [BAD]},
        "rejected is a list; the answers must all be text or all be messages",
    ),
    (
        {"prompt": "x", "chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, BAD]},
        "chosen must be one assistant .* assistant, user, assistant$",
    ),
    (
        {"prompt": "y", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "chosen must be one assistant turn behind the prompt, and it is: user, as",
    ),
    (
        {"prompt": [USER], "chosen": [USER], "rejected": [BAD]},
        "chosen must be one assistant turn behind the prompt, and it is: nothing",
    ),
    (
        {"chosen": [USER, GOOD], "rejected": [MORE, BAD]},
        "chosen must be one assistant turn behind the prompt, and it is: user, assistant",
    ),
    ({"chosen": [], "rejected": []}, "chosen must be one assistant turn behind the prompt, and it is: nothing"),
    (
        {"chosen": HH + "a\n\nHuman: on\n\nAssistant: b", "rejected": HH + "c"},
        "chosen must be one .* it is: assistant, user, assistant",
    ),
    (
        {"chosen": [USER, {"role": "assistant"}], "rejected": [USER, BAD]},
        "chosen, message 1, must have a role and a content",
    ),
    ({"chosen": [USER, "a"], "rejected": [USER, BAD]}, "chosen, message 1, must have a role and a content"),
    (
        {"conversations": [{"from": "bot", "value": "x"}], **PAIR},
        "conversations, message 0, has the role 'bot'; known are user, human",
    ),
    (
        {"prompt": [{"role": "user", "content": [{"type": "image", "url": "u"}]}], **PAIR},
        "prompt, message 0, has a content part that is not text",
    ),
    *(
        (
            {"conversation_a": [USER, GOOD], "conversation_b": [USER, BAD], "winner": "model_a", "turn": turn},
            "column 'turn' holds .*, the number of an answer in both conversations was expected, 1 to 1$",
        )
        for turn in (-1, 1.5, 0, 2, "first", True)
    ),
    ({"prompt": "x", "completions": ["a"]}, "completions must be a list of at least two"),
    (
        {"prompt": "x", "completions": ["a", "b"], "ranks": [0]},
        "ranks must hold one number for each of the 2 completions",
    ),
    ({"prompt": "x", "completions": ["a", "b"], "scores": [1, None]}, "scores must hold one number for each of the 2"),
    (
        {"prompt": "x", "completions": [{"completion": "a", "rank": 0}, {"completion": "b"}]},
        "rank must hold one number for each of the 2",
    ),
    (
        {"prompt": "x", "completions": ["a", "b"], "labels": [True, False]},
        "completions with labels are steps of one answer",
    ),
    ({"prompt": "x", "output_1": "a", "output_2": "b", "label": 3}, "column 'label' holds 3, expected 1, 2 or between"),
    (
        {"prompt": "x", "output_1": "a", "output_2": "b", "label": "garbage"},
        "column 'label' holds 'garbage', expected 1, 2",
    ),
    ({"prompt": "x", "output_1": "a", "output_2": "b", "label": True}, "column 'label' holds True, expected 1, 2"),
    ({"prompt": "x", "completion": "a", "label": 2}, "column 'label' holds 2, expected true"),
    (
        {"prompt": "x", **PAIR, "system": "s"},
        "column 'system' cannot be written into a plain text prompt; set data.chat: true",
    ),
    (
        {"messages": [GOOD, USER], "label": True},
        "messages must be one assistant turn behind the prompt, and it is: user",
    ),
    ({"prompt": "x", **PAIR, "margin": "big"}, "column 'margin' holds 'big', a number was expected"),
    (
        {"prompt": "x", **PAIR, "strength": "huge"},
        "no margin for strength 'huge'; margins names significantly better, better",
    ),
]


@pytest.mark.parametrize(("columns", "message"), BROKEN)
def test_broken_rows_say_where_in_one_sentence(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^data.jsonl:3: .*{message}") as raised:
        preference_example(row(**columns), Reading("preference"), margins=LLAMA_SMALL)
    assert "\n" not in str(raised.value)


def test_mapping_knows_its_names() -> None:
    with pytest.raises(ValueError, match="columns maps unknown names best.*; the names on the left may be annotator1"):
        PreferenceDataModule(tiny_tokenizer(), "a.jsonl", columns={"best": "chosen"})


def test_dense_ranks() -> None:
    assert dense_ranks([3.0, 1.0, 3.0, -2.5]) == [2, 1, 2, 0]


FILES: list[tuple[str, int, int, list[int]]] = [  # name, examples, ties, bad rows (0-based)
    ("hh-rlhf/harmless-base/test.jsonl.gz", 1614, 0, [86, 516, 925, 1103, 1254]),
    ("llama-factory/dpo_en_demo.json", 140, 0, []),
    ("llama-factory/dpo_zh_demo.json", 84, 0, []),
    ("llama-factory/kto_en_demo.json", 140, 0, []),
    ("llama-factory/v1_dpo_demo.jsonl", 7, 0, []),
    ("llmbar/LLMBar/Natural/dataset.json", 70, 0, []),
    ("llmbar/LLMBar/Adversarial/GPTInst/dataset.json", 65, 0, []),
    ("llmbar/LLMBar/Adversarial/GPTOut/dataset.json", 33, 0, []),
    ("llmbar/LLMBar/Adversarial/Manual/dataset.json", 33, 0, []),
    ("llmbar/LLMBar/Adversarial/Neighbor/dataset.json", 94, 0, []),
    ("llmbar/CaseStudy/Constraint/dataset.json", 63, 0, []),
    ("torchtune/hh_rlhf_tiny.json", 1, 0, []),
    ("torchtune/stack_exchange_paired_tiny.json", 18, 0, []),
    ("nc-alpaca-eval/alpaca-7b/alpaca_eval_gpt4/annotations.json", 207, 3, []),
    ("nc-alpaca-eval/gpt4/alpaca_eval_gpt4/annotations.json", 208, 2, []),
    ("nc-alpaca-eval/phi-2/alpaca_eval_gpt4/annotations.json", 201, 7, [131, 209]),
    ("nc-alpaca-eval/gemma-2b-it/weighted_alpaca_eval_gpt4_turbo/annotations.json", 42, 0, []),
    ("nc-alpaca-eval/cohere/alpaca_eval_cot_gpt4_turbo_fn/annotations.json", 28, 0, []),
]


def shared(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"the public files of {name.partition('/')[0]} are not here")
    return DATA / name


def raw(name: str) -> list[dict[str, Any]]:
    path = shared(name)
    text = gzip.decompress(path.read_bytes()).decode() if name.endswith(".gz") else path.read_text(encoding="utf-8")
    return json.loads(text) if ".jsonl" not in name else [json.loads(line) for line in text.split("\n") if line]


def read(rows: list[Row], template: bool = True) -> tuple[list[PreferenceExample], int, list[int]]:
    examples, ties, bad = [], 0, []
    for index, each in enumerate(rows):
        try:
            example = preference_example(each, Reading("preference"), template)
        except ValueError as error:
            bad += [index] * (str(error).startswith(each.origin) and "\n" not in str(error))
            continue
        ties += example is None
        examples += [example] if example else []
    return examples, ties, bad


def answers(record: dict[str, Any]) -> list[str]:
    """Return the better and the worse answer of a raw record, by rules written here for each file."""
    if "preference" in record or "output_1" in record:
        pair = [record["output_1"], record["output_2"]]
        return pair if record["preference" if "preference" in record else "label"] < 1.5 else pair[::-1]
    if "response_j" in record:
        return [record["response_j"], record["response_k"]]
    if "chosen_messages" in record:
        return [record[f"{side}_messages"][-1]["content"][0]["value"] for side in ("chosen", "rejected")]
    if "messages" in record:
        return [record["messages"][-1]["content"]]
    sides = [record["chosen"], record["rejected"]]
    if isinstance(sides[0], str):
        return [side[side.rindex("\n\nAssistant:") + 12 :].strip() for side in sides]
    return [side[-1]["content"] if isinstance(side, list) else side["value"] for side in sides]


@pytest.mark.parametrize(("name", "count", "ties", "bad"), FILES)
def test_public_files(name: str, count: int, ties: int, bad: list[int]) -> None:
    records = raw(name)
    examples, found_ties, found_bad = read(Files(str(shared(name))).rows())
    assert (len(examples), found_ties, found_bad) == (count, ties, bad) and count + ties + len(bad) == len(records)
    good = [
        record
        for index, record in enumerate(records)
        if index not in bad and record.get("preference", 1) not in (0, None)
    ]
    for example, record in ((examples[0], good[0]), (examples[-1], good[-1])):
        assert [
            example.completions[index] for index in sorted(range(len(example.ranks)), key=lambda k: example.ranks[k])
        ] == answers(record)
        assert isinstance(example.prompt, list if "torchtune/stack" not in name else str)
        for text in example.completions:  # what the model is to learn decodes to the answer and one end of turn
            tokens = encode_example(tiny_tokenizer(), example.prompt, text, example.origin)
            learned = [token for token, kept in zip(tokens.ids, tokens.supervised, strict=True) if kept]
            assert tiny_tokenizer().decode(learned) == text + (
                "<|im_end|>" if isinstance(example.prompt, list) else "<|eos|>"
            )


def test_transcripts_of_a_base_model_are_the_files_bytes() -> None:
    records = raw("hh-rlhf/harmless-base/test.jsonl.gz")
    for index in (0, 700, len(records) - 1):
        example = preference_example(Row(records[index], "hh:1", "hh"), Reading("preference"))
        assert example is not None and isinstance(example.prompt, str) and example.prompt.endswith("\n\nAssistant:")
        assert [example.prompt + text for text in example.completions] == [
            records[index]["chosen"],
            records[index]["rejected"],
        ]


def test_pandalm_and_its_judges() -> None:
    records = raw("pandalm/testset-v1.json")
    examples, ties, bad = read(Files(str(shared("pandalm/testset-v1.json"))).rows())
    broken = [
        r
        for r in records
        if any(not isinstance(r[name], str) or not r[name].strip() for name in ("response1", "response2"))
    ]
    assert (len(examples), ties, len(bad)) == (612, 63, 52)  # 612 + 63 + 52 = 727
    assert all(
        records[index] in broken for index in bad
    )  # the 6 booleans and the empty answers that were not called ties
    assert {157, 158, 159, 161, 162, 164} <= {records[index]["idx"] for index in bad}
    assert examples[0].completions == [records[0]["response1"], records[0]["response2"]]
    for name, verdict in (("gpt-3.5-turbo-testset-v1", "gpt_result"), ("pandalm-7b-testset-v1", "pandalm_result")):
        judged = {record["idx"]: record[verdict] for record in raw(f"pandalm/{name}.json")}
        without = [{key: value for key, value in record.items() if "annotator" not in key} for record in records]
        rows = [
            Row({**record, "label": judged[record["idx"]]}, f"{name}#{i}", name)
            for i, record in enumerate(without)
            if record not in broken
        ]
        whole = [
            row
            for row in rows
            if isinstance(row.columns["response1"], str) and row.columns["response1"] and row.columns["response2"]
        ]
        found, num_ties, garbage = read([row for row in whole if isinstance(row.columns["response2"], str)])
        labels = Counter(str(row.columns["label"]) for row in whole if isinstance(row.columns["response2"], str))
        assert (len(found), num_ties, len(garbage)) == (
            labels["1"] + labels["2"],
            labels["Tie"] + labels["0"],
            labels["garbage"],
        )
        assert (labels["garbage"] > 0) == (verdict == "gpt_result")


def test_vicuna_reviews_are_scores_of_two_answers() -> None:
    folder = "fastchat/vicuna_gpt4_review"
    questions = {record["question_id"]: record["text"] for record in raw(f"{folder}/question.jsonl")}
    texts = {
        r["answer_id"]: r["text"]
        for name in ("gpt35", "vicuna-13b", "llama-13b")
        for r in raw(f"{folder}/answer/answer_{name}.jsonl")
    }
    reviews = [r for name in ("gpt35", "llama-13b") for r in raw(f"{folder}/review/review_{name}_vicuna-13b.jsonl")]
    rows = [
        Row(
            {
                "question": questions[r["question_id"]],
                "completions": [texts[r["answer1_id"]], texts[r["answer2_id"]]],
                "scores": r["score"],
            },
            "v:1",
            "v",
        )
        for r in reviews
    ]
    examples, ties, bad = read(rows)
    assert (len(examples), ties, bad) == (96, 16, [])  # 112 reviews
    assert examples[0].ranks == [0, 1] and reviews[0]["score"] == [9.0, 8.5]


@pytest.mark.parametrize(
    "name",
    [
        "nc-alpaca-farm/outputs_pairs.json",
        "nc-alpaca-farm/outputs_sft.json",
        "nc-alpaca-farm/outputs_rlhf.json",
        "nc-alpaca-farm/outputs_baseline.json",
        "nc-alpaca-farm/multisamples_sft.json",
        "llama-factory/glaive_toolcall_en_demo.json",
        "llama-factory/identity.json",
        "llama-factory/v1_sft_demo.jsonl",
        "llama-factory/reason_tool_use_demo_50.jsonl",
        "fastchat/dummy_conversation.json",
        "fastchat/mt_bench/question.jsonl",
        "fastchat/mt_bench/reference_answer/gpt-4.jsonl",
        "torchtune/chat_tiny.json",
        "torchtune/instruct_tiny.json",
    ],
)
def test_files_without_a_preference_are_refused_in_one_sentence(name: str) -> None:
    first = Files(str(shared(name))).rows()[0]
    with pytest.raises(
        ValueError,
        match=re.escape(f"{first.origin}: found the columns {', '.join(first.columns)}; looked for a prompt"),
    ):
        preference_example(first, Reading("preference"))
