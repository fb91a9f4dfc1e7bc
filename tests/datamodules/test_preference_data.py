"""Batches of preferences: exact fields, the same steps for any micro-batches, balancing, and rows in order."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from datamodules.loaders.step_sampler import MicroBatch, StepSampler
from datamodules.preference import (
    PreferenceDataModule,
    PreferenceDataset,
    PreferenceTokens,
    chosen_longer_by,
    find_other_prompts,
)
from datamodules.sources import Row, Source
from datamodules.tokens.encoding import encode_example, encode_prompt
from modules.networks.tiny import tiny_tokenizer
from modules.types import PreferenceBatch

TOKENIZER = tiny_tokenizer()
EOS, TURN_END = TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("<|im_end|>")


class Given(Source):
    """A source of rows that the test writes."""

    def __init__(self, *records: dict[str, Any]) -> None:
        self.records = records

    def rows(self) -> list[Row]:
        """Return the rows."""
        return [Row(record, f"data.jsonl:{number}", "given") for number, record in enumerate(self.records, start=1)]


def pair(chosen: str, rejected: str, prompt: str = "p", **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def module(*records: dict[str, Any], **options: Any) -> PreferenceDataModule:
    data = PreferenceDataModule(TOKENIZER, Given(*records), **{"chat": False, **options})
    data.setup("fit")
    return data


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text).input_ids)


def test_batch_fields() -> None:
    data = module(
        pair("ab", "c", "pqr"), {"prompt": "s", "completions": ["d", "ef", "gh"], "ranks": [1, 0, 1]}, batch_size=2
    )
    (batch,) = list(data.in_order("train"))
    # the longer example first: 3 + 3 + 2 = 8 tokens against 1 + 2 + 3 + 3 = 9
    assert batch["prompt_ids"].tolist() == [[*ids("s"), 0, 0], ids("pqr")]
    assert batch["prompt_mask"].tolist() == [[True, False, False], [True] * 3]
    assert batch["completion_ids"].tolist() == [
        [*ids("d"), EOS, 0],
        [*ids("ef"), EOS],
        [*ids("gh"), EOS],
        [*ids("ab"), EOS],
        [*ids("c"), EOS, 0],
    ]
    assert batch["completion_mask"].tolist() == [
        [True, True, False],
        [True] * 3,
        [True] * 3,
        [True] * 3,
        [True, True, False],
    ]
    assert batch["prompt_index"].tolist() == [0, 0, 0, 1, 1]
    assert batch["rank"].tolist() == [1, 0, 1, 0, 1]
    assert batch["row"].tolist() == [2, 3, 4, 0, 1]  # the first example owns completions 0 and 1
    assert batch["denominator"] == 2.0 and batch["denominator"].shape == ()
    assert set(batch) == set(PreferenceBatch.__required_keys__)
    assert all(
        batch[name].dtype == torch.long for name in ("prompt_ids", "completion_ids", "prompt_index", "rank", "row")
    )


def test_a_filler_makes_no_pair() -> None:
    rows = [PreferenceTokens([5], [[6, 2], [7, 2]], [0, 1], None, "a")]
    batch = PreferenceDataset(rows, 0)[MicroBatch((0,), 3, counts=False)]
    assert batch["rank"].tolist() == [-1, -1] and batch["row"].tolist() == [0, 1] and batch["denominator"] == 3.0
    assert batch["completion_mask"].all()


def test_other_prompts_are_those_of_the_next_example_with_another() -> None:
    prompts, completions = [[5], [5], [6, 7, 8, 9], [5]], [[1, 2], [1, 2, 2], [1, 2], [1] * 4]
    rows = [PreferenceTokens(p, [c], [0], None, "a") for p, c in zip(prompts, completions, strict=True)]
    # no completion with its prompt is longer than 6; the last example is followed by the first other prompt
    assert find_other_prompts(rows) == [[6, 7, 8, 9], [7, 8, 9], [5], [8, 9]]
    assert find_other_prompts(rows[:2]) == [None, None]


@pytest.mark.parametrize(("name", "margin"), [("small", 2 / 3), ("large", 2.0)])
def test_margins_of_llama_2(name: Any, margin: float) -> None:
    data = module(pair("a", "b", strength="better"), margins=name)
    assert data.train_rows[0].margin == margin


def test_margins_are_in_every_batch_or_in_none() -> None:
    records = [pair("a", "b", strength="much"), pair("c", "d", margin=2.5), pair("e", "f")]
    assert all("margin" not in batch for batch in module(*records[::2], batch_size=1).in_order("train"))
    data = module(*records, batch_size=1, margins={"much": 3.0, "little": 1.0})
    batches = list(data.in_order("train"))
    assert [batch["margin"].tolist() for batch in batches] == [[3.0], [2.5], [0.0]]
    assert batches[0]["margin"].dtype == torch.float32
    with pytest.raises(
        ValueError, match="data.jsonl:1: margins is set and no train row has a strength; map its column with columns"
    ):
        module(pair("a", "b"), margins={"much": 3.0})


@pytest.mark.parametrize("chat", [False, True])
def test_prompt_and_completion_are_what_fine_tuning_sees(chat: bool) -> None:
    system = "be kind" if chat else None
    (row,) = module(pair("yes", "no", "x"), chat=chat, system=system).train_rows
    assert row.prompt == encode_prompt(TOKENIZER, "x", "here", chat, system)[1]
    for text, completion in zip(("yes", "no"), row.completions, strict=True):
        tokens = encode_example(TOKENIZER, "x", text, "here", chat, system)
        assert row.prompt + completion == tokens.ids[: len(row.prompt) + sum(tokens.supervised)]
        assert completion == [*ids(text), TURN_END if chat else EOS]


def test_long_examples_go_whole_and_ties_and_bad_rows_are_counted() -> None:
    records = [
        pair("a" * 6, "b"),
        pair("a" * 7, "b"),
        pair("b", "a" * 7),
        {"prompt": "p", "completions": ["a", "b"], "scores": [1, 1]},
    ]
    data = module(*records, max_length=8)  # 1 + 6 + 1
    assert (
        len(data.train_rows) == 1 and data.dropped["train"] == 2 and data.ties["train"] == 1 and data.bad["train"] == 0
    )
    with pytest.raises(ValueError, match="data.jsonl:2: 9 tokens and the limit is 8; raise it or set drop_long: true"):
        module(*records, max_length=8, drop_long=False)
    bad = [pair("a", "b"), pair("a", ""), pair("same", "same"), {"prompt": "p"}]
    with pytest.raises(
        ValueError,
        match="^data.jsonl:2: rejected is empty; mend the row, or set data.on_bad_row: drop to leave such rows out$",
    ):
        module(*bad)
    data = module(*bad, on_bad_row="drop")
    assert len(data.train_rows) == 1 and data.bad["train"] == 3 and data.dropped["train"] == 0
    counts = "of 4 train rows from here on none is left: 1 left out, 2 bad, 1 longer than 8 tokens .raise the limit."
    left = f"{counts}; the first bad row is data.jsonl:3: rejected is empty"
    with pytest.raises(ValueError, match=left):
        module(records[1], records[3], bad[1], bad[3], max_length=8, on_bad_row="drop")


def test_identical_answers_are_refused_unless_they_are_not_compared() -> None:
    with pytest.raises(
        ValueError,
        match="data.jsonl:1: two answers are identical, so neither is better; mend the row, or set data.on_bad_row: drop",
    ):
        module(pair("same", "same"))
    with pytest.raises(ValueError, match="data.jsonl:1: two answers are identical"):
        module({"prompt": "p", "completions": ["a", "b", "a"]})
    (row,) = module({"prompt": "p", "completions": ["a", "b", "a"], "ranks": [0, 1, 0]}).train_rows
    assert row.ranks == [0, 1, 0]


def test_one_kind_a_data_set() -> None:
    labelled = {"prompt": "p", "completion": "a", "label": True}
    data = module(labelled, {**labelled, "label": False})
    assert data.kind == "labels" and [row.ranks for row in data.train_rows] == [[0], [1]]
    assert module(pair("a", "b")).kind == "pairs"
    with pytest.raises(
        ValueError,
        match="data.jsonl:2: labelled completions, and the rows before it are ranked completions; give each kind a run",
    ):
        module(pair("a", "b"), labelled)
    with pytest.raises(ValueError, match="data.jsonl:1: ranked completions, and the rows before it are labelled"):
        module(labelled, val=Given(pair("a", "b")))


def test_what_is_missing_or_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1 and max_length at least 2, got 0 and 1024"):
        PreferenceDataModule(TOKENIZER, "a.jsonl", batch_size=0)
    with pytest.raises(ValueError, match="on_bad_row must be raise or drop, got 'skip'"):
        PreferenceDataModule(TOKENIZER, "a.jsonl", on_bad_row="skip")  # type: ignore[arg-type]
    data = module(pair("a", "b"))
    assert data.val_dataloader() == data.test_dataloader() == []
    with pytest.raises(ValueError, match="there are no val rows: set data.val"):
        data.in_order("val")
    with pytest.raises(ValueError, match="there are no held-out rows to evaluate; set data.val"):
        data.setup("validate")
    with pytest.raises(ValueError, match="there are no train rows: call setup first"):
        PreferenceDataModule(TOKENIZER, "a.jsonl").in_order("train")
    plain = tiny_tokenizer()
    plain.chat_template = None
    data = PreferenceDataModule(plain, Given({"chosen": [{"role": "user", "content": "x"}], "rejected": []}))
    with pytest.raises(ValueError, match="data.jsonl:1: chosen must be one assistant turn"):
        data.setup("fit")


def lengths(*pairs: tuple[int, int]) -> list[dict[str, Any]]:
    """Make rows whose chosen and rejected answers have these many letters. The letters differ, so no two answers are
    equal.
    """
    return [pair("a" * chosen, "b" * rejected) for chosen, rejected in pairs]


def test_balance_length() -> None:
    records = lengths((2, 1), (3, 2), (4, 3), (1, 2), (5, 5), (4, 1), (1, 3), (3, 1), (9, 1), (1, 5))
    # difference of 1: three longer, one shorter -> 1 + 1; of 0: kept; of 2 to 3: two longer, one shorter -> 1 + 1;
    # of 4 to 7: only a shorter -> none; of 8 to 15: only a longer -> none
    data = module(*records, balance_length=True, val=Given(*records))
    assert data.unbalanced == 5 and len(data.train_rows) == 5 and len(data.val_rows) == 10
    differences = [chosen_longer_by(row) for row in data.train_rows]
    assert sorted(abs(d) for d in differences if abs(d) < 2) == [0, 1, 1]
    assert sum(d > 0 for d in differences) == sum(d < 0 for d in differences) == 2
    assert [row.origin for row in data.train_rows] == sorted(
        (row.origin for row in data.train_rows), key=lambda o: int(o.split(":")[1])
    )
    kept = {
        frozenset(row.origin for row in module(*records, balance_length=True, seed=seed).train_rows)
        for seed in range(20)
    }
    assert len(kept) > 1 and all({"data.jsonl:4", "data.jsonl:5", "data.jsonl:7"} < rows for rows in kept)
    assert [row.origin for row in module(*records, balance_length=True).train_rows] == [
        row.origin for row in data.train_rows
    ]
    unbalanced = module(*records)
    assert sum(chosen_longer_by(row) > 0 for row in unbalanced.train_rows) == 6 and unbalanced.unbalanced == 0


def test_balance_length_needs_pairs_with_an_opposite() -> None:
    with pytest.raises(ValueError, match="data.jsonl:1: balance_length needs pairs and this row has 3 completions"):
        module({"prompt": "p", "completions": ["a", "b", "c"]}, balance_length=True)
    with pytest.raises(ValueError, match="data.jsonl:1: balance_length leaves none of 2 pairs"):
        module(*lengths((2, 1), (3, 2)), balance_length=True)


def many(count: int = 21) -> list[dict[str, Any]]:
    """Make rows, every third with three completions."""
    return [
        {"prompt": f"{i}?", "completions": ["a" * (i % 5 + 1), "b" * (i % 3 + 1), "c"][: 3 if i % 3 == 0 else 2]}
        for i in range(count)
    ]


@pytest.mark.parametrize(("batch_size", "world"), [(1, 1), (4, 1), (2, 2), (4, 3), (8, 4)])
def test_in_order_has_every_completion_once(batch_size: int, world: int) -> None:
    rows = module(*many(), batch_size=batch_size).train_rows
    total = sum(len(row.completions) for row in rows)
    assert total == 7 * 3 + 14 * 2
    ranks = [
        StepSampler([row.num_tokens for row in rows], [1] * len(rows), batch_size, 1, world, rank, shuffle=False)
        for rank in range(world)
    ]
    batches = [[PreferenceDataset(rows, 0)[batch] for batch in sampler] for sampler in ranks]
    assert len({len(each) for each in batches}) == 1
    seen = [
        number
        for each in batches
        for batch in each
        for number, rank in zip(batch["row"].tolist(), batch["rank"].tolist(), strict=True)
        if rank >= 0
    ]
    assert sorted(seen) == list(range(total))
    if world == 1:
        data = module(*many(), batch_size=batch_size)
        again = [number for batch in data.in_order("train") for number in batch["row"].tolist()]
        assert again == seen
        flat = [ids for row in data.train_rows for ids in row.completions]  # row numbers count through the examples
        for batch in data.in_order("train"):
            for number, padded, mask in zip(
                batch["row"].tolist(), batch["completion_ids"], batch["completion_mask"], strict=True
            ):
                assert padded[mask].tolist() == flat[number]


class PairScores(LightningModule):
    """Bradley-Terry on a bag of tokens; each of an example's M pairs weighs 1/M. With Adam, every bit of a gradient
    matters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores = torch.nn.Embedding(261, 1)
        torch.nn.init.zeros_(self.scores.weight)
        self.seen: list[list[int]] = []
        self.steps: list[tuple[int, float, frozenset[int]]] = []

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        self.seen.append(batch["row"].tolist())
        counted = frozenset(batch["row"][batch["rank"] >= 0].tolist())
        self.steps.append((self.trainer.global_step, float(batch["denominator"]), counted))
        scores = (self.scores(batch["completion_ids"])[..., 0] * batch["completion_mask"]).sum(1)
        prompt, rank = batch["prompt_index"], batch["rank"]
        better = (prompt[:, None] == prompt) & (rank[:, None] < rank) & (rank[:, None] >= 0)
        pairs = better.sum(1).new_zeros(len(batch["prompt_ids"])).index_add(0, prompt, better.sum(1))
        losses = -torch.nn.functional.logsigmoid(scores[:, None] - scores) / pairs.clamp(min=1)[prompt][:, None]
        return (
            (losses * better).sum()
            / batch["denominator"]
            * self.trainer.accumulate_grad_batches
            * self.trainer.world_size
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fit(
    model: LightningModule, batch_size: int, checkpoint: Path | None = None, saved: Path | None = None, **limits: Any
) -> None:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks: list[Callback] = (
        [ModelCheckpoint(dirpath=saved, filename="{step}", every_n_train_steps=1, save_top_k=-1)] if saved else []
    )
    trainer = Trainer(**{**settings, **limits}, enable_checkpointing=bool(callbacks), callbacks=callbacks)
    data = PreferenceDataModule(TOKENIZER, Given(*many()), batch_size=batch_size, chat=False, seed=1)
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_resuming_from_every_checkpoint_is_bitwise(tmp_path: Path, accumulate: int) -> None:
    straight = PairScores()
    fit(straight, 2, saved=tmp_path, accumulate_grad_batches=accumulate, max_epochs=2)
    checkpoints = sorted(tmp_path.iterdir())
    assert len(checkpoints) == 2 * -(-11 // accumulate)  # 21 examples in twos
    for checkpoint in checkpoints[:-1]:
        resumed = PairScores()
        fit(resumed, 2, checkpoint, accumulate_grad_batches=accumulate, max_epochs=2)
        assert resumed.seen == straight.seen[len(straight.seen) - len(resumed.seen) :] and len(resumed.seen) < len(
            straight.seen
        )
        assert torch.equal(resumed.scores.weight, straight.scores.weight), checkpoint.name


def test_accumulation_and_ranks_change_nothing() -> None:
    def weights(batch_size: int, accumulate: int, **limits: Any) -> tuple[Tensor, PairScores]:
        model = PairScores().double()
        fit(model, batch_size, accumulate_grad_batches=accumulate, max_epochs=2, **limits)
        return model.scores.weight.detach(), model

    reference, whole = weights(8, 1)
    assert [denominator for _, denominator, _ in whole.steps] == [8.0, 8.0, 5.0] * 2
    accumulated, parts = weights(2, 4)
    assert torch.allclose(accumulated, reference, rtol=0, atol=1e-9)
    for step, denominator, rows in whole.steps:
        mine = [part for part in parts.steps if part[0] == step]
        assert {part[1] for part in mine} == {denominator} and frozenset().union(*(part[2] for part in mine)) == rows
    ranks, _ = weights(2, 2, devices=2, strategy="ddp_fork")
    assert torch.allclose(ranks, reference, rtol=0, atol=1e-9)
    assert not torch.allclose(weights(2, 1)[0], reference, rtol=0, atol=1e-3)
