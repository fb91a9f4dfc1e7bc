"""A ``config.yaml`` that an earlier version saved still runs: class paths and options have moved since."""

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
    "--data.val.num_examples=40",
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
    for function, _ in FUNCTIONS.values():
        module, _, name = function.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))


def test_only_whole_class_paths_are_renewed():
    assert renew("modules.labels.Mine") == "modules.labels.Mine"
    assert renew("my.modules.label") == "my.modules.label"
    assert renew(["modules.label.LabelModule", 3]) == ["modules.predict.label.LabelModule", 3]


def test_options_of_ppo_are_in_their_groups():
    config = renew(yaml.safe_load((SAVED / "ppo.yaml").read_text()))["model"]["init_args"]
    assert config["gae"] == {"gamma": 1.0, "lam": 0.95, "whiten_rewards": False}
    assert config["clip"] == {"ratio": 0.2, "value": 0.2}
    assert config["kl"]["coef"] == 0.05 and config["kl"]["adaptive"]["target"] == 6.0
    assert config["value"] == {"warmup_phases": 0, "coef": 0.1}
    assert config["incentives"] == {"entropy": 0.0, "ptx": 0.0}
    assert config["validation"]["generations"] == 1 and "val_generations" not in config


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (
            "PPOModule",
            {"missing_eos_penalty": 0.5, "replace_missing_eos": True},
            {"incentives": {"missing_eos": {"penalty": 0.5, "replace": True}}},
        ),
        ("PPOModule", {"missing_eos_penalty": None, "replace_missing_eos": True}, {}),
        ("PPOModule", {"missing_eos": {"penalty": 0.5}}, {"incentives": {"missing_eos": {"penalty": 0.5}}}),
        ("GRPOModule", {"accuracy": "ExactMatch"}, {"validation": {"accuracy": "ExactMatch"}}),
        ("MixtureDataModule", {"decay_start": 5, "ramp_steps": 2}, {"decay": {"start": 5, "ramp_steps": 2}}),
        ("MixtureDataModule", {"decay_start": None, "ramp_steps": 0}, {}),
    ],
)
def test_options_move_into_their_group_and_a_group_that_was_off_stays_off(name, old, new):
    assert renew({"class_path": name, "init_args": old})["init_args"] == new


def test_a_setting_that_todays_function_has_not_is_refused(tmp_path, capsys):
    text = (SAVED / "grpo.yaml").read_text()
    assert "eps: 0.0001" in text
    (tmp_path / "old.yaml").write_text(text.replace("eps: 0.0001", "eps: 0.5"))
    with pytest.raises(SystemExit):
        main(["fit", f"--config={tmp_path / 'old.yaml'}"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "GroupZScore had {'eps': 0.5} and modules.functional.advantages.group_zscore has {'eps': 0.0001}" in said


def test_functions_of_ours_have_short_names(tmp_path, capsys):
    (tmp_path / "short.yaml").write_text("model: {init_args: {advantage: leave_one_out}}\n")
    tiny = Path(__file__).parents[2] / "configs/tiny"

    def printed(name: str, *arguments: str) -> dict:
        with pytest.raises(SystemExit) as stop:
            main(["fit", f"--config={tiny / name}.yaml", *arguments, "--print_config"])
        assert stop.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]

    advantages = "modules.functional.advantages"
    given = printed("grpo", "--model.advantage", "group_center", "--model.kl_loss=k2")
    assert given["advantage"] == f"{advantages}.group_center" and given["kl_loss"] == "modules.functional.kl.k2"
    assert printed("grpo", f"--config={tmp_path / 'short.yaml'}")["advantage"] == f"{advantages}.leave_one_out"
    assert printed("ppo", "--model.kl.loss", "weighted_k3")["kl"]["loss"] == "modules.functional.kl.weighted_k3"
    with pytest.raises(SystemExit):
        main(["fit", f"--config={tiny / 'grpo'}.yaml", "--model.advantage=group_centre"])
    assert "'group_centre'; did you mean group_center" in capsys.readouterr().err


def test_a_bound_in_tokens_is_refused_unless_it_was_the_default():
    old = {"class_path": "modules.rollout.in_process.InProcessEngine", "init_args": {"max_batch_tokens": 65536}}
    assert renew(old) == {"class_path": "modules.rollout.engine.InProcessEngine", "init_args": {}}
    old["init_args"]["max_batch_tokens"] = 4096
    with pytest.raises(ValueError, match="no max_batch_tokens any more, which was 4096: set max_cache_gb"):
        renew(old)
