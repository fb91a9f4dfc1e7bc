"""Mixtures: shares and the switch of stages.

A step's rows depend only on seed, step and rows per step, so resuming, ranks and branches change nothing.
"""

import json
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_instruction_resume import Unigram, fit, same, savers

from datamodules import DecayPhase, MixtureDataModule, Source, Stream
from datamodules.mixture import shuffled_passes
from datamodules.sources import Row
from modules.__main__ import main
from modules.networks.tiny import tiny_tokenizer


@dataclass(frozen=True)
class Letters(Source):
    """A source of ``number`` rows, each a letter and a number, with completions of ``length`` characters."""

    letter: str
    number: int
    length: int = 6

    def rows(self) -> list[Row]:
        return [
            Row(
                {"prompt": f"{self.letter}:", "completion": f"{index:0{self.length}d}"},
                f"{self.letter}#{index}",
                self.letter,
            )
            for index in range(self.number)
        ]


STABLE = {"a": Stream(Letters("a", 30), weight=3.0), "b": Stream(Letters("b", 20, length=14), weight=1.0)}


def mixture(streams: dict[str, Stream] | None = None, **settings: Any) -> MixtureDataModule:
    chosen = {"num_steps": 10, "batch_size": 4, "packing": False, "seed": 1, "chat": False}
    chosen |= {"loss_on": "assistant"} | settings
    module = MixtureDataModule(tiny_tokenizer(), streams or STABLE, **chosen)
    module.setup("fit")
    return module


def letters(module: MixtureDataModule, rows: list[int]) -> list[str]:
    return [next(name for name, places in module.stream_rows.items() if row in places) for row in rows]


def texts(module: MixtureDataModule, first: int, last: int, rows_per_step: int = 8) -> list[list[int]]:
    return [module.train_rows[row].ids for row in module.draw(first, last, rows_per_step)]


def seen(
    module: MixtureDataModule, resume: Path | None = None, callbacks: tuple[Any, ...] = (), **limits: Any
) -> Unigram:
    model = Unigram()
    fit(model, module, resume, callbacks, **(limits or {"max_epochs": 1}))
    return model


def test_shares_of_tokens_and_of_examples() -> None:
    """Rows of a have 2 + 6 + 1 = 9 tokens, of b 17 (text is bytes): with 3 : 1 of tokens, rows are drawn as 3/9 : 1/17
    = 17 : 3.
    """
    module = mixture()
    lengths = {
        name: {len(module.train_rows[place].ids) for place in places} for name, places in module.stream_rows.items()
    }
    assert lengths == {"a": {9}, "b": {17}}
    assert module.probabilities(5) == {"a": pytest.approx(17 / 20), "b": pytest.approx(3 / 20)}
    number = 40_000
    drawn = Counter(letters(module, module.draw(0, number // 8, 8)))
    deviation = (number * 0.85 * 0.15) ** 0.5
    assert abs(drawn["a"] - 0.85 * number) < 3 * deviation
    tokens = {"a": drawn["a"] * 9, "b": drawn["b"] * 17}
    assert tokens["a"] / (tokens["a"] + tokens["b"]) == pytest.approx(0.75, abs=0.01)
    by_examples = mixture(weigh_by="examples")
    assert by_examples.probabilities(5) == {"a": 0.75, "b": 0.25}
    drawn = Counter(letters(by_examples, by_examples.draw(0, number // 8, 8)))
    assert abs(drawn["a"] - 0.75 * number) < 3 * (number * 0.75 * 0.25) ** 0.5


def test_shares_of_packed_rows_count_what_is_in_them() -> None:
    """A row of 36 tokens holds four documents of a (8 rows for 30 documents) or two of b (10 rows for 20)."""
    module = mixture(packing=True, max_length=36, weigh_by="examples")
    assert {name: len(places) for name, places in module.stream_rows.items()} == {"a": 8, "b": 10}
    assert module.probabilities(0)["a"] == pytest.approx((3 / (30 / 8)) / (3 / (30 / 8) + 1 / (20 / 10)))  # 0.8 : 0.5
    tokens = mixture(packing=True, max_length=36)
    assert tokens.probabilities(0)["a"] == pytest.approx((3 / (270 / 8)) / (3 / (270 / 8) + 1 / (340 / 10)))


def test_without_weights_rows_count_up_to_the_cap() -> None:
    """FLAN mixes in proportion to the number of examples: 10 and 300 rows under a cap of 30 give 10 : 30."""
    streams = {"a": Stream(Letters("a", 10)), "b": Stream(Letters("b", 300, length=14))}
    assert mixture(streams, cap=30).probabilities(0) == {"a": 0.25, "b": 0.75}
    assert mixture(streams, cap=5).probabilities(0) == {"a": 0.5, "b": 0.5}
    assert mixture(streams).probabilities(0)["a"] == pytest.approx(10 / 310)


def test_a_stream_is_gone_through_in_whole_passes() -> None:
    module = mixture(num_steps=40)
    rows = module.draw(0, 40, 8)
    for name, places in module.stream_rows.items():
        mine = [row for row in rows if row in places]
        assert len(mine) > len(places)
        for start in range(0, len(mine), len(places)):
            assert len(set(mine[start : start + len(places)])) == len(mine[start : start + len(places)]), name
    passes = shuffled_passes(range(30), "1 a")
    first, second = ([next(passes) for _ in range(30)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(30)) and first != second


def test_the_switch_happens_at_its_step() -> None:
    streams = {
        "a": Stream(Letters("a", 30), weight=1.0, decay_weight=0.0),
        "b": Stream(Letters("b", 20, length=14), weight=0.0, decay_weight=1.0),
    }
    module = mixture(streams, decay=DecayPhase(7))
    assert letters(module, module.draw(0, 7, 8)) == ["a"] * 56
    assert letters(module, module.draw(7, 10, 8)) == ["b"] * 24
    ramp = mixture(streams, decay=DecayPhase(7, ramp_steps=3), weigh_by="examples")
    assert [ramp.probabilities(step)["b"] for step in (0, 6, 7, 8, 9, 10, 99)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]


def test_a_stream_of_weight_zero_changes_no_batch() -> None:
    """A replay stream with share 0 changes nothing, wherever it is named."""
    without, replay = seen(mixture()), {"replay": Stream(Letters("c", 9), weight=0.0)}
    assert seen(mixture(replay | STABLE)).seen == seen(mixture(STABLE | replay)).seen == without.seen
    some = {"replay": Stream(Letters("c", 9), weight=0.5)}
    assert seen(mixture(STABLE | some)).seen != without.seen


def test_a_stream_keeps_its_order_beside_any_other() -> None:
    alone, among = mixture({"a": STABLE["a"]}), mixture(STABLE)
    places = among.stream_rows["a"]
    rows = [row for row in among.draw(0, 10, 8) if row in places]
    assert rows == alone.draw(0, 10, 8)[: len(rows)]


@pytest.mark.parametrize(
    ("accumulate", "limits"),
    [
        (2, {"max_epochs": 3}),
        (1, {"max_epochs": 3, "limit_train_batches": 4}),
        (1, {"max_steps": 13, "max_epochs": -1}),
    ],
)
def test_resuming_from_every_checkpoint_is_bitwise(tmp_path: Path, accumulate: int, limits: dict[str, Any]) -> None:
    def module() -> MixtureDataModule:
        streams = STABLE | {"b": Stream(Letters("b", 20, length=14), weight=1.0, decay_weight=9.0)}
        return mixture(streams, num_steps=5, batch_size=2, decay=DecayPhase(7))

    straight = seen(module(), callbacks=savers(tmp_path), accumulate_grad_batches=accumulate, **limits)
    for checkpoint in sorted(tmp_path.iterdir()):
        resumed = seen(module(), checkpoint, accumulate_grad_batches=accumulate, **limits)
        assert resumed.seen == straight.seen[len(straight.seen) - len(resumed.seen) :], checkpoint.name
        assert same(straight, resumed), checkpoint.name


def test_a_second_resume_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    straight = seen(mixture(num_steps=5), callbacks=savers(tmp_path / "first"), max_epochs=3)
    for step in (3, 5):
        seen(
            mixture(num_steps=5),
            tmp_path / "first" / f"stepstep={step}.ckpt",
            savers(tmp_path / str(step)),
            max_epochs=3,
        )
        for checkpoint in sorted((tmp_path / str(step)).glob("step*")):
            assert same(straight, seen(mixture(num_steps=5), checkpoint, max_epochs=3)), checkpoint.name


def test_epochs_do_not_matter_to_the_rows() -> None:
    assert seen(mixture(num_steps=6), max_epochs=2).seen == seen(mixture(num_steps=12)).seen
    assert seen(mixture(num_steps=12), limit_train_batches=4, max_epochs=3).seen == seen(mixture(num_steps=12)).seen


def test_a_stable_checkpoint_branches_into_decays(tmp_path: Path) -> None:
    """A branch makes the same steps as a run that planned its decay, weights and extra stream from the start."""
    seen(mixture(), callbacks=savers(tmp_path))
    sft = {"sft": Stream(Letters("s", 12), weight=0.0, decay_weight=2.0)}
    inside = [
        ("stepstep=6", 6, 8, {"max_epochs": 1}),
        ("stepstep=6", 6, 15, {"max_epochs": 1}),
        ("stepstep=6", 6, 15, {"max_steps": 9}),
    ]
    behind = [
        (name, 10, 4, {"max_epochs": 2}) for name in ("stepstep=10", "epochepoch=0")
    ]  # goes on with the next epoch
    for checkpoint, start, num_steps, limits in inside + behind:
        branch = {"decay": DecayPhase(start), "num_steps": num_steps}
        resumed = seen(mixture(STABLE | sft, **branch), tmp_path / f"{checkpoint}.ckpt", **limits)
        end = limits.get("max_steps", 14 if start == 10 else num_steps)
        planned = seen(mixture(STABLE | sft, **(branch | {"num_steps": end})))
        assert resumed.seen == planned.seen[start:] and same(resumed, planned), (checkpoint, limits)
        assert any("s:" in tiny_tokenizer().decode(row) for batch in resumed.seen for row in batch)


def warnings_of(module: MixtureDataModule, state: dict[str, Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.load_state_dict(state)
    return [str(warning.message) for warning in caught]


def test_other_rows_of_a_stream_are_told(tmp_path: Path) -> None:
    seen(mixture(), callbacks=savers(tmp_path))
    saved = torch.load(tmp_path / "stepstep=4.ckpt", weights_only=True)["MixtureDataModule"]
    (said,) = warnings_of(mixture(STABLE | {"b": Stream(Letters("c", 20, length=14), weight=1.0)}), saved)
    assert said.startswith("the training rows are not those that the checkpoint was trained on; the run goes on")
    assert warnings_of(mixture(STABLE | {"b": Stream(Letters("b", 20, length=14), weight=2.0)}), saved) == []
    assert warnings_of(mixture(STABLE | {"c": Stream(Letters("c", 5), weight=1.0)}), saved) == []
    earlier = {key: value for key, value in saved.items() if key != "contents"}
    assert warnings_of(mixture({"a": Stream(Letters("x", 30), weight=3.0)}), earlier | {"content": 0}) == []


def test_checkpoints_of_other_steps_are_refused(tmp_path: Path) -> None:
    seen(mixture(), callbacks=savers(tmp_path))
    with pytest.raises(
        ValueError,
        match="steps are of 4 rows in 1 micro-batches a rank and this run's of 8 in 1: resume with the same batch_size",
    ):
        seen(mixture(batch_size=8), tmp_path / "stepstep=4.ckpt")
    with pytest.raises(ValueError, match="of 4 rows in 1 micro-batches a rank and this run's of 4 in 2"):
        seen(mixture(batch_size=2), tmp_path / "stepstep=4.ckpt", accumulate_grad_batches=2, max_epochs=1)
    with pytest.raises(ValueError, match="written after 4 steps of an epoch and num_steps is 3"):
        seen(mixture(num_steps=3), tmp_path / "stepstep=4.ckpt")


def weights_after(batch_size: int, accumulate: int, devices: int = 1) -> torch.Tensor:
    model = Unigram().double()
    limits: dict[str, Any] = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
    module = mixture(batch_size=batch_size, packing=True, max_length=40, num_steps=4)
    fit(model, module, accumulate_grad_batches=accumulate, max_epochs=2, **limits)
    return model.scores.weight.detach()


def test_accumulation_and_ranks_change_nothing() -> None:
    reference = weights_after(8, 1)
    assert torch.allclose(weights_after(2, 4), reference, rtol=0, atol=1e-9)
    assert torch.allclose(weights_after(2, 2, devices=2), reference, rtol=0, atol=1e-9)
    assert not torch.allclose(weights_after(4, 1), reference, rtol=0, atol=1e-3)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, "streams is empty"),
    ({"a": Stream("a", 1.0), "b": Stream("b")}, {}, "stream b has no weight and a has one"),
    ({"a": Stream("a", -1.0)}, {}, "stream a: a weight must be a number from 0 on, got -1.0"),
    ({"a": Stream("a", float("nan"))}, {}, "got nan"),
    ({"a": Stream("a", 0.0)}, {}, "all weights of a phase are 0"),
    ({"a": Stream("a", 1.0, 0.0)}, {"decay": DecayPhase(3)}, "all weights of a phase are 0"),
    ({"a": Stream("a", 1.0, 2.0)}, {}, "decay.start and decay_weight belong together"),
    ({"a": Stream("a", 1.0)}, {"decay": DecayPhase(3)}, "decay.start and decay_weight belong together"),
    ({"a": Stream("a", None, 2.0)}, {"decay": DecayPhase(3)}, "stream a has a decay_weight and no weight"),
    ({"a": Stream("a", 1.0)}, {"cap": 5}, "cap limits streams that have no weights"),
    ({"a": Stream("a", 1.0, 2.0)}, {"decay": DecayPhase(-1)}, "decay.start and decay.ramp_steps at least 0"),
    ({"a": Stream("a", 1.0)}, {"num_steps": 0}, "num_steps and cap must be at least 1"),
    ({"a": Stream("a", 1.0, columns={"texts": "x"})}, {}, "columns maps unknown names texts"),
]


@pytest.mark.parametrize(("streams", "settings", "sentence"), REFUSED)
def test_weights_that_make_no_mixture_are_refused(
    streams: dict[str, Stream], settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        MixtureDataModule(tiny_tokenizer(), streams, **({"num_steps": 5} | settings))
    assert "\n" not in str(error.value)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_each_stream_is_read_its_own_way(tmp_path: Path) -> None:
    """Texts are split and learned whole. Conversations are read by the stream's ``loss_on``, and too long ones are
    dropped.
    """
    text = write(tmp_path / "text.jsonl", [{"content": "abc" * 30}, {"content": "abd"}])
    chat = write(
        tmp_path / "chat.jsonl", [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+1=", "completion": "2" * 99}]
    )
    streams = {
        "text": Stream(text, 1.0, columns={"text": "content"}, val=text),
        "answers": Stream(chat, 1.0, loss_on="assistant", val=chat),
        "whole": Stream(chat, 1.0),
    }
    module = mixture(streams, max_length=40, loss_on="all")
    rows = {name: [module.train_rows[place] for place in places] for name, places in module.stream_rows.items()}
    assert all(all(row.supervised[1:]) and len(row.ids) <= 40 for row in rows["text"] + rows["whole"])
    assert [len(rows[name]) for name in streams] == [4, 1, 1]  # 91 tokens, split, and 4; one of two; one of two
    (answer,) = rows["answers"]
    assert sum(answer.supervised) == 2  # the 2 and the end token
    assert module.dropped["train"] == 2
    assert list(module.domains) == ["text", "answers"]


def test_the_command_line_reads_streams(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    text = write(tmp_path / "text.jsonl", [{"text": f"number {index} " * (index + 1)} for index in range(12)])
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "max_steps": 7,
            "limit_train_batches": 4,
            "enable_progress_bar": False,
        }
        | {"enable_checkpointing": False, "enable_model_summary": False, "max_epochs": -1},
        "model": {"class_path": "SFTModule", "init_args": {"policy": "tiny"}},
        "data": {
            "class_path": "MixtureDataModule",
            "init_args": {
                "streams": {
                    "text": {"train": text, "weight": 0.9, "decay_weight": 0.4, "val": text},
                    "sums": {
                        "train": {"class_path": "Addition", "init_args": {"num_examples": 50}},
                        "weight": 0.0,
                        "decay_weight": 0.6,
                        "loss_on": "assistant",
                    },
                },
                "num_steps": 6,
                "decay": {"start": 5},
                "max_length": 64,
                "batch_size": 2,
            },
        },
    }
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(file)])
    assert (
        "stream text: 12 rows, 737 tokens, 61.4 a row; a row is drawn from it with probability 1.0000, 0.3762 from "
        "step 5 on" in caplog.text
    )
    assert "max_steps=7" in caplog.text
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(file), "--data.init_args.num_steps", "0"])
    assert "num_steps and cap must be at least 1" in capsys.readouterr().err
