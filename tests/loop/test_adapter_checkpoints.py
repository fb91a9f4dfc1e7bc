"""Checkpoints under adapters: what they hold, what resumes from them and from full ones, and the base that they need."""

import contextlib
import shutil
from pathlib import Path

import fixed_runs
import pytest
import torch
from fixed_runs import START, same
from resumes import read_numbers

from modules import PPOModule, SFTModule
from modules.__main__ import main
from modules.networks.bases import leave_out_bases, put_back_bases
from modules.networks.critic import Value
from modules.networks.lora import Lora
from modules.networks.policy import Policy
from modules.rewards import RegexFormat

AVERAGED = {"class_path": "AveragedWeights", "init_args": {"decay": 0.5}}
SETTINGS = ["--model.lora.r=2", "--model.lora.alpha=4", "--model.lora.dropout=0.5"]
SETTINGS += ["--data.val=rows.jsonl", "--trainer.val_check_interval=2"]


def load(file: Path) -> dict:
    return torch.load(file, weights_only=True)


def write_as_before(checkpoint: dict, module: torch.nn.Module, file: Path) -> Path:
    """Write a checkpoint as it was before frozen weights were left out."""
    for name in ("state_dict", "current_model_state"):
        if name in checkpoint:
            checkpoint[name] = module.state_dict() | checkpoint[name]
    del checkpoint["alignment"]["bases"]
    torch.save(checkpoint, file)
    return file


def fit(folder: Path, *arguments: str) -> dict:
    """Train adapters and their average for six steps with validations."""
    *run, callbacks = fixed_runs.RUNS["sft"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fixed_runs.RUNS, "adapters", (*run, [AVERAGED, *callbacks]))
        return fixed_runs.fit("adapters", folder, *SETTINGS, *arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "whole"
    fit(folder)
    return folder


def test_a_checkpoint_holds_adapters_alone_and_names_their_base(whole):
    checkpoint = load(whole / "checkpoints/step3.ckpt")
    layers = sum("down_proj" in name for name in Policy(START).state_dict())
    for part in ("state_dict", "current_model_state"):
        assert len(checkpoint[part]) == layers * 7 * 2  # linear layers of a block, A and B
        assert all("lora_" in name for name in checkpoint[part])
    assert checkpoint["alignment"]["bases"] == {
        "policy": {"path": START, "weights": Policy(START, lora=Lora(r=3)).base_id}
    }


def test_the_critic_has_a_base_of_its_own_and_its_head_is_kept():
    lora = Lora(r=2)
    other = {"policy": "tiny", "lora": lora, "value": Value(model="tiny-addition")}
    module, checkpoint = PPOModule(reward=RegexFormat("a"), **other), {}
    checkpoint["state_dict"] = module.state_dict()
    said = leave_out_bases(module, checkpoint)
    assert {place: base["path"] for place, base in said.items()} == {
        "policy": "tiny",
        "critic.backbone": "tiny-addition",
    }
    learned = {name for name, weight in module.named_parameters() if weight.requires_grad}
    assert set(checkpoint["state_dict"]) == learned | {"critic.mean", "critic.std"}
    put_back_bases(module, checkpoint, said)
    assert same(dict(checkpoint["state_dict"]), dict(module.state_dict()))


@pytest.mark.parametrize("as_before", [False, True], ids=["adapters", "full"])
def test_a_run_goes_on_bit_for_bit_from_adapters_and_from_a_full_checkpoint(whole, tmp_path, as_before):
    checkpoint = whole / "checkpoints/step3.ckpt"
    if as_before:
        module = SFTModule(START, lora=Lora(r=2, alpha=4.0))
        checkpoint = write_as_before(load(checkpoint), module, tmp_path / "full.ckpt")
    resumed = fit(tmp_path / "resumed", "--ckpt_path", str(checkpoint))
    end = load(whole / "checkpoints/last.ckpt")
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert same(end[part], resumed[part]), part
    assert read_numbers(tmp_path / "resumed").items() <= read_numbers(whole).items()


def test_validate_measures_the_weights_of_the_checkpoint(whole, tmp_path):
    for file in ("config.yaml", "rows.jsonl"):
        shutil.copy(whole / file, tmp_path)
    checkpoint = str(whole / "checkpoints/last.ckpt")
    with contextlib.chdir(tmp_path):
        main(["validate", "--config=config.yaml", *SETTINGS, "--ckpt_path", checkpoint])
    found, numbers = read_numbers(tmp_path), read_numbers(whole)
    (loss,) = (value for (_, name), value in found.items() if name == "val/loss")
    steps = {step: value for (step, name), value in numbers.items() if name == "val/loss"}
    assert float(loss) == pytest.approx(float(steps["5"]), abs=1e-6)  # of the average, which the checkpoint holds
    assert float(loss) != pytest.approx(float(steps["0"]), abs=1e-3)


@pytest.mark.parametrize("as_before", [False, True], ids=["adapters", "full"])
def test_another_base_is_refused(whole, tmp_path, capsys, as_before):
    other = Policy(START)
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    checkpoint = whole / "checkpoints/step3.ckpt"
    if as_before:
        module = SFTModule(START, lora=Lora(r=2, alpha=4.0))
        checkpoint = write_as_before(load(checkpoint), module, tmp_path / "full.ckpt")
    policy = str(tmp_path / "other")
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", "--model.policy", policy, "--ckpt_path", str(checkpoint))
    trained_on = "another model" if as_before else f"'{START}'"
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert error == (
        f"error: the checkpoint's adapters were trained on {trained_on}, and policy: '{policy}' has other weights: "
        "name the model that they were trained on"
    )
