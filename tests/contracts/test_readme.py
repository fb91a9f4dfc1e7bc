"""The README tells the truth: its metric table against what runs log, and the commands and files it names."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modules.__main__ import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SHORT = [
    "--trainer.accelerator",
    "cpu",
    "--trainer.devices",
    "1",
    "--trainer.log_every_n_steps",
    "1",
    "--trainer.enable_progress_bar",
    "false",
]
LIMITS = {
    "sft": [
        *(
            "--trainer.limit_train_batches=3",
            "--trainer.max_epochs=1",
            "--trainer.max_steps=-1",
            "--trainer.callbacks+=Forgetting",
        ),
        "--trainer.callbacks+={class_path: Refusal, init_args: {max_completion_length: 2, source: "
        "{class_path: datamodules.GuardedAddition, init_args: {num_examples: 4, kind: prompts}}}}",
    ],
    "reward": ["--trainer.limit_train_batches=3", "--trainer.max_epochs=1"],
    "dpo": ["--trainer.limit_train_batches=3", "--trainer.max_epochs=1"],
    "online_dpo": ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--trainer.limit_val_batches=1"],
    "ppo": [
        *(
            "--trainer.max_epochs=1",
            "--trainer.check_val_every_n_epoch=1",
            "--trainer.limit_val_batches=1",
            "--model.ptx_coef=1",
        ),
        *(
            "--data.ptx.train=NumberTexts",
            "--data.ptx.train.num_texts=20",
            "--data.ptx.rows_per_update=2",
            "--data.ptx.max_length=40",
        ),
    ],
    # plain ASCII: an untrained model fulfils it now and then, so that there are right and wrong completions
    "grpo": [
        *(
            "--trainer.max_epochs=2",
            "--trainer.check_val_every_n_epoch=1",
            "--model.reward=RegexFormat",
            r"--model.reward.pattern=[\x00-\x7f]*",
        ),
        "--trainer.callbacks+={class_path: WinRate, init_args: {judge: {class_path: Versus, init_args: {reward: "
        "{class_path: NumericMatch}}}}}",
    ],
}


def metric_patterns() -> dict[str, re.Pattern[str]]:
    names = re.findall(r"`((?:train|val)/[^`]+)`", README.split("## Metrics")[1].split("## ")[0])
    return {
        name: re.compile(re.sub(r"<\w+>|\\\*", "[^/]+", re.escape(name).replace("\\<", "<").replace("\\>", ">")))
        for name in names
    }


def logged(folder: Path) -> set[str]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag for tag in events.Tags()["scalars"] if tag != "epoch"}


@pytest.fixture(scope="module")
def tags(tmp_path_factory) -> set[str]:
    folder = tmp_path_factory.mktemp("runs")
    found: set[str] = set()
    for method, limit in LIMITS.items():
        logger = ["--trainer.logger.save_dir", str(folder)]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)  # exports and checkpoints of the shipped config go to runs/ below the current folder
            main(["fit", "--config", str(ROOT / f"configs/{method}.yaml"), *SHORT, *limit, *logger])
        found |= logged(folder / method)
    return found


def test_every_logged_metric_is_in_the_table(tags):
    patterns = metric_patterns().values()
    assert sorted(tag for tag in tags if not any(pattern.fullmatch(tag) for pattern in patterns)) == []


def test_every_metric_in_the_table_is_logged(tags):
    silent = [name for name, pattern in metric_patterns().items() if not any(pattern.fullmatch(tag) for tag in tags)]
    assert silent == []


def test_no_metric_is_explained_twice():
    names = re.findall(r"^\| (`.*?`) \|", README.split("## Metrics")[1], flags=re.MULTILINE)
    assert len(names) == len(set(names))
    assert len(names) > 30


def test_named_files_exist():
    for name in re.findall(r"configs/[\w/-]+\.yaml|\.github/[\w.]+|CONTRIBUTING\.md", README):
        if "<" not in name and name != "configs/x.yaml":
            assert (ROOT / name).exists(), name


ROWS = re.compile(r"^\| [^`|].*\| `(--model[^`]+)` \|$", flags=re.MULTILINE)
PARTS = zip(("grpo", "dpo", "ppo"), re.split("## Preferences|## PPO", README), strict=True)
FORMS = [(method, arguments) for method, part in PARTS for arguments in ROWS.findall(part)]


def test_forms_of_the_methods_are_there():
    assert Counter(method for method, _ in FORMS) == {"grpo": 4, "dpo": 11, "ppo": 4}


@pytest.mark.parametrize(("method", "arguments"), FORMS)
def test_forms_of_the_methods_parse(method, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(ROOT / f"configs/{method}.yaml"), *shlex.split(arguments), "--print_config"])
    assert stop.value.code in (0, None)
    assert arguments.split()[-1] in capsys.readouterr().out
