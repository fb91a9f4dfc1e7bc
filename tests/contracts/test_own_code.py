"""A user's own classes and functions, from the folder that they work in."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from few_rows import few_rows

from modules import GRPOModule
from modules.__main__ import main
from modules.cli.choices import CLASSES
from modules.cli.parser import takes_reward
from modules.generation import Validation
from modules.rewards import Dispatch
from modules.types import Completion, FunctionReward, Reward, Rollout

ROOT = Path(__file__).parents[2]
MINE = '''
from lightning.pytorch import Callback

from datamodules import InstructionDataModule
from modules import SFTModule


def few_letters(prompts, completions, answers, **columns):
    assert len(prompts) == len(completions) == len(answers)
    return [-float(len(text)) for text in completions]


def as_in_trl(completions, ground_truth, level, **kwargs):
    return [float(truth in text) + int(number) for text, truth, number in zip(completions, ground_truth, level)]


class MyCallback(Callback):
    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_end(self, trainer, pl_module) -> None:
        open(self.file, "w").write(type(pl_module).__name__ + " " + type(trainer.datamodule).__name__)


class MyDataModule(InstructionDataModule):
    """Theirs."""


class MySFT(SFTModule):
    """Theirs."""
'''
SHORT = [
    "--trainer.max_steps=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--data.train.num_examples=40",
    "--trainer.callbacks=null",
    "--trainer.enable_checkpointing=false",
    "--trainer.logger=false",
]


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    Path("my_package.py").write_text(MINE)
    sys.path.append(str(tmp_path))
    yield
    sys.modules.pop("my_package", None)


def fit(method: str, *arguments: str) -> None:
    main(["fit", f"--config={few_rows(method)}", *SHORT, *arguments])


def test_classes_are_named_by_path(tmp_path):
    callback = [{"class_path": "my_package.MyCallback", "init_args": {"file": "said"}}]
    fit(
        "sft",
        "--model=my_package.MySFT",
        "--data=my_package.MyDataModule",
        f"--trainer.callbacks={json.dumps(callback)}",
    )
    assert Path("said").read_text() == "MySFT MyDataModule"


def test_a_function_is_a_reward_wherever_one_is_asked_for():
    few = ["--data.prompts_per_phase=2", "--model.num_generations=2", "--trainer.log_every_n_steps=1"]
    gold = [{"class_path": "Overoptimization", "init_args": {"gold": "my_package.few_letters"}}]
    both = {"class_path": "WeightedSum", "init_args": {"rewards": ["my_package.few_letters", "NumericMatch"]}}
    fit("grpo", f"--model.reward={json.dumps(both)}", *few, f"--trainer.callbacks={json.dumps(gold)}")
    fit("grpo", "--model.reward=my_package.few_letters", "--trainer.logger=null", "--out=one", "--logger=csv", *few)
    assert "train/rewards/few_letters/mean" in Path("one/metrics.csv").read_text().splitlines()[0]
    assert "reward: my_package.few_letters" in Path("one/config.yaml").read_text()
    main(["fit", "--config=one/config.yaml", *SHORT, "--logger=null"])


def rollout(text: str, answer: str | None, **info) -> Rollout:
    return Rollout("u", "p", [1], answer, Completion([1, 2], [0.0, 0.0], text, "stop"), 0, {}, None, info)


def test_a_function_gets_what_it_names():
    from my_package import as_in_trl, few_letters

    rollouts = [rollout("a 3", "3", level="1"), rollout("4", "5", level="2")]
    assert FunctionReward(as_in_trl)(rollouts) == [2.0, 2.0]
    assert FunctionReward(few_letters)(rollouts) == [-3.0, -1.0]
    assert FunctionReward(few_letters).name == "few_letters"
    assert FunctionReward(lambda completion_ids, n=3: [len(ids) * n for ids in completion_ids])(rollouts) == [6, 6]
    with pytest.raises(
        ValueError,
        match="asks for level, which no row has; it can ask for prompts, completions, completion_ids and answers",
    ):
        FunctionReward(as_in_trl)([rollout("a", "b")])
    with pytest.raises(ValueError, match=r"reward texts\(texts\).*must ask for completions"):
        FunctionReward(texts)
    with pytest.raises(ValueError, match="reward 'forgets' returned None .is its return missing.*; return a list"):
        FunctionReward(forgets)(rollouts)


def texts(texts):
    return texts


def forgets(completions):
    """Return nothing."""


def take_reward(kind: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that take a reward."""
    return [name for name in inspect.signature(kind).parameters if takes_reward(kind, name)]


TAKERS = [kind for kind in CLASSES if take_reward(kind) and kind is not FunctionReward]


@pytest.mark.parametrize("kind", TAKERS, ids=lambda kind: kind.__name__)
def test_a_function_is_a_reward_from_python(kind):
    from my_package import few_letters

    (argument,) = take_reward(kind)
    values = {"policy": "tiny", "teacher": "tiny", "per_token": 0.1, "max_length": 8}
    parameters = inspect.signature(kind).parameters
    asked = [
        name for name, parameter in parameters.items() if parameter.default is parameter.empty or name == "teacher"
    ]
    needed = {name: value for name, value in values.items() if name in asked}
    several = {"tools": few_letters} if kind is Dispatch else [few_letters]
    given = several if argument == "rewards" else few_letters
    made = kind(**needed, **{argument: given})
    (found,) = made.rewards if argument == "rewards" else [getattr(made, argument)]
    assert isinstance(found, FunctionReward) and found([rollout("a 3", "3")]) == [-3.0]


def test_a_function_decides_right_or_wrong_and_need_not_be_a_plain_one():
    from my_package import few_letters

    module = GRPOModule("tiny", reward=partial(few_letters), validation=Validation(accuracy=few_letters))
    assert isinstance(module.reward, FunctionReward) and isinstance(module.accuracy, FunctionReward)
    assert isinstance(few_letters, Reward)


def test_own_folders_of_our_names_do_not_collide():
    for name in ("callbacks", "datamodules"):
        Path(name).mkdir()
        Path(name, "__init__.py").write_text("raise RuntimeError('not ours')\n")
    code = "import sys; from modules.__main__ import main; sys.path.insert(0, ''); main(sys.argv[1:])"
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "fit",
            "--config",
            str(ROOT / "configs/tiny/sft.yaml"),
            *SHORT,
            "--trainer.callbacks",
            "callbacks.mine.Mine",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert (
        "has no attribute 'mine'; the folder callbacks here has the name of a package of this program: rename it"
        in ended.stderr
    )


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.optimizer=os.system", "Importing 'os.system' is not allowed"),
        ("--model.scheduler=subprocess.call", "Importing 'subprocess.call' is not allowed"),
    ],
)
def test_a_path_to_no_such_class_is_not_imported(capsys, option, said):
    with pytest.raises(SystemExit):
        fit("sft", option)
    assert said in capsys.readouterr().err


def test_a_method_knows_its_data(capsys):
    Path("my.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n' * 4)
    main(["fit", "--model=SFTModule", "--model.policy=tiny", "--data.train=my.jsonl", "--trainer.max_steps=1"])
    assert Path("runs/sft/export/config.json").is_file()
    with pytest.raises(SystemExit):
        main(["predict", "--model=LabelModule", "--data.train=my.jsonl"])
    assert "no DataModule is named, and LabelModule has no usual one: add --data" in capsys.readouterr().err


def test_another_method_keeps_the_arguments_that_it_knows(capsys):
    Path("pairs.jsonl").write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\n' * 4)
    with pytest.raises(SystemExit):
        fit("grpo", "--model=DPOModule", "--data=PreferenceDataModule", "--data.train=pairs.jsonl", "--print_config")
    shown = capsys.readouterr().out
    assert "lr: 0.0003" in shown and "class_path: modules.DPOModule" in shown and "num_generations" not in shown
