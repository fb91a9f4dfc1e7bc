"""Self-Instruct: reading lists of tasks, what a request shows, and that tasks depend only on the answers and their
order.
"""

import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from datamodules.predict.seed_tasks import SeedTasksDataModule
from datamodules.verifiable import VerifiableDataModule
from modules.networks.tiny import tiny_tokenizer
from modules.predict.instruction_filter import InstructionPool
from modules.predict.self_instruct import SelfInstructModule, keep_new_tasks, read_list, write_task
from modules.rewards.chat.clients import HttpChat
from modules.rewards.chat.protocol import ChatClient, Conversation

SEEDS = [
    {"instruction": f"seed {word} task number {n}", "input": "x" * (n % 2), "output": f"o{n}"}
    for n, word in enumerate(["one", "two", "three", "four"])
]
LIST = """Here you are:
4. Instruction: Name three rivers of Asia.
4. Input:
<noinput>
4. Output:
Yangtze,

1. Mekong, Ob
###
5. Instruction: Put the words
in order, please.
5. Input: b a
5. Output: a b
  ###
6. Instruction: Tell me a joke about tea.
6. Input:
<NoInput>
6. Output:
Cut off in the"""


def texts(number: int) -> str:
    """Write ten tasks with words drawn by the number; every third is short, and the last is cut off."""
    draw = random.Random(number)
    items = [" ".join(f"w{draw.randrange(60)}" for _ in range(3 if item % 3 == 2 else 6)) for item in range(10)]
    return (
        "".join(
            f"{item}. Instruction: {text}\n{item}. Input:\n<noinput>\n{item}. Output:\nfine\n###\n"
            for item, text in enumerate(items, 4)
        )
        + "14. Ins"
    )


class Author(ChatClient):
    """A client that writes another list for every conversation."""

    identity = "author"

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Conversation] = []

    def complete(self, conversations: Sequence[Conversation]) -> list[str | None]:
        self.asked += conversations
        self.counts["requests"] += len(conversations)
        return [texts(zlib.crc32(conversation[-1]["content"].encode())) for conversation in conversations]


def seeds_file(folder: Path, rows: list[dict[str, Any]] = SEEDS) -> str:
    (folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "seeds.jsonl")


def grow(folder: Path, client: ChatClient, rows: list[dict[str, Any]] = SEEDS, **settings: Any) -> SelfInstructModule:
    module = SelfInstructModule(client, **{"num_instructions": 50, **settings})
    data = SeedTasksDataModule(seeds_file(folder, rows))
    Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False).predict(
        module, data
    )
    return module


def tasks(module: SelfInstructModule) -> list[Any]:
    return [task for one in module.rounds for task in one["accepted"]]


def test_reading_a_list() -> None:
    found, unusable = read_list(LIST)
    assert found == [
        ("Name three rivers of Asia.", "", "Yangtze,\n\n1. Mekong, Ob"),
        ("Put the words\nin order, please.", "b a", "a b"),
    ]
    assert unusable == {"unfinished": 1}
    assert len(read_list(LIST + " cup.\n###")[0]) == 3  # now the last one is whole
    assert read_list(LIST + " cup.\n###\n")[1] == {}
    assert read_list("<think>\n4. Instruction: no\n###\n</think>" + LIST)[0] == found


@pytest.mark.parametrize(
    ("answer", "unusable"),
    [
        ("", {}),
        ("###\n\n###", {}),
        ("I cannot do that.", {"unfinished": 1}),
        ("4. Instruction: a\n4. Output: b\n###", {"malformed": 1}),  # no input
        (
            "4. Instruction: a\n4. Input: b\n4. Output: c\n5. Instruction: d\n5. Input: e\n5. Output: f\n###",
            {"malformed": 1},
        ),  # no line between them
        ("4. Output: a\n4. Input: b\n4. Instruction: c\n###\nhm\n###\n", {"malformed": 2}),
        ("4. Instruction: a\n4. Input: b\n4. Output: ## c ### d", {"unfinished": 1}),  # a line of its own ends a task
    ],
)
def test_what_is_no_task(answer: str, unusable: dict[str, int]) -> None:
    assert read_list(answer) == ([], unusable)


def test_half_a_character_is_replaced() -> None:
    ((instruction, _, _),) = read_list("4. Instruction: a \ud83d b\n4. Input: <noinput>\n4. Output: c\n###")[0]
    assert instruction == "a ? b"


def test_tasks_are_taken_one_after_another() -> None:
    pool = InstructionPool(["Name three rivers of Europe."])
    accepted, rejected = keep_new_tasks([LIST, LIST], pool)
    # 5 words each, 4 of them shared in order: F1 8 / 10
    assert [task["instruction"] for task in accepted] == ["Put the words\nin order, please."]
    assert rejected == {"unfinished": 2, "similar": 2, "duplicate": 1}
    assert accepted[0]["most_similar"] == "Name three rivers of Europe." and accepted[0]["similarity"] == 0.0
    assert pool.instructions[1:] == ["Put the words\nin order, please."]


def test_a_request_shows_seeds_as_the_answer_is_read(tmp_path: Path) -> None:
    author = Author()
    grow(tmp_path, author, num_in_context=2, num_instructions=1, requests_per_round=30)
    assert write_task(1, "a\n b", "", "c") == "1. Instruction: a b\n1. Input:\n<noinput>\n1. Output:\nc\n###"
    shown = []
    for (message,) in author.asked:
        assert message["role"] == "user"
        assert "Go on with the tasks 3 to 20 in exactly this form" in message["content"]
        found, _ = read_list(message["content"])
        shown.append(tuple(found))
    known = {(row["instruction"], row["input"], row["output"]) for row in SEEDS}
    assert all(len(set(pair)) == 2 and set(pair) <= known for pair in shown)
    assert len(set(shown)) > 6  # of 12 ordered pairs
    again = Author()
    grow(tmp_path, again, num_in_context=2, num_instructions=1, requests_per_round=30)
    assert again.asked == author.asked
    other = Author()
    grow(tmp_path, other, num_in_context=2, num_instructions=1, requests_per_round=30, seed=1)
    assert other.asked != author.asked


def test_rounds_of_any_size_keep_the_same_tasks(tmp_path: Path) -> None:
    runs = {size: tasks(grow(tmp_path, Author(), requests_per_round=size, num_instructions=60)) for size in (1, 3, 8)}
    assert all(len(found) >= 60 for found in runs.values())
    assert runs[3][:60] == runs[1][:60] == runs[8][:60]
    pool = InstructionPool([row["instruction"] for row in SEEDS])
    for task in runs[1]:  # each against the seeds and those before it
        assert pool.nearest(task["instruction"]) == (task["most_similar"], task["similarity"])
        assert task["similarity"] <= 0.7
        pool.add(task["instruction"])
    assert tasks(grow(tmp_path, Author(), requests_per_round=1, num_instructions=60, seed=1)) != runs[1]


def test_it_stops_when_nothing_new_comes(tmp_path: Path) -> None:
    class Parrot(Author):
        def complete(self, conversations: Sequence[Conversation]) -> list[str | None]:
            super().complete(conversations)
            return [texts(0) for _ in conversations]

    module = grow(tmp_path, Parrot(), requests_per_round=2, patience=5)
    assert [one["requests"] for one in module.rounds] == [2] * 4  # the first brings something; then 2, 4, 6 requests
    assert (module.num_accepted, module.fruitless) == (7, 6)  # of ten tasks of a list three are short
    summary = module.summary()
    assert (summary["instructions"], summary["requests"], summary["client/requests"]) == (7, 8, 8)
    assert (
        summary["tasks"] == 8 * 11 == 7 + sum(value for name, value in summary.items() if name.startswith("rejected/"))
    )
    assert summary["rejected/unfinished"] == 8 and summary["rejected/length"] == 8 * 3
    assert summary["rejected/duplicate"] == 7 * 7  # in the other seven answers


def test_answers_that_fail_are_counted(tmp_path: Path, chat_server: Any) -> None:
    server = chat_server(lambda question: texts(zlib.crc32(question.encode())), plan=[500, b"no json", 200, 500])
    module = grow(
        tmp_path,
        HttpChat(server.url, "m", retries=0, concurrency=1, prices=(1000.0, 0.0)),
        num_instructions=20,
        requests_per_round=4,
    )
    assert module.rounds[0]["usage"]["failed"] == 3 and module.rounds[0]["accepted"]
    summary = module.summary()
    assert summary["client/cost"] == pytest.approx(summary["client/prompt_tokens"] / 1000)
    assert summary["client/prompt_tokens"] == 100 * (summary["requests"] - 3)  # the server counts 100 for an answer


def test_slow_answers_are_asked_for_again(tmp_path: Path, chat_server: Any) -> None:
    server = chat_server(lambda question: texts(1), plan=[5.0])
    module = grow(tmp_path, HttpChat(server.url, "m", timeout=0.3, retries=1), num_instructions=1, requests_per_round=1)
    assert module.num_accepted > 0 and module.rounds[0]["usage"]["requests"] == 2


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"num_instructions": 0},
            "num_instructions, requests_per_round and patience must be at least 1, got 0, 8 and 40",
        ),
        ({"num_instructions": 1, "patience": 0}, "must be at least 1, got 1, 8 and 0"),
        (
            {"num_instructions": 1, "num_in_context": 20},
            r"num_in_context must lie in 1..19, so that a list of 20 has new tasks; got 20",
        ),
        ({"num_instructions": 1, "max_similarity": 2.0}, r"max_similarity must lie in \[0, 1\], got 2.0"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SelfInstructModule(Author(), **settings)


def test_too_few_seeds_other_data_and_several_processes(tmp_path: Path) -> None:
    author = Author()
    with pytest.raises(
        ValueError, match="a request shows 3 seeds and the data hold 2; add seeds or lower num_in_context"
    ):
        grow(tmp_path, author, SEEDS[:2])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p", "answer": "a"}\n' * 4)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data = VerifiableDataModule(tiny_tokenizer(), str(tmp_path / "prompts.jsonl"), str(tmp_path / "prompts.jsonl"))
    with pytest.raises(
        ValueError, match=r"prompts.jsonl:1.*: this prompt is no seed task; set data to SeedTasksDataModule"
    ):
        trainer.predict(SelfInstructModule(author, 1), data)
    module = SelfInstructModule(author, 1)
    module.trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    with pytest.raises(
        ValueError, match="compares each task with all before it, which 2 processes cannot; set trainer.devices to 1"
    ):
        module.setup("predict")
    assert author.asked == []
