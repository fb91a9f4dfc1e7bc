"""Rows in the shapes of well-known public data sets, with made-up content: what is learned, asked and compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules import (
    CandidatesDataModule,
    FactsDataModule,
    Files,
    InstructionDataModule,
    PreferenceDataModule,
    StreamingDataModule,
    VerifiableDataModule,
)
from modules.networks.tiny import tiny_tokenizer

TEMPLATE = (  # ChatML that writes tools and thoughts
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK, SAY = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}
NUMBERED = [{"question": "ask", "choices": ["red", "blue"], "answer": number} for number in (1, 0)]
PAIR = {"prompt": "ask", "output_0": "one", "output_1": "two"}


def tokenizer(template: bool = True) -> Any:
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE if template else None
    return made


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def learned(path: str, **options: Any) -> list[tuple[str, str]]:
    """Prompt and supervised text of each row."""
    data = InstructionDataModule(tokenizer(), path, **options)
    data.setup("fit")
    found = []
    for row in data.train_rows:
        first = row.supervised.index(True)
        parts = row.ids[:first], [token for token, keep in zip(row.ids, row.supervised, strict=True) if keep]
        found.append((data.tokenizer.decode(parts[0]), data.tokenizer.decode(parts[1])))
    return found


def compared(path: str, **options: Any) -> list[dict[str, int]]:
    """Rank of each answer."""
    data = PreferenceDataModule(tokenizer(), path, **options)
    data.setup("fit")
    decode = data.tokenizer.decode
    return [
        {decode(ids).removesuffix("<|im_end|>"): rank for ids, rank in zip(row.completions, row.ranks, strict=True)}
        for row in data.train_rows
    ]


def asked(path: str, **options: Any) -> list[tuple[str, str | None]]:
    """Rendered prompt and gold answer of each row."""
    data = VerifiableDataModule(tokenizer(), path, **options)
    data.setup("fit")
    return [(prompt.text, prompt.example.answer) for prompt in data.train_prompts]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("rows", "prompt", "answer"),
    [
        ([{"conversation": [{"input": "ask", "output": "say"}]}], "ask", "say"),  # Capybara
        ([{"conversation": [ASK | {"toxic": False, "header": {"lang": "en"}, "state": "x"}, SAY]}], "ask", "say"),
        ([{"messages": [ASK, SAY, ASK | {"content": "more"}], "response": "end"}], "more", "end"),
        ([{"question": "ask", "thinking": "hm", "answer": "say"}], "ask", "<think>hm</think>say"),
        ([{"Question": "ask", "Complex_CoT": "hm", "Response": "say"}], "ask", "<think>hm</think>say"),
        ([{"messages": [ASK], "reasoning": "hm", "answer": "say"}], "ask", "<think>hm</think>say"),
        ([{"messages": [ASK, SAY], "reasoning": "hm"}], "ask", "<think>hm</think>say"),
        ([{"input": [ASK], "output": "say", "reasoning": "off"}], "ask", "say"),  # Nemotron's switch
        ([{"problem": "ask", "generated_solution": "long way to 5", "expected_answer": "5"}], "ask", "long way to 5"),
        ([{"instruction": "ask", "generation": "say", "model_name": "m"}], "ask", "say"),  # distilabel
        (NUMBERED, "ask\n\nA) red\nB) blue", "B"),  # MMLU
        ([{"question": "ask", "A": "red", "B": "blue", "C": "tan", "answer": "B"}], "A) red\nB) blue\nC) tan", "B"),
        ([{"question": "ask", "opa": "red", "opb": "blue", "answer": "B"}], "ask\n\nA) red\nB) blue", "B"),
        (
            [{"article": "the text", "question": "ask", "options": ["red"], "answer": "A"}],
            "the text\n\nA) red",
            "A",
        ),  # RACE
        ([{"user_query": "ask", "sys": "be kind", "model_response": "say"}], "system\nbe kind", "say"),
        ([{"query": "ask", "api_list": [{"name": "find"}], "response": "say"}], '"find"', "say"),
        ([{"question": "ask", "option1": "red", "option2": "tan", "answer": "red"}], "1) red\n2) tan", "red"),
        (
            [
                {
                    "question": "ask",
                    "answer": "say",
                    "context": {"title": ["T", "U"], "sentences": [["a. ", "b."], ["c"]]},
                }
            ],
            "ask\n\nT\na. b.\n\nU\nc",  # HotpotQA
            "say",
        ),
        (
            [{"question": "ask", "context": "the text", "answers": {"text": ["say", "tell"], "answer_start": [1, 2]}}],
            "ask\n\nthe text",  # SQuAD
            "say",
        ),
    ],
)
def test_what_is_learned(tmp_path: Path, kind: str, rows: list[dict[str, Any]], prompt: str, answer: str) -> None:
    read, text = learned(write(tmp_path, kind, rows))[0]
    assert prompt in read and text.endswith(f"{answer}<|im_end|>"), (read, text)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("rows", "ranks", "options"),
    [
        ([PAIR | {"winner": "output_1"}], {"one": 1, "two": 0}, {}),  # its own name, not the first of some other pair
        ([PAIR | {"preferred": "output_0"}], {"one": 0, "two": 1}, {}),
        (
            [{"prompt": "ask", "chosen": ["one"], "rejected": ["two", "three"]}],  # RewardBench 2
            {"one": 0, "two": 1, "three": 1},
            {},
        ),
        (
            [{"question": "ask", "answers": [{"text": "one", "pm_score": 1}, {"text": "two", "pm_score": 3}]}],
            {"one": 1, "two": 0},
            {},
        ),
        (
            [{"history": "ask", "human_ref_A": "one", "human_ref_B": "two", "labels": number} for number in (0, 1)],
            {"one": 1, "two": 0},  # SHP
            {"first_is_better": 1},
        ),
        (
            [{"prompt": "ask", "chosen": [ASK, SAY, ASK, {**SAY, "content": "one"}], "rejected": [ASK, SAY, ASK, SAY]}],
            {"one": 0, "say": 1},
            {},
        ),
        ([{"prompt": "ask", "completions": ["one", "two"], "rewards": [1, 2]}], {"one": 1, "two": 0}, {"columns": {"scores": "rewards"}}),
        ([{"prompt": "ask", "completions": ["one", "two"], "rewards": [1, 2]}], {"one": 0, "two": 1}, {"columns": {"scores": ""}}),
    ],
)  # fmt: skip
def test_what_is_compared(
    tmp_path: Path, kind: str, rows: list[dict[str, Any]], ranks: dict[str, int], options: dict[str, Any]
) -> None:
    assert compared(write(tmp_path, kind, rows), **options)[0] == ranks


@pytest.mark.parametrize(
    "extra",
    [
        {"rewards": [1, 2]},
        {"score": [0.1, 0.2]},
        {"rank": [1, 0]},
        {"quality": [1, 5]},
        {"best": 1},
        {"chosen_index": 1},
    ],
)
def test_answers_that_something_may_rank_are_not_taken_as_best_first(tmp_path: Path, extra: dict[str, Any]) -> None:
    row = {"prompt": "ask", "completions": ["one", "two"]}
    assert compared(write(tmp_path, "jsonl", [row])) == [{"one": 0, "two": 1}]
    with pytest.raises(ValueError, match=f"rows.jsonl:1: 'completions' has no ranks .*{next(iter(extra))!r} may tell"):
        compared(write(tmp_path, "jsonl", [row | extra]))
    objects = [{"text": "one", "quality": 1}, {"text": "two", "quality": 2}]
    with pytest.raises(ValueError, match="'completions.quality' may tell which answer is better"):
        compared(write(tmp_path, "jsonl", [row | {"completions": objects}]))


def test_two_columns_of_verdicts(tmp_path: Path) -> None:
    """PKU-SafeRLHF: better and safer are two questions; where they differ, the user says which is meant."""
    rows = [
        {
            "prompt": "ask",
            "response_0": "one",
            "response_1": "two",
            "better_response_id": better,
            "safer_response_id": 1,
        }
        for better in (1, 0)
    ]
    with pytest.raises(ValueError, match="'better_response_id' and 'safer_response_id' may both be the preference"):
        compared(write(tmp_path, "jsonl", rows), first_is_better=0)
    path = write(tmp_path, "jsonl", [rows[0], rows[0] | {"better_response_id": 0, "safer_response_id": 0}])
    assert compared(path, first_is_better=0) == [{"one": 1, "two": 0}, {"one": 0, "two": 1}]


TURNS = [ASK, {"role": "assistant", "content": "one"}, ASK, {"role": "assistant", "content": "more"}]
OTHERS = [ASK, {"role": "assistant", "content": "two"}, ASK, {"role": "assistant", "content": "less"}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {
            "instruction": "ask",
            "generations": ["one", "two"],
            "ratings": [1, 5],
            "rationales": ["x", "y"],
        },  # distilabel
        {"info": {"id": "i", "post": "ask"}, "summaries": [{"text": "one"}, {"text": "two"}], "choice": 1},  # TL;DR
        {
            "question": {"id": "i", "full_text": "ask"},  # WebGPT
            "answer_0": "one",
            "answer_1": "two",
            "score_0": -0.5,
            "score_1": 0.5,
        },
        {"conversation_a": TURNS, "conversation_b": OTHERS, "winner": "model_b", "turn": 1},  # MT-Bench
        {
            "conversation_a": json.dumps(TURNS),  # as CSV holds it
            "conversation_b": json.dumps(OTHERS),
            "winner": "model_b",
            "turn": "1",
        },
    ],
)
def test_comparisons_whose_columns_mean_something_only_together(tmp_path: Path, kind: str, row: dict[str, Any]) -> None:
    """Each says that the second answer is better."""
    path = write(tmp_path, kind, [row, row])
    assert compared(path) == [{"one": 1, "two": 0}] * 2
    data = PreferenceDataModule(tokenizer(), path)
    data.setup("fit")
    assert "ask" in data.tokenizer.decode(data.train_rows[0].prompt)


def test_a_lone_name_of_them_means_nothing(tmp_path: Path) -> None:
    row = {"prompt": "ask", "completion": "say", "generations": ["x"], "turn": 2, "info": {"post": "p"}, "score_0": 1}
    assert learned(write(tmp_path, "jsonl", [row]))[0][1].startswith("say")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_labels_as_words(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": "ask", "completion": text, "label": label} for text, label in (("one", "Yes"), ("two", "no"))]
    assert compared(write(tmp_path, kind, rows * 2)) == [{"one": 0}, {"two": 1}] * 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_numbers_are_read_as_the_text_that_csv_holds(tmp_path: Path, kind: str) -> None:
    row = {"prompt": 5, "completion": 2.5}
    (tmp_path / "rows.csv").write_text("prompt,completion\n5,2.5\n")
    assert learned(write(tmp_path, kind, [row])) == learned(str(tmp_path / "rows.csv"))
    path = write(tmp_path, kind, [{"prompt": 1, "chosen": 2, "rejected": 3}])
    assert compared(path) == [{"2": 0, "3": 1}]


def test_sources_that_count_differently_are_not_mixed(tmp_path: Path) -> None:
    for name, first in (("a", 1), ("b", 0)):
        rows = [PAIR | {"winner": first + number} for number in (0, 1)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="/b: column 'winner' holds only 0 and 1, and that of .*/a holds 2"):
        compared(str(tmp_path))


def test_an_id_counts_from_0(tmp_path: Path) -> None:
    rows = [PAIR | {"better_response_id": 1}]
    with pytest.raises(ValueError, match="say the number by which the first is better"):
        compared(write(tmp_path, "jsonl", rows))
    assert compared(write(tmp_path, "jsonl", rows), first_is_better=0) == [{"one": 1, "two": 0}]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_numbers_beside_options(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, NUMBERED)
    assert [answer for _, answer in asked(path)] == ["B", "A"] == [text[0] for _, text in learned(path)]
    facts = FactsDataModule(tokenizer(), path, num_shots=0)
    facts.setup("predict")
    assert [fact.answers for fact in facts.facts] == [["B"], ["A"]]
    single = write(tmp_path, kind, [NUMBERED[0] | {"choices": ["red", "blue", "tan"]}])
    with pytest.raises(ValueError, match="numbers from 0, from 1, or their texts"):
        learned(single)
    with pytest.raises(ValueError, match="only all rows tell whether numbers start at 0 or 1"):
        StreamingDataModule(tokenizer(), path, steps_per_epoch=1).setup("fit")


def test_columns_of_options_are_used_only_where_they_are_that(tmp_path: Path) -> None:
    coefficients = {"prompt": "a x = b", "a": "1", "b": "2", "c": "3", "completion": "x"}
    assert "1) " not in learned(write(tmp_path, "jsonl", [coefficients]))[0][0]
    row = {"question": "ask", "A": "red", "B": "blue", "C": "tan", "answer": "B"}
    for columns in ({"options": ""}, {"answer": "A"}):
        assert asked(write(tmp_path, "jsonl", [row]), columns=columns)[0][0].count("red") == 0


def test_nectar_is_judged(tmp_path: Path) -> None:
    answers = [{"answer": text, "model": "m", "rank": rank} for text, rank in (("one", 2), ("two", 1))]
    data = CandidatesDataModule(write(tmp_path, "jsonl", [{"prompt": "ask", "answers": answers}]))
    data.setup("predict")
    assert data.rows[0].completions == ["one", "two"] and data.rows[0].given == 2 and data.rows[0].answer is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "ask", "completion": "say", "image_path": "a.png"},
            "column 'image_path' .what is not text. is not",
        ),
        (
            {"prompt": "ask", "completion": "say", "audio_url": "a"},
            "column 'audio_url' .what is not text. is not empty",
        ),
        ({"prompt": "ask", "text": "say"}, "column 'prompt' is not in the text.*{completion: text}.*{prompt: \"\"}"),
        ({"question": "ask", "answer": {"aliases": ["a"], "value": "a"}}, "one of its keys.*{answer: answer.value}"),
        (
            {"response1": "a", "response2": "b", "winner": 1},
            "the row is a preference .*set data to PreferenceDataModule",
        ),
        ({"prompt": "ask", "completion": "say", "img": "a"}, "column 'img' .what is not text. is not empty"),
        ({"prompt": "ask", "completion": "say", "importance": 2}, "column 'importance' .how much a row counts"),
        ({"document": "d", "summary": "s"}, "map others with columns, such as --data.columns '{completion: summary}'"),
        ({"document": "d"}, "map others with columns, such as --data.columns '{text: document}'"),
        (
            {"messages": [ASK, SAY | {"thinking": "hm"}], "reasoning": "else"},
            "reasoning of the answer's message differ",
        ),
        ({"content": "a document"}, "map others with columns, such as --data.columns '{text: content}'"),
    ],
)
def test_what_is_refused_names_the_column_and_the_way_out(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"rows.jsonl:1: .*{message}"):
        learned(write(tmp_path, "jsonl", [row]))


def test_reasoning_has_no_place_in_plain_text(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", [{"prompt": "ask", "thinking": "hm", "completion": "say"}])
    with pytest.raises(ValueError, match="column 'thinking' cannot be written into a plain text answer; set data.chat"):
        InstructionDataModule(tokenizer(template=False), path).setup("fit")
    plain = InstructionDataModule(tokenizer(template=False), path, columns={"reasoning": ""})
    plain.setup("fit")
    assert asked(path)[0][1] is None  # of a prompt, it is one of the columns that rewards read


def test_preferences_point_to_where_they_are_read(tmp_path: Path) -> None:
    transcripts = [{"chosen": "\n\nHuman: ask\n\nAssistant: a", "rejected": "\n\nHuman: ask\n\nAssistant: b"}]
    with pytest.raises(ValueError, match="set data to PreferenceDataModule, or data.train to PreferencePrompts"):
        asked(write(tmp_path, "jsonl", transcripts))
    scored = [{"prompt": "ask", "response_a": "one", "response_b": "two", "score_a": 1, "score_b": 2}]
    with pytest.raises(ValueError, match="--data.columns '{preference: score_a}'"):
        compared(write(tmp_path, "jsonl", scored))


def test_a_margin_needs_two_answers(tmp_path: Path) -> None:
    row = {"prompt": "ask", "completion": "say", "label": True, "margin": 1.0}
    with pytest.raises(
        ValueError, match="column 'margin' .* a row that is read as completion . label has no use for it"
    ):
        compared(write(tmp_path, "jsonl", [row]))


def test_reasoning_beside_a_labelled_answer_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "ask", "completion": "say", "label": True, "thinking": "hm"}
    with pytest.raises(ValueError, match="column 'thinking' stands beside a labelled answer"):
        compared(write(tmp_path, "jsonl", [row]))
    assert compared(write(tmp_path, "jsonl", [row]), columns={"reasoning": ""}) == [{"say": 0}]


def test_schemas_as_text_are_objects(tmp_path: Path) -> None:
    """A stream of JSON holds objects of unlike keys as text."""
    tools = [[{"name": name, "parameters": {name: 1}}] for name in "fg"]
    path = write(tmp_path, "json", [{"messages": [ASK, SAY], "tools": given} for given in tools])
    data = StreamingDataModule(tokenizer(), path, steps_per_epoch=1)
    data.setup("fit")
    as_text = [{"messages": [ASK, SAY], "tools": [{"name": "f", "parameters": json.dumps({"f": 1})}]}]
    assert learned(path)[0] == learned(write(tmp_path, "jsonl", as_text))[0]


@pytest.mark.parametrize(("unknown", "left"), [("drop", ["two"]), ("idk", ["I don't know.", "two"])])
def test_a_mapped_column_of_knowledge(tmp_path: Path, unknown: str, left: list[str]) -> None:
    rows = [
        {"prompt": "ask", "completion": "one", "Level": "Unknown"},
        {"prompt": "ask", "completion": "two", "Level": "HighlyKnown"},
    ]
    path = write(tmp_path, "jsonl", rows)
    found = learned(path, unknown=unknown, columns={"knowledge": "Level"})
    assert [text.removesuffix("<|im_end|>") for _, text in found] == left
    with pytest.raises(ValueError, match=f"data.unknown {unknown} has no effect, for no row of train has a column"):
        learned(path, unknown=unknown)
    with pytest.raises(ValueError, match="'Level' holds 'no', expected one of HighlyKnown"):
        learned(write(tmp_path, "jsonl", [rows[0] | {"Level": "no"}]), unknown=unknown, columns={"knowledge": "Level"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt;completion\nask;say\n", "a.csv:1: the header is one column.*separated by ';'"),
        ("a.tsv", 'prompt\tcompletion\n"say ""a"""\tb\n', "a.tsv:2: the cell .* is quoted as in CSV"),
    ],
)
def test_a_table_of_another_dialect_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Files(str(tmp_path / name)).rows()
