"""Phases of prompts: drawn by seed, phase and rank alone, shared over ranks, and held-out prompts in order."""

import json
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from datamodules import (
    Addition,
    Files,
    InstructionDataModule,
    PreferencePrompts,
    PtxStream,
    ReasoningGym,
    Source,
    VerifiableDataModule,
)
from modules.networks.tiny import tiny_tokenizer
from modules.trainer.steps import update_of_prompts
from modules.types import PromptBatch


class OnRank(VerifiableDataModule):
    """A loader that believes it is one of several processes."""

    place = (0, 1)

    @property
    def rank(self) -> int:
        return self.place[0]

    @property
    def world_size(self) -> int:
        return self.place[1]


def on_rank(
    rank: int,
    world: int,
    train: str | Source,
    val: str | Source | None = None,
    prompts_per_phase: int = 4,
    seed: int = 0,
    val_batch_size: int = 3,
) -> OnRank:
    module = OnRank(
        tiny_tokenizer(),
        train,
        val,
        chat=False,
        prompts_per_phase=prompts_per_phase,
        seed=seed,
        val_batch_size=val_batch_size,
    )
    module.place = (rank, world)
    module.setup("fit")
    return module


@pytest.fixture
def ten_rows(tmp_path: Path) -> str:
    path = tmp_path / "set.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"p{index}", "answer": index, "level": index % 3}) + "\n" for index in range(10))
    )
    return str(path)


def test_a_phase_is_a_batch_of_equal_lists(ten_rows: str) -> None:
    batch = on_rank(0, 1, ten_rows).draw(0)
    assert set(batch) == {*PromptBatch.__required_keys__, "thinks"}
    assert {len(values) for values in batch.values()} == {4}  # type: ignore[arg-type]
    number = int(batch["prompt"][0][1:])
    assert batch["uid"][0] == f"{ten_rows}:{number + 1}#0"
    assert batch["answer"][0] == str(number) and batch["info"][0] == {"level": number % 3}
    assert batch["prompt_ids"][0] == [5 + ord("p"), 5 + ord(str(number))]
    assert batch["source"][0] == f"{Path(ten_rows).parent.name}/set"


def test_each_pass_shows_every_row_once_in_a_new_order(ten_rows: str) -> None:
    module = on_rank(0, 1, ten_rows)
    stream = [
        (uid, prompt)
        for phase in range(5)
        for uid, prompt in zip(module.draw(phase)["uid"], module.draw(phase)["prompt"], strict=True)
    ]
    first, second = ([prompt for _, prompt in stream[start : start + 10]] for start in (0, 10))
    assert sorted(first) == sorted(second) == [f"p{index}" for index in range(10)]
    assert first != second
    assert [uid.rpartition("#")[2] for uid, _ in stream] == ["0"] * 10 + ["1"] * 10
    assert len({uid for uid, _ in stream}) == 20


def test_drawing_depends_on_seed_and_phase_alone(ten_rows: str) -> None:
    module = on_rank(0, 1, ten_rows)
    forward = [module.draw(phase) for phase in range(6)]
    fresh = on_rank(0, 1, ten_rows)
    assert [fresh.draw(phase) for phase in reversed(range(6))] == forward[::-1]
    assert on_rank(0, 1, ten_rows, seed=1).draw(0) != forward[0]


def test_ranks_share_the_phase_of_one(ten_rows: str) -> None:
    alone = on_rank(0, 1, ten_rows)
    for world in (2, 4):
        ranks = [on_rank(rank, world, ten_rows) for rank in range(world)]
        for phase in range(6):
            shares = [module.draw(phase)["uid"] for module in ranks]
            assert [shares[place % world][place // world] for place in range(4)] == alone.draw(phase)["uid"]


def test_a_prompt_is_trained_in_the_same_update_on_any_number_of_ranks(ten_rows: str) -> None:
    def updates(world: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for rank in range(world):
            uids = on_rank(rank, world, ten_rows, prompts_per_phase=12).draw(1)["uid"]
            found |= dict(zip(uids, update_of_prompts(len(uids), 3), strict=True))
        return found

    assert list(updates(1).values()) == [0] * 4 + [1] * 4 + [2] * 4
    assert updates(2) == updates(4) == updates(1)


def test_a_phase_may_be_longer_than_the_data(ten_rows: str) -> None:
    batch = on_rank(0, 1, ten_rows, prompts_per_phase=25).draw(1)
    assert len(batch["uid"]) == len(set(batch["uid"])) == 25
    assert [uid.rpartition("#")[2] for uid in batch["uid"]] == ["2"] * 5 + ["3"] * 10 + ["4"] * 10


def test_numbers_that_do_not_fit_are_named(ten_rows: str) -> None:
    with pytest.raises(
        ValueError, match=r"prompts_per_phase \(4\) must be a multiple of 3: 3 ranks share each of the 1 updates"
    ):
        on_rank(0, 3, ten_rows)
    with pytest.raises(ValueError, match="must be at least 1, got 0, 64 and 512"):
        VerifiableDataModule(tiny_tokenizer(), ten_rows, prompts_per_phase=0)
    with pytest.raises(ValueError, match="10 held-out prompts cannot be shared by 16 ranks"):
        on_rank(0, 16, ten_rows, ten_rows, prompts_per_phase=16).val_dataloader()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_held_out_prompts_come_in_order_in_as_many_batches_on_every_rank(ten_rows: str, world: int) -> None:
    batches = [
        list(on_rank(rank, world, ten_rows, ten_rows, prompts_per_phase=12).val_dataloader()) for rank in range(world)
    ]
    assert len({len(rank) for rank in batches}) == 1
    assert all(1 <= len(batch["uid"]) <= 3 for rank in batches for batch in rank)
    for number, rank in enumerate(batches):
        assert [prompt for batch in rank for prompt in batch["prompt"]] == [
            f"p{index}" for index in range(number, 10, world)
        ]


def test_single_held_out_prompts_still_make_as_many_batches_on_every_rank(ten_rows: str) -> None:
    for rank in range(3):  # 4, 3 and 3 prompts
        loader = on_rank(rank, 3, ten_rows, ten_rows, prompts_per_phase=3, val_batch_size=1).val_dataloader()
        assert [len(batch["uid"]) for batch in loader] == ([1, 1, 2] if rank == 0 else [1, 1, 1])


def test_held_out_batches_are_plain_lists(ten_rows: str) -> None:
    first = next(iter(on_rank(0, 1, ten_rows, ten_rows).val_dataloader()))
    assert first["prompt_ids"][0] == [5 + ord("p"), 5 + ord("0")] and type(first["prompt_ids"]) is list
    assert first["info"] == [{"level": 0}, {"level": 1}]  # ten prompts in batches of at most three: four even batches
    assert on_rank(0, 1, ten_rows).val_dataloader() == []
    assert [prompt for batch in on_rank(0, 1, ten_rows).predict_dataloader() for prompt in batch["prompt"]] == [
        f"p{i}" for i in range(10)
    ]


def test_system_and_chat_reach_the_prompt(ten_rows: str) -> None:
    module = VerifiableDataModule(
        tiny_tokenizer(), ten_rows, system="be brief", chat=True, prompts_per_phase=1, max_prompt_length=90
    )
    module.setup("fit")
    prompt = module.draw(0)["prompt"][0]
    assert prompt.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\np") and prompt.endswith(
        "<|im_start|>assistant\n"
    )
    short = VerifiableDataModule(tiny_tokenizer(), ten_rows, chat=True, max_prompt_length=5, drop_long=False)
    with pytest.raises(ValueError, match=f"{ten_rows}:1: [0-9]+ tokens and the limit is 5"):
        short.setup("fit")


def test_short_class_names_work_on_the_command_line(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    arguments = [
        "--data=VerifiableDataModule",
        f"--data.tokenizer={tmp_path}",
        "--data.train=Addition",
        "--data.train.num_examples=5",
    ]
    arguments += [
        "--data.val.class_path=Addition",
        "--data.val.init_args.num_examples=3",
        "--data.val.init_args.held_out=true",
    ]
    module = parser.instantiate(parser.parse_args(arguments)).data
    assert isinstance(module, VerifiableDataModule) and isinstance(module.train, Addition)
    assert isinstance(module.val, Addition) and module.val.held_out
    module.setup("fit")
    assert len(module.train_prompts) == 5 and module.val_prompts[0].text.endswith("=")
    arguments = [
        *arguments[:2],
        "--data.train=PreferencePrompts",
        "--data.train.path=hh.jsonl",
        "--data.train.chat=true",
    ]
    module = parser.instantiate(
        parser.parse_args([*arguments, "--data.ptx.train=x.jsonl", "--data.ptx.val={web: y.jsonl}"])
    ).data
    assert isinstance(module.train, PreferencePrompts) and module.train.chat
    assert isinstance(module.ptx, PtxStream) and (module.ptx.train, module.ptx.val) == ("x.jsonl", {"web": "y.jsonl"})
    for name, source in (("ReasoningGym", {"task": "chain_sum", "size": 2}), ("Files", {"path": "x.jsonl"})):
        config = {
            "class_path": "InstructionDataModule",
            "init_args": {"tokenizer": str(tmp_path), "train": {"class_path": name, "init_args": source}},
        }
        module = parser.instantiate(parser.parse_object({"data": config})).data
        assert isinstance(module, InstructionDataModule) and isinstance(module.train, ReasoningGym | Files)


def test_a_prompt_needs_no_answer(tmp_path: Path) -> None:
    """Learned rewards need no answer, and every other column reaches the rewards."""
    path = tmp_path / "prompts.jsonl"
    for rows in (
        [{"prompt": "x"}],
        [{"question": "x"}],
        [{"prompt": "x", "answer": None}],
        [{"prompt": "x", "answer": float("nan")}],
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        module = on_rank(0, 1, str(path), prompts_per_phase=1)
        assert (module.draw(0)["prompt"], module.draw(0)["answer"], module.draw(0)["info"]) == (["x"], [None], [{}])
    path.write_text('{"my_prompt": "x"}\n')
    mapped = VerifiableDataModule(tiny_tokenizer(), str(path), columns={"prompt": "my_prompt"}, chat=False)
    mapped.setup("fit")
    assert mapped.draw(0)["prompt"] == ["x"] * 32
    path.write_text('{"prompt": "Say hello.", "key": 1, "response": "nobody knows whether this is right"}\n')
    batch = on_rank(0, 1, str(path), prompts_per_phase=1).draw(0)
    assert (batch["prompt"], batch["answer"]) == (["Say hello."], [None])
    assert batch["info"] == [{"key": 1, "response": "nobody knows whether this is right"}]


def test_a_prompt_in_its_other_form(tmp_path: Path) -> None:
    asked = [{"prompt": "1+1?"}, {"prompt": [{"role": "user", "content": "1+1?"}]}]
    asked += [{"prompt": "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"}]
    asked += [{"prompt": [{"role": role, "content": "1+1?"} for role in ("user", "assistant", "user")]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    found = {}
    for chat in (True, False):
        rows = VerifiableDataModule(tiny_tokenizer(), str(tmp_path / "rows.jsonl"), chat=chat)
        rows.setup("fit")
        others = [rows.in_other_form(prompt) for prompt in rows.train_prompts]
        found[chat] = [other and other.text for other in others]
        assert rows.batch_of(rows.train_prompts[:1])["prompt_ids"] == [rows.train_prompts[0].ids]
    rendered = asked[2]["prompt"]
    assert found == {True: ["1+1?", "1+1?", None, None], False: [rendered, "1+1?", None, None]}
