"""Continuous batching in little memory, in blocks of steps and compiled: the completions stay the same."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
from conftest import GENERAL, SIZES, Holder, build, ragged
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config

from modules.rollout import InProcessEngine, Sampling
from modules.rollout.decoding.continuous import run_continuous
from modules.rollout.decoding.decode import SlotCache
from modules.rollout.decoding.decode_products import DecodeProducts, can_pack
from modules.rollout.decoding.shelves import BusyRow, Shelves
from modules.rollout.decoding.static import count_column_bytes, run_static
from modules.types import Completion

SEEDS = [7 + 100 * i for i in range(10)]
LONG = Sampling(max_completion_length=200)


@pytest.fixture(scope="module")
def longer() -> Holder:
    """Give a model with 512 positions whose completions take about 50 tokens, and some of them 200."""
    policy = build(Qwen3Config(**(SIZES | {"max_position_embeddings": 512}), head_dim=32))
    policy.stop_token_ids = frozenset(range(0, 300, 60))
    return policy


def engine_for(policy: Holder, **settings: Any) -> InProcessEngine:
    engine = InProcessEngine(**settings)
    engine.sync_weights(policy, 1)
    return engine


def told(groups: list[list[Completion]]) -> list[tuple[list[int], str, str]]:
    return [(each.token_ids, each.text, each.finish) for group in groups for each in group]


@pytest.fixture(scope="module")
def unbound(longer: Holder) -> list[list[Completion]]:
    return engine_for(longer).generate(ragged(10), 2, LONG, SEEDS)


def test_rows_that_must_make_room_are_computed_again_with_the_same_result(
    longer: Holder, unbound: list[list[Completion]]
) -> None:
    """A row may need 9 + 200 - 1 = 208 columns. Where 450 columns are reserved in full, 2 rows fit."""
    column = count_column_bytes(longer.model)
    assert column == 2 * 2 * 2 * 32 * 4  # keys and values x layers x heads x head dim x bytes
    engine = engine_for(longer, max_cache_gb=450 * column / 1e9)
    groups = engine.generate(ragged(10), 2, LONG, SEEDS)
    assert told(groups) == told(unbound)
    for mine, theirs in zip(sum(groups, []), sum(unbound, []), strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    stats, prompt_tokens = engine.last_stats, sum(map(len, ragged(10)))
    assert stats["slots"] >= 5 and stats["preempted"] > 0
    assert stats["prefill_tokens"] > prompt_tokens  # the preempted ones again
    assert stats["cache_gb"] <= 450 * column / 1e9


@pytest.mark.parametrize("fast", [True, False])
def test_what_goes_on_from_a_beginning_can_make_room_too(
    longer: Holder, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    """Each row has 5 tokens already and may take 200, of which all take all in static batches; 450 columns hold two."""
    if not fast:
        monkeypatch.setattr(longer, "stop_token_ids", frozenset())
    limit = 450 * count_column_bytes(longer.model) / 1e9
    whole = [each for group in engine_for(longer).generate(ragged(10), 2, LONG, SEEDS) for each in group]
    going = [at for at, each in enumerate(whole) if len(each.token_ids) > 5]
    begun = [replace(whole[at], token_ids=whole[at].token_ids[:5], logprobs=whole[at].logprobs[:5]) for at in going]
    engine = engine_for(longer, max_cache_gb=limit)
    engine._run = run_continuous if fast else run_static
    prompts, seeds = [ragged(10)[at // 2] for at in going], [SEEDS[at // 2] + at % 2 for at in going]
    groups = engine.generate(prompts, 1, LONG, seeds, started=begun)
    assert told(groups) == [each for at, each in enumerate(told([whole])) if at in going]
    assert engine.last_stats["preempted"] > 0 and engine.last_stats["slots"] >= 5
    assert engine.last_stats["cache_gb"] <= limit


def test_a_completion_that_alone_takes_more_than_the_bound_is_told_of(longer: Holder) -> None:
    engine = engine_for(longer, max_cache_gb=20 * count_column_bytes(longer.model) / 1e9)
    with pytest.warns(UserWarning, match="max_cache_gb .* is less than one completion takes"):
        engine.generate([[5, 6]], 1, Sampling(max_completion_length=60), [5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate([[5, 6]], 1, Sampling(max_completion_length=60), [5])  # once is enough


def test_the_numbers_of_a_call(qwen3: Holder) -> None:
    """Prompts of two tokens and completions of 1 to 20: a step computes the busy rows, or 4 if the products are packed."""
    qwen3.stop_token_ids = frozenset(range(0, 300, 6))
    prompts, sampling = [[30 + i, 40] for i in range(10)], Sampling(max_completion_length=20)
    engine = engine_for(qwen3)
    lengths = [len(each.token_ids) for group in engine.generate(prompts, 2, sampling, SEEDS) for each in group]
    busy = [sum(length > step for length in lengths) for step in range(1, max(lengths))]  # step 0 is the prompt's
    slots = [max(rows, 4) for rows in busy] if can_pack(qwen3.model) else busy
    assert len(set(lengths)) > 5 and min(busy) < 4 < busy[0]
    stats = engine.last_stats
    assert stats == {
        "decode_steps": len(busy),
        "slots": busy[0],
        "prefill_tokens": 20,
        "preempted": 0,
        "tokens": sum(lengths),
        "occupancy": pytest.approx(sum(busy) / sum(slots)),
        "cache_gb": stats["cache_gb"],
        "copy_gb": DecodeProducts(qwen3.model).num_bytes / 1e9,
    }
    # 2 + 20 - 1 columns of each row; the prompts' 10 x 2 lie beside them while they come
    assert stats["cache_gb"] == pytest.approx((busy[0] * 21 + 20) * count_column_bytes(qwen3.model) / 1e9)


def test_static_batches_give_the_same_numbers() -> None:
    gpt2, prompts = build(GENERAL["gpt2"]), [[30 + i, 40] for i in range(10)]
    gpt2.stop_token_ids = frozenset(range(0, 300, 6))
    engine = engine_for(gpt2)
    lengths = [
        len(each.token_ids)
        for group in engine.generate(prompts, 2, Sampling(max_completion_length=20), SEEDS)
        for each in group
    ]
    busy = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert engine.last_stats["tokens"] == sum(lengths) and engine.last_stats["decode_steps"] == len(busy)
    assert engine.last_stats["occupancy"] == pytest.approx(sum(busy) / sum(16 if rows <= 16 else 20 for rows in busy))
    # step t computes 2 + t columns of each row
    most = max((16 if rows <= 16 else 20) * (2 + step) for step, rows in enumerate(busy, 1))
    assert engine.last_stats["cache_gb"] == pytest.approx(most * count_column_bytes(gpt2.model) / 1e9)


def test_shelves_grow_in_steps_up_to_the_longest_row(longer: Holder) -> None:
    shelves = Shelves(longer.model, 1000, 1e9, steps=1, whole=False)
    assert [shelves.columns_for(position) for position in (0, 63, 64, 127, 128, 192, 256, 383, 384, 999)] == [
        64, 64, 128, 128, 192, 256, 384, 384, 1000, 1000,
    ]  # fmt: skip
    assert Shelves(longer.model, 1000, 1e9, steps=16, whole=False).columns_for(49) == 128


def test_free_slots_are_given_up_before_rows_must_make_room(longer: Holder) -> None:
    """10 rows of 128 columns fit just so. Rounded up to 16 slots they would not, at 64 columns they do."""
    shelves = Shelves(longer.model, 1000, 10 * 128 * count_column_bytes(longer.model), steps=1, whole=True)
    rows = [BusyRow(request, 5, 5, request, age=request) for request in range(10)]
    source = SlotCache.allocate(longer.model, 1, 5)
    for number, keys in enumerate(source.keys + source.values):
        keys.fill_(number + 1.0)
    assert shelves.place(rows, source, [0] * 10) == 10 and shelves.shelves[0].cache.slots == 16
    for row in rows:
        row.position = 64
    assert shelves.widen() == [] and (shelves.shelves[0].cache.slots, shelves.shelves[0].cache.columns) == (10, 128)
    rows[3].position = 128  # beside 9 x 128 there is no room for 192, where it is copied to, beside 8 x 128 there is
    assert shelves.widen() == [rows[9], rows[8]] and set(shelves.rows) == set(rows[:8])
    (shelf,) = [each for each in shelves.shelves if rows[3] in each.rows]
    assert shelf.cache.columns == 192 and shelves.num_bytes() <= shelves.max_bytes
    kept = shelf.cache.values[0][shelf.rows.index(rows[3])]
    assert bool((kept[:, :5] == len(source.keys) + 1).all()) and not bool(kept[:, 5:].any())


class Waits(TorchDispatchMode):
    """Counts the operations for which a host waits for its device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("room", [1e6, 600])
def test_blocks_of_steps_change_no_completion(longer: Holder, unbound: list[list[Completion]], room: float) -> None:
    limit = room * count_column_bytes(longer.model) / 1e9
    for steps in (2, 16):
        engine = engine_for(longer, check_every=steps, max_cache_gb=limit)
        assert told(engine.generate(ragged(10), 2, LONG, SEEDS)) == told(unbound)


def test_in_blocks_a_device_is_waited_for_once_a_block(longer: Holder) -> None:
    """No completion ends before the others: 16 steps are one block, and 64 are 4."""
    waits = []
    longer_stops, longer.stop_token_ids = longer.stop_token_ids, frozenset()
    for length in (17, 65):
        engine = engine_for(longer, check_every=16)
        with Waits() as counter:
            engine.generate([[5, 6]], 16, Sampling(max_completion_length=length), [0])
        waits.append(counter.count)
    longer.stop_token_ids = longer_stops
    assert engine.last_stats["decode_steps"] == 64
    assert waits[1] - waits[0] == 3  # 48 steps more


@pytest.mark.parametrize("stop", [("a",), ("ab", "!")])
def test_stop_strings_that_are_found_at_the_end_of_a_block(qwen3: Holder, stop: tuple[str, ...]) -> None:
    sampling = Sampling(max_completion_length=60, stop=stop)
    each_step = engine_for(qwen3).generate(ragged(10), 2, sampling, SEEDS)
    assert any(each.finish == "stop" and len(each.token_ids) % 16 for group in each_step for each in group)
    for steps in (5, 16):
        assert told(engine_for(qwen3, check_every=steps).generate(ragged(10), 2, sampling, SEEDS)) == told(each_step)
