"""Merging: averages by hand, the identity, refusals by the first difference, and the command as a recipe runs it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from modules import RewardModule, SFTModule
from modules.__main__ import main
from modules.networks.lora import Lora
from modules.networks.merging import average_models
from modules.networks.policy import Policy
from modules.networks.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


def save(folder: Path, fill: float | None = None, seed: int = 0) -> str:
    """Save the tiny model with its tokenizer; with ``fill``, every weight is that number."""
    model = tiny_model(seed=seed)
    if fill is not None:
        for weight in model.parameters():
            torch.nn.init.constant_(weight, fill)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, 1.5),  # (0.5 + 1 + 3) / 3
        ([1.0, 2.0, 1.0], 1.375),  # (0.5 + 2 + 3) / 4
        ([0.5, 0.25, 0.25], 1.25),  # 0.25 + 0.25 + 0.75
    ],
)
def test_the_average_by_hand(tmp_path: Path, weights: list[float] | None, expected: float) -> None:
    parts = [save(tmp_path / str(number), fill) for number, fill in enumerate((0.5, 1.0, 3.0))]
    merged = average_models(parts, weights).model
    assert len(merged.state_dict()) == 39
    assert all(torch.equal(weight, torch.full_like(weight, expected)) for weight in merged.state_dict().values())


@pytest.mark.parametrize("weights", [[0.3, 0.7], [1.0, 1.0, 1.0], [0.1, 0.2, 0.7, 5.0]])
def test_equal_models_give_themselves_bit_for_bit(tmp_path: Path, weights: list[float]) -> None:
    paths = [save(tmp_path / "one"), "tiny", str(tmp_path / "one"), "tiny"][: len(weights)]
    arguments = ["--models", *paths, "--weights", *map(str, weights), "--out", str(tmp_path / "out")]
    main(["merge", *arguments])
    found, expected = weights_of(tmp_path / "out"), tiny_model().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def other_width(folder: Path) -> None:
    config = tiny_model().config
    config.intermediate_size = 256
    LlamaForCausalLM(config).save_pretrained(folder)


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))


def other_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))


def other_template(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template + " "
    tokenizer.save_pretrained(folder)


def adapters_alone(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


def broken(folder: Path) -> None:
    model = tiny_model()
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (other_width, r"layers.0.mlp.gate_proj.weight is 384 x 128 in one and 256 x 128 in the other"),
        (other_config, "rms_norm_eps of the config is 1e-06 in one and 0.5 in the other"),
        (other_tokens, r"token '[ab]' has number \d+ in one tokenizer and \d+ in the other"),
        (other_template, "their chat templates differ"),
        (adapters_alone, "holds adapters without their model; name the export of the run"),
        (broken, "log-probabilities from its hidden states are off by nan nats"),
        (shutil.rmtree, "models: '.*' is not 'tiny'"),
    ],
)
def test_what_differs_is_refused(
    tmp_path: Path, change: Callable[[Path], None], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "other")
    change(tmp_path / "other")
    with pytest.raises(SystemExit) as stop:
        main(["merge", "--models", "tiny", str(tmp_path / "other"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and len(said) == 1
    assert re.search(sentence, said[0]), said
    assert not (tmp_path / "out").exists()


def test_a_reward_model_and_bad_numbers_are_refused(tmp_path: Path) -> None:
    RewardModule("tiny").save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match="is a classifier"):
        average_models(["tiny", str(tmp_path / "reward")])
    with pytest.raises(ValueError, match="at least two models, got 1"):
        average_models(["tiny"])
    with pytest.raises(ValueError, match="got 1 weights for 2 models"):
        average_models(["tiny", "tiny"], [1.0])
    with pytest.raises(ValueError, match="weights must be above 0 and finite"):
        average_models(["tiny", "tiny"], [1.5, -0.5])


def test_exports_with_adapters_are_averaged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = SFTModule("tiny", lora=Lora(r=2))
    for weight in module.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    module.save_pretrained(tmp_path / "adapted")
    merged = average_models(["tiny", str(tmp_path / "adapted")]).model.state_dict()
    start, end, name = tiny_model().state_dict(), weights_of(tmp_path / "adapted"), "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(start[name], end[name])
    torch.testing.assert_close(merged[name], (start[name] + end[name]) / 2, rtol=0, atol=1e-8)


def test_a_stage_of_a_recipe_merges_once(tmp_path: Path) -> None:
    (tmp_path / "configs/recipes/mix").mkdir(parents=True)
    stage = tmp_path / "configs/recipes/mix/01-merge-both.yaml"
    stage.write_text("models: [tiny, tiny-addition]\nout: runs/mix/both\n")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "configs/recipes/shared.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv/.complete").touch()
    # A make that knows of one above it, as under `make test`, tells of folders behind the last line.
    command = ["make", "--no-print-directory", "recipe", "NAME=mix"]
    runs = [subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True) for _ in range(2)]
    assert [run.stdout.splitlines()[-1] for run in runs] == ["recipe: mix ok"] * 2
    assert "merge: runs/mix/both: the average of tiny, tiny-addition" in runs[0].stdout
    assert "01-merge-both: done before, skipped" in runs[1].stdout and "merge: runs" not in runs[1].stdout
    Policy(str(tmp_path / "runs/mix/both"))


def test_only_an_export_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    both = ["merge", "--models", "tiny", "tiny-addition", "--out", str(out)]
    main(both)
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["made_by"] == "merge"
    assert lineage["parents"] == [{"policy": name, "weights": None} for name in ("tiny", "tiny-addition")]
    before = weights_of(out)
    main([*both, "--weights", "3", "1"])
    assert not torch.equal(weights_of(out)["lm_head.weight"], before["lm_head.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    Policy(str(out))  # whose tokenizer and config fit
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("irreplaceable")
    for target, why in ((tmp_path / "mine", "which no export has written"), (out, "from which this run reads a model")):
        with pytest.raises(SystemExit):
            main(["merge", "--models", "tiny", str(out), "--out", str(target)])
        assert why in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
