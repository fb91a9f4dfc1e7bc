"""The documents tell the truth about metrics, commands, rows, files and examples."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
from few_rows import few_rows
from programs import run_program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modules.__main__ import main

ROOT = Path(__file__).parents[2]
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md", *sorted(ROOT.glob("*/README.md"))]
}
METRICS = DOCUMENTS["callbacks/README.md"].split("## Metrics")[1]
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
    "online_dpo": [
        *("--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--trainer.limit_val_batches=1"),
        *("--model.engine=WorkerEngine", "--model.engine.workers=1", "--model.engine.max_staleness=1"),
    ],
    "ppo": [
        *(
            "--trainer.max_epochs=1",
            "--trainer.check_val_every_n_epoch=1",
            "--trainer.limit_val_batches=1",
            "--model.incentives.ptx=1",
        ),
        *(
            "--data.ptx.train=NumberTexts",
            "--data.ptx.train.num_texts=20",
            "--data.ptx.rows_per_update=2",
            "--data.ptx.max_length=40",
        ),
    ],
    "distill": ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--model.on_policy=0.5"],
    # plain ASCII: an untrained model fulfils it now and then, so that there are right and wrong completions
    "grpo": [
        *(
            "--trainer.max_epochs=2",
            "--trainer.check_val_every_n_epoch=1",
            "--model.reward=RegexFormat",
            r"--model.reward.pattern=[\x00-\x7f]*",
            "--model.importance=ImportanceWeights",
            "--trainer.callbacks+=GroupBias",
        ),
        "--trainer.callbacks+={class_path: TokenBudget, init_args: {tokens: 1000000}}",
        "--trainer.callbacks+={class_path: WinRate, init_args: {judge: {class_path: Versus, init_args: {reward: "
        "{class_path: NumericMatch}}}}}",
    ],
}


# Objectives with metrics of their own
CHOICES = [
    ["--model.objective=SAPO", "--model.dynamic_sampling.max_rounds=2"],
    # ends with an even digit: prompts of every difficulty
    ["--model.objective=DPPO", "--model.importance=null", "--model.reward.pattern=.*[02468]"],
    [
        *("--model.objective=DPPO", "--model.importance=null", "--model.reward.pattern=.*[02468]"),
        "--model.sampling.reuse.lenience=1",
    ],
    [
        "--data.chat=true",
        "--data.system=/no_think",
        "--model.validation.budgets=[0, 2]",
        "--model.sampling.max_completion_length=24",
        "--model.sampling.thinking.stop_text=</think>",
        "--model.sampling.partial.tokens_per_phase=12",
    ],
]


def metric_patterns() -> dict[str, re.Pattern[str]]:
    names = re.findall(r"`((?:train|val)/[^`]+)`", METRICS)
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
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            config = few_rows(method)
            main(["fit", "--config", config, *SHORT, *limit, "--out", f"runs/{method}"])
        found |= logged(folder / "runs" / method)
    for number, choice in enumerate(CHOICES):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            main(["fit", "--config", few_rows("grpo"), *SHORT, *LIMITS["grpo"], *choice, "--out", f"runs/{number}"])
        found |= logged(folder / "runs" / str(number))
    return found


def test_every_logged_metric_is_in_the_table(tags):
    patterns = metric_patterns().values()
    assert sorted(tag for tag in tags if not any(pattern.fullmatch(tag) for pattern in patterns)) == []


def test_every_metric_in_the_table_is_logged(tags):
    silent = [name for name, pattern in metric_patterns().items() if not any(pattern.fullmatch(tag) for tag in tags)]
    assert silent == []


def test_no_metric_is_explained_twice():
    names = re.findall(r"^\| (`.*?`) \|", METRICS, flags=re.MULTILINE)
    assert len(names) == len(set(names))
    assert len(names) > 30


def test_the_curves_of_the_dashboard_are_metrics():
    from callbacks.dashboard import LAYOUTS

    patterns = metric_patterns().values()
    tags = {
        tag for groups in LAYOUTS.values() for charts in groups.values() for tags in charts.values() for tag in tags
    }
    assert [tag for tag in sorted(tags) if not any(pattern.fullmatch(tag) for pattern in patterns)] == []


def test_the_root_readme_is_one_read():
    assert len((ROOT / "README.md").read_bytes()) <= 10 * 1024


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document):
    text, here = DOCUMENTS[document], (ROOT / document).parent
    for name in re.findall(r"configs/[\w/-]+\.yaml|tests/[\w/]+\.py", text):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (here / link).exists(), link


ROWS = re.compile(r"^\| [^`|].*\| `(--model[^`]+)` \|$", flags=re.MULTILINE)
METHODS = DOCUMENTS["modules/README.md"]
PARTS = zip(
    ("dpo", "grpo", "distill", "ppo"), re.split("## Losses on the|## Distillation|## PPO", METHODS), strict=True
)
FORMS = [(method, arguments) for method, part in PARTS for arguments in ROWS.findall(part)]
OWN = ["--model.policy=tiny", "--data.train=my.jsonl"]


def test_forms_of_the_methods_are_there():
    assert Counter(method for method, _ in FORMS) == {"dpo": 11, "grpo": 20, "distill": 7, "ppo": 4}


@pytest.mark.parametrize(("method", "arguments"), FORMS)
def test_forms_of_the_methods_parse(method, arguments, capsys):
    reward = ["--model.reward=ExactMatch"] if method == "ppo" else []
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "fit",
                "--config",
                str(ROOT / f"configs/{method}.yaml"),
                *OWN,
                *reward,
                *shlex.split(arguments),
                "--print_config",
            ]
        )
    assert stop.value.code in (0, None)
    assert arguments.split()[-1] in capsys.readouterr().out


COMMANDS = sorted(
    {
        line
        for text in DOCUMENTS.values()
        for line in re.findall(r"^python -m modules (?:fit|validate|test|predict|merge) .*", text, flags=re.MULTILINE)
        if "<" not in line
        and "..." not in line
        and "{" not in line
        and "my_losses" not in line
        and "my_tools" not in line
        and "runs/" not in line
    }
)


def test_commands_of_the_documents_are_there():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_documents_parse(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command.replace("PATH_OR_HUB_ID", "tiny"))[3:]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *([] if "--print_config" in arguments else ["--print_config"])])
    assert stop.value.code in (0, None), capsys.readouterr().err


def test_make_targets_of_the_documents_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {name for text in DOCUMENTS.values() for name in re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE)}
    assert {"demo", "test", "quick", "recipe"} <= named
    assert [name for name in named if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)] == []


def rows_of(name: str) -> list[dict]:
    section = DOCUMENTS["datamodules/README.md"].split(f"For `{name}`")[1]
    return [json.loads(line) for line in section.split("```json\n")[1].split("```")[0].splitlines()]


@pytest.mark.parametrize("name", ["InstructionDataModule", "PreferenceDataModule", "VerifiableDataModule"])
def test_every_row_of_the_documents_is_read(name, tmp_path):
    import datamodules
    from modules.networks.tiny import tiny_tokenizer

    for number, row in enumerate(rows_of(name)):
        path = tmp_path / f"{number}.jsonl"
        path.write_text((json.dumps(row) + "\n") * 2)
        getattr(datamodules, name)(tokenizer=tiny_tokenizer(), train=str(path)).setup("fit")


def blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENTS[document], flags=re.DOTALL)


def test_the_example_from_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text('{"prompt": "Say hello.", "completion": "Hello."}\n' * 4)
    (code,) = blocks("README.md")
    exec(compile(code.replace("max_epochs=3", "max_epochs=1"), "README.md", "exec"), {})
    assert Path("runs/python/export/config.json").is_file()


def test_the_example_of_a_tool_runs(tmp_path, monkeypatch):
    """Its class is run by itself and as an environment."""
    monkeypatch.syspath_prepend(tmp_path)
    (code,) = blocks("modules/README.md")
    (tmp_path / "my_tools.py").write_text(code)
    names: dict = {}
    exec(compile(code, "modules/README.md", "exec"), names)
    room = names["Thermometer"]()
    assert room.reset("21") and room.measure("Celsius") == "21" and room.get_reward() == 1.0
    rows = [{"prompt": f"How warm is room {number}?", "answer": str(number)} for number in range(8)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tools = ["--model.environment.factory=my_tools.Thermometer", "--model.reward=EnvironmentReward"]
    short = ["--model.sampling.max_completion_length=4", "--trainer.max_epochs=1", f"--data.train={tmp_path}/my.jsonl"]
    grpo = ["--config", str(ROOT / "configs/grpo.yaml"), "--model.policy=tiny", *tools, *short, *SHORT]
    monkeypatch.chdir(tmp_path)
    main(["predict", *grpo, "--data.prompts_per_phase=8", "--out", "runs/tools"])
    lines = [json.loads(line) for line in (tmp_path / "runs/tools/predictions.jsonl").read_text().splitlines()]
    assert all("? The room is locked.<|im_end|>" in line["prompt"] for line in lines)
    assert {line["rewards"]["environment"] for line in lines} == {0.0}  # an untrained model calls nothing


def test_the_example_of_contributing_runs(tmp_path):
    loss, test = blocks(".github/CONTRIBUTING.md")
    (tmp_path / "my_losses.py").write_text(loss)
    (tmp_path / "test_my_losses.py").write_text(test)
    commands = re.findall(r"^python (-m .*)$", DOCUMENTS[".github/CONTRIBUTING.md"], flags=re.MULTILINE)
    assert len(commands) == 2
    short = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.callbacks=null"]
    for command, more in zip(commands, ([], short), strict=True):
        arguments = [argument.replace("configs/", f"{ROOT}/configs/") for argument in shlex.split(command)]
        environment = {"PATH": "/usr/bin:/bin"}
        done = run_program(*arguments, *more, folder=tmp_path, environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
