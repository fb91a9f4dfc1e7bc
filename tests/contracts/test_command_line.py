"""What a run leaves: its configuration, its checkpoints, its predictions."""

import json
import re
from itertools import chain, permutations
from pathlib import Path

import pytest
import torch
import yaml
from few_rows import few_rows

from modules import GRPOModule, SFTModule
from modules.__main__ import main
from modules.cli.parser import sort_arguments
from modules.cli.run import write_warning

CONFIGS = Path(__file__).parents[2] / "configs"
QUICK = [
    "--trainer.accelerator",
    "cpu",
    "--trainer.devices",
    "1",
    "--trainer.enable_progress_bar",
    "false",
    "--data.val",
    "null",
]
EVERY_100 = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=100"]
EVERY_100 += [f"--trainer.callbacks.{setting}" for setting in ("save_last=true", "enable_version_counter=false")]
SHORT = [*QUICK, "--data.train.num_examples", "40", "--trainer.max_epochs", "1"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty folder, because the shipped configs write below the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shipped(command: str, method: str, *arguments: str) -> None:
    main([command, "--config", few_rows(method), f"--out=runs/{method}", *arguments])


def test_predict_writes_every_scored_completion():
    shipped("predict", "grpo", *SHORT[:-2], "--model.num_generations", "2", "--trainer.limit_predict_batches", "1")
    rows = [json.loads(line) for line in Path("runs/grpo/predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 80
    assert list(rows[0]) == ["uid", "prompt", "completion", "answer", "reward", "rewards", "finish", "num_tokens"]
    assert rows[0]["uid"] == rows[1]["uid"] == "addition-training#0#0"
    assert rows[0]["rewards"] == {"numeric_match": rows[0]["reward"]}
    assert all(0 < row["num_tokens"] <= 8 for row in rows)


def test_a_second_run_leaves_the_last_checkpoint_of_the_first():
    for seed in ("1", "2"):
        shipped(
            "fit",
            "grpo",
            *SHORT,
            "--model.num_generations",
            "2",
            "--data.prompts_per_phase",
            "2",
            "--seed_everything",
            seed,
        )
    for folder in ("runs/grpo", "runs/grpo-2"):
        assert [path.name for path in Path(folder, "checkpoints").iterdir()] == ["last.ckpt"]


def test_the_config_is_that_of_the_last_run_that_began(capsys):
    small = [*SHORT, "--model.num_generations", "2", "--data.prompts_per_phase", "2"]
    shipped("fit", "grpo", *small, "--seed_everything", "5")
    saved = Path("runs/grpo/config.yaml")
    assert yaml.safe_load(saved.read_text())["seed_everything"] == 5
    for refused in (["--trainer.precision", "bf16-true"], ["--trainer.accumulate_grad_batches", "300"]):
        with pytest.raises(SystemExit):
            shipped("fit", "grpo", *small, "--seed_everything", "6", *refused)
        assert yaml.safe_load(saved.read_text())["seed_everything"] == 5
    shipped(
        "fit",
        "grpo",
        *small,
        "--ckpt_path",
        "runs/grpo/checkpoints/last.ckpt",
        "--trainer.max_epochs",
        "2",
        "--seed_everything",
        "7",
    )
    config = yaml.safe_load(saved.read_text())
    assert (config["seed_everything"], config["ckpt_path"]) == (7, None)
    shipped("validate", "grpo", *QUICK[:-2], "--data.val.num_examples", "4", "--seed_everything", "8")
    assert yaml.safe_load(saved.read_text())["seed_everything"] == 7


def test_no_config_is_written_without_a_folder_and_a_logger():
    nothing = ["--out=null", "--trainer.logger=false", "--trainer.callbacks=null"]
    shipped("fit", "sft", *SHORT, *nothing, "--trainer.enable_checkpointing=false")
    assert list(Path().iterdir()) == []


def test_a_saved_config_runs_again():
    shipped("fit", "sft", *SHORT)
    main(["fit", "--config", "runs/sft/config.yaml"])


@pytest.mark.parametrize(
    ("method", "kind", "killed", "left", "small"),
    [
        ("sft", SFTModule, 102, 100, ["--data.batch_size", "1", "--data.train.num_examples", "60", *EVERY_100]),
        ("grpo", GRPOModule, 12, 10, ["--data.prompts_per_phase", "2", "--model.num_generations", "2"]),
    ],
)
def test_a_killed_run_has_lost_only_its_last_steps(monkeypatch, method, kind, killed, left, small):
    step = kind.training_step

    def until_killed(self, batch, batch_idx):
        if self.global_step == killed:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(kind, "training_step", until_killed)
    with pytest.raises(RuntimeError, match="killed"):
        shipped("fit", method, *QUICK, *small)
    assert torch.load(f"runs/{method}/checkpoints/last.ckpt", weights_only=True)["global_step"] == left


def test_own_worked_answers_raise_no_alarm():
    """Answers are written like GSM8K's. The training reward and the gold reward of the shipped config agree on them."""
    from jsonargparse import ArgumentParser

    from modules.types import Completion, Reward, Rollout

    config = yaml.safe_load((CONFIGS / "grpo.yaml").read_text())
    (gold,) = (
        call["init_args"]["gold"] for call in config["trainer"]["callbacks"] if call["class_path"] == "Overoptimization"
    )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Reward, "proxy")
    parser.add_subclass_arguments(Reward, "gold")
    rewards = parser.instantiate(parser.parse_object({"proxy": config["model"]["init_args"]["reward"], "gold": gold}))
    texts = [
        "48/2 = 24\n48 + 24 = 72\n#### 72",
        "In total she sold 48 + 24 = 72 clips.",
        "72",
        "so it is 1,080.",
        "70",
        "",
    ]
    answers = ["72", "72", "72", "1080", "72", "72"]
    rollouts = [
        Rollout("u", "p", [1], a, Completion([1], [0.0], t, "stop"), 0, {}, None)
        for t, a in zip(texts, answers, strict=True)
    ]
    assert type(rewards.proxy) is not type(rewards.gold)
    assert rewards.proxy(rollouts) == rewards.gold(rollouts) == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_a_step_without_numbers_has_no_empty_list(capsys):
    """The first phase has no numbers before its end."""
    shipped(
        "fit",
        "grpo",
        *SHORT,
        "--model.num_generations",
        "2",
        "--data.prompts_per_phase",
        "2",
        "--trainer.enable_progress_bar=true",
    )
    assert re.search(r"^step 1 of \d+, \d+ s left$", capsys.readouterr().out, flags=re.MULTILINE)


def test_a_warning_of_ours_is_one_line_without_code():
    line = write_warning("too long", UserWarning, str(CONFIGS.parent / "callbacks/samples.py"), 3, None)
    assert line == "warning: too long\n"
    assert write_warning("old", FutureWarning, "/lib/torch/x.py", 3) == "/lib/torch/x.py:3: FutureWarning: old\n"


GROUPS = [["--model.beta=0.5"], ["--model", "DPOModule"], ["--data.batch_size", "3"], ["--data=PreferenceDataModule"]]


@pytest.mark.parametrize("overlay", [[], ["--config", str(CONFIGS / "overlays/lora.yaml")]], ids=["", "overlay"])
def test_the_order_of_options_does_not_matter(capsys, overlay):
    orders = [["fit", *chain.from_iterable(order)] for order in permutations([*GROUPS, overlay])]
    for order in orders:
        found = sort_arguments(order)
        assert found[4 : 4 + len(overlay)] == overlay and sorted(found) == sorted(order)
        place = {argument: number for number, argument in enumerate(found)}
        assert place["--model"] < place["--model.beta=0.5"]
        assert place["--data=PreferenceDataModule"] < place["--data.batch_size"]
    printed = set()
    for order in (orders[0], orders[-1]):
        with pytest.raises(SystemExit) as end:
            main([*order, "--print_config"])
        assert end.value.code == 0
        printed.add(capsys.readouterr().out)
    (config,) = map(yaml.safe_load, printed)
    assert config["model"]["init_args"]["beta"] == 0.5 and config["data"]["init_args"]["batch_size"] == 3


def test_null_sets_an_option_of_a_class_to_nothing(capsys):
    given = ["--model.validation.accuracy", "null", "--model.reward.pattern=null"]
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(CONFIGS / "tiny/grpo.yaml"), *given, "--print_config"])
    assert end.value.code == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert model["validation"] == {"accuracy": None, "generations": 1, "budgets": []}
    assert model["reward"]["init_args"]["pattern"] is None  # not a search for the word None


def test_a_callback_whose_default_is_no_plain_value_is_written_into_the_configuration():
    timer = ["--trainer.callbacks=Timer", "--trainer.callbacks.duration=00:01:00:00"]
    main(["fit", "--config", few_rows("sft"), *SHORT, *timer, "--out=run"])
    (found,) = yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["callbacks"]
    assert found["init_args"] == {"duration": "00:01:00:00", "interval": "step", "verbose": True}


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("grpo", ["--model=SFTModule", "--data=InstructionDataModule"]),
        ("sft", ["--model=GRPOModule", "--data=VerifiableDataModule", "--model.reward=ExactMatch"]),
    ],
)
def test_another_method_keeps_the_sampling(capsys, tmp_path, method, changed):
    own = tmp_path / "own.yaml"
    own.write_text("model: {init_args: {sampling: {temperature: 0.5, max_completion_length: 7}}}")
    with pytest.raises(SystemExit) as end:
        main(["fit", f"--config={CONFIGS}/tiny/{method}.yaml", f"--config={own}", *changed, "--print_config"])
    assert end.value.code == 0
    sampling = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["sampling"]
    assert (sampling["temperature"], sampling["max_completion_length"], sampling["top_p"]) == (0.5, 7, 1.0)


def test_a_class_that_replaces_that_of_a_configuration_stays_in_its_place():
    given = ["fit", "--config", few_rows("grpo"), "--model.beta=0.5", "--model=DPOModule", "--data.val=-1", "--data=A"]
    assert sort_arguments(given) == given
    assert sort_arguments([given[0], *given[3:], *given[1:3]]) == given


@pytest.mark.parametrize(
    "watches",
    [
        ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"],
        ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val/loss"],
        ["--model.scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.scheduler.monitor=val/loss"],
    ],
    ids=["EarlyStopping", "ModelCheckpoint", "ReduceLROnPlateau"],
)
def test_a_monitor_of_a_validation_that_the_run_lacks_is_refused_before_the_first_step(capsys, watches, request):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", few_rows("sft"), *SHORT, "--data.val=null", *watches])
    told, name = capsys.readouterr(), request.node.callspec.id
    assert end.value.code == 1 and "step 1" not in told.out
    assert f"error: {name} watches val/loss, and this run has no validation: set data.val" in told.err


def test_a_misspelt_monitor_ends_the_run_in_one_sentence(capsys):
    stopping = "--trainer.callbacks+={class_path: EarlyStopping, init_args: {monitor: train/lss}}"
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", few_rows("sft"), *SHORT, stopping])
    assert end.value.code == 1
    assert "error: Early stopping conditioned on metric `train/lss`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["fit"], "fit needs a method and data: add --config configs/tiny/sft.yaml, or another YAML of configs"),
        (["fit", "--model=SFTModule", "--model.policy=tiny"], "fit needs data: add --data.train my.jsonl"),
        (["fit", "configs/tiny/sft.yaml"], "configs/tiny/sft.yaml stands alone: write --config before it"),
        (["configs/sft.yaml"], "configs/sft.yaml is no command: write fit --config before it, or another command"),
        (
            ["train", "--config=x.yaml"],
            "there is no command 'train'; the commands are fit, validate, test, predict, chat, merge; did you mean fit?",
        ),
        (
            ["fit", "--config", "my.jsonl"],
            "--config my.jsonl: rows are no configuration; name them with --data.train my.jsonl",
        ),
        (["fit", "--config", "bad.yaml"], "bad.yaml:2: this file is no YAML; --config takes a YAML of options"),
        (["chat"], "chat needs a model: add --policy FOLDER, such as the export of a run"),
        (["chat", "--polcy=tiny"], "unrecognized arguments: --polcy=tiny; did you mean --policy?"),
        (
            ["chat", "--policy=tiny", "--form=chatt"],
            "Parser key \"form\": expected one of alpaca, chat, text, got 'chatt'; did you mean chat?",
        ),
        (
            ["chat", "--policy=nowhere", "--temperature=-1", "--max_completion_length=0"],
            "chat: temperature must be >= 0, got -1.0; max_completion_length must be >= 1, got 0",
        ),
        (["chat", "--policy=run"], "policy: 'run' is a folder without config.json; its model is run/export"),
    ],
)
def test_a_wrong_command_line_is_told_what_to_write(capsys, here, given, sentence):
    (here / "bad.yaml").write_text("a: [1\nb: 2\n")
    (here / "run/export").mkdir(parents=True)
    (here / "run/export/config.json").touch()
    with pytest.raises(SystemExit):
        main(given)
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {sentence}"


@pytest.mark.parametrize(("callbacks", "exported"), [("null", True), ("[]", False)])
def test_an_empty_list_of_callbacks_means_none(capsys, callbacks, exported):
    shipped(
        "fit", "sft", *QUICK, "--data.train.num_examples=4", "--trainer.max_steps=1", f"--trainer.callbacks={callbacks}"
    )
    assert Path("runs/sft/export").exists() == exported
    assert ("no model exported: list Export in trainer.callbacks" in capsys.readouterr().out) != exported
