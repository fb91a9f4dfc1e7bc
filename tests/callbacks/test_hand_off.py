"""HandOff before real runs: exports and files of rows that fit, and one sentence for each that does not fit."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from callbacks import Export, HandOff
from datamodules import Addition, InstructionDataModule
from modules import RewardModule, SFTModule
from modules.networks.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export ``policy`` and ``reward``; the reward model is normalised."""
    folder = tmp_path_factory.mktemp("exports")
    SFTModule("tiny").policy.save_pretrained(folder / "policy")
    RewardModule("tiny").save_pretrained(folder / "reward")
    change(folder / "reward", reward_mean=0.5, reward_std=2.0)
    return folder


@pytest.fixture
def check(tmp_path: Path, exports: Path) -> Callable[..., None]:
    """Give check(mend, name): ``mend`` changes a copy of an export, which a run then takes over."""

    def run(mend: Callable[[Path], object], name: str = "policy") -> None:
        shutil.copytree(exports / name, tmp_path / name)
        mend(tmp_path / name)
        hand_over(**{"01-fit-it": tmp_path / name})

    return run


def change(folder: Path, **values: object) -> None:
    """Set values of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )


def hand_over(**inputs: Path) -> None:
    module = SFTModule("tiny")
    callback = HandOff({stage: str(path) for stage, path in inputs.items()})
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[callback], enable_checkpointing=False)
    callback.setup(trainer, module, "fit")


def save_tokenizer(folder: Path, template: str | None = None, added: str | None = None) -> None:
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    if added is not None:
        tokenizer.add_tokens([added])
    tokenizer.save_pretrained(folder)


def test_what_fits_passes(tmp_path: Path, exports: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    hand_over(
        **{
            "01-fit-sft": exports / "policy",
            "02-predict-rows": tmp_path / "rows.jsonl",
            "03-fit-reward": exports / "reward",
        }
    )


def test_a_reward_model_may_have_a_token_more(check: Callable[..., None]) -> None:
    check(lambda folder: save_tokenizer(folder, added="<|more|>"), "reward")


@pytest.mark.parametrize(
    ("mend", "sentence"),
    [
        (lambda folder: shutil.rmtree(folder), "is not there"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json, so it is no exported model"),
        (lambda folder: (folder / "config.json").write_text("{"), "has a damaged config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer that can be read"),
        (lambda folder: save_tokenizer(folder, template="{{ messages }}"), "has another chat template than the policy"),
        (
            lambda folder: save_tokenizer(folder, added="<|more|>"),
            r"has another tokenizer than the policy \(0 tokens .* 1 more, such as '<\|more\|>'\)",
        ),
    ],
)
def test_a_policy_that_does_not_fit(check: Callable[..., None], mend: Callable[[Path], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"^hand-off from 01-fit-it: \S+/policy {sentence}.*; run 01-fit-it again$"):
        check(mend)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"reward_mean": None, "reward_std": None}, "reward_mean nan, reward_std nan"),
        ({"reward_std": 0.0}, "reward_mean 0.5, reward_std 0.0"),
        ({"reward_mean": float("inf")}, "reward_mean inf, reward_std 2.0"),
    ],
)
def test_a_reward_model_without_normalisation(
    check: Callable[..., None], values: dict[str, object], found: str
) -> None:
    with pytest.raises(
        ValueError,
        match=rf"/reward is a reward model without normalisation \({found} in config.json; .*; run 01-fit-it again$",
    ):
        check(lambda folder: change(folder, **values), "reward")


def test_tokens_that_moved(check: Callable[..., None]) -> None:
    def swap(folder: Path) -> None:
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        file.write_text(json.dumps(content))

    with pytest.raises(
        ValueError,
        match=r"/reward has another tokenizer than the policy \(2 tokens gone or moved, 0 more, such as '[ab]'\)",
    ):
        check(swap, "reward")


def test_files_of_rows(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^hand-off from 02-predict-rows: \S+/rows.jsonl is not there; run 02-predict-rows again$"
    ):
        HandOff({"02-predict-rows": str(tmp_path / "rows.jsonl")})
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(ValueError, match=r"rows.jsonl is empty; run 02-predict-rows again$"):
        HandOff({"02-predict-rows": str(tmp_path / "rows.jsonl")})


def fit_from(policy: str, folder: Path, **options: Any) -> Path:
    """Fit a step from ``policy`` and return the export."""
    module = SFTModule(policy, optimizer=partial(torch.optim.SGD, lr=0.1))
    data = InstructionDataModule(train=Addition(8), batch_size=8)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoint = options.pop("ckpt_path", None)
    trainer = Trainer(accelerator="cpu", default_root_dir=folder, callbacks=[Export()], **quiet | options)
    trainer.fit(module, data, ckpt_path=checkpoint)
    return folder / "export"


def test_an_export_says_what_it_started_from(tmp_path: Path) -> None:
    base = fit_from("tiny", tmp_path / "base", max_steps=1, enable_checkpointing=False)
    second = fit_from(str(base), tmp_path / "second", max_steps=1, enable_checkpointing=False)
    third = fit_from(str(base), tmp_path / "third", max_steps=1, enable_checkpointing=False)
    inputs = {"01-fit-base": str(base), "02-fit-rl": str(second), "03-fit-sft": str(third)}
    HandOff(inputs, {"01-fit-base": "tiny", "02-fit-rl": str(base), "03-fit-sft": str(base)})
    shutil.copytree(base, tmp_path / "copy")
    HandOff(inputs, {"03-fit-sft": str(tmp_path / "copy")})  # the same weights in another place
    for start in (str(second), "tiny"):
        with pytest.raises(
            ValueError,
            match=rf"^hand-off from 03-fit-sft: {third} was made from {base} and not from {start}; run 03-fit-sft again$",
        ):
            HandOff(inputs, {"03-fit-sft": start})
    with pytest.raises(ValueError, match=r"started_from names 04-fit-x, which is none of the inputs: 01-fit-base, .*"):
        HandOff(inputs, {"04-fit-x": str(base)})
    fit_from("tiny", tmp_path / "base", max_steps=2, enable_checkpointing=False)  # another base in its place
    with pytest.raises(ValueError, match=f"was made from {base}, which holds other weights than {base} now"):
        HandOff(inputs, {"03-fit-sft": str(base)})
    (third / "lineage.json").unlink()
    with pytest.raises(ValueError, match=r"third/export does not say what it started from \(no lineage.json"):
        HandOff(inputs, {"03-fit-sft": str(base)})


def test_a_resumed_fit_started_from_what_the_first_one_did(tmp_path: Path) -> None:
    base = fit_from("tiny", tmp_path / "base", max_steps=1, enable_checkpointing=False)
    shutil.copytree(base, tmp_path / "kept")
    fit_from(str(base), tmp_path / "next", max_steps=1)
    (checkpoint,) = (tmp_path / "next").rglob("*.ckpt")
    fit_from("tiny", tmp_path / "base", max_steps=2, enable_checkpointing=False)
    export = fit_from(str(base), tmp_path / "next", max_steps=2, ckpt_path=str(checkpoint))
    HandOff({"02-fit-it": str(export)}, {"02-fit-it": str(tmp_path / "kept")})
