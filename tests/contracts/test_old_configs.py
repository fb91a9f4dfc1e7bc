"""A ``config.yaml`` that an earlier version saved still runs, although class paths and options have moved since."""

import importlib
from pathlib import Path

import pytest
import yaml

from modules.__main__ import main
from modules.cli.renamed import FUNCTIONS, MODULES, renew

SAVED = Path(__file__).parent / "configs_v1"
SHORT = [
    "--trainer.max_steps=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--data.train.num_examples=40",
]


@pytest.mark.parametrize("name", ["dpo", "grpo", "ppo"])
def test_a_fit_runs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    small = ["--data.batch_size=4"] if name == "dpo" else ["--data.prompts_per_phase=2", "--model.num_generations=2"]
    main(["fit", f"--config={SAVED / name}.yaml", *SHORT, *small])
    assert Path(f"runs/{name}/export/config.json").is_file()


@pytest.mark.parametrize(("name", "command"), [("label", "predict"), ("knowledge", "predict")])
def test_a_prediction_is_read(capsys, name, command):
    with pytest.raises(SystemExit) as stop:
        main([command, f"--config={SAVED / name}.yaml", "--print_config"])
    assert stop.value.code == 0
    read = yaml.safe_load(capsys.readouterr().out)
    old = yaml.safe_load((SAVED / f"{name}.yaml").read_text())
    assert old["model"]["class_path"].split(".")[-1] == read["model"]["class_path"].split(".")[-1]


def test_every_new_place_is_there():
    for module in MODULES.values():
        importlib.import_module(module)
    for function in FUNCTIONS.values():
        module, _, name = function.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))


def test_only_whole_class_paths_are_renewed():
    assert renew("modules.labels.Mine") == "modules.labels.Mine"
    assert renew("my.modules.label") == "my.modules.label"
    assert renew(["modules.label.LabelModule", 3]) == ["modules.predict.label.LabelModule", 3]


def test_options_of_ppo_are_in_their_groups(capsys):
    config = renew(yaml.safe_load((SAVED / "ppo.yaml").read_text()))["model"]["init_args"]
    assert config["gae"] == {"gamma": 1.0, "lam": 0.95, "whiten_rewards": False}
    assert config["clip"] == {"ratio": 0.2, "value": 0.2}
    assert config["kl"]["coef"] == 0.05 and config["kl"]["adaptive"]["target"] == 6.0
    assert config["value"] == {"warmup_phases": 0, "coef": 0.1}
    assert "missing_eos" not in config
