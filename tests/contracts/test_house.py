"""The house keeps its shape: imports point one way, files and configs stay small, maths documents its shapes."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("modules", "datamodules", "callbacks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FRAMEWORKS = {"lightning", "transformers", "datasets", "jsonargparse", "torchmetrics"}
METHODS = {"sft", "reward", "dpo", "online_dpo", "grpo", "ppo", "label", "knowledge", "self_instruct"}
WIDE = {"ppo.py": 28}  # arguments: the options of its field, under the names that it gives them
PARTS = {"networks", "rewards", "rollout", "objectives"}


def layer(module: str) -> str:
    """modules.rollout.scoring -> rollout; modules.grpo -> method; datamodules.x -> datamodules."""
    top, *rest = module.split(".")
    if top != "modules" or not rest:
        return top
    return "method" if rest[0] in METHODS else rest[0]


ALLOWED = {
    "types": set(),
    "explain": set(),
    "functional": {"types"},
    **{part: {"types", "functional", *PARTS} for part in PARTS},
    "schedulers": {"functional"},
    "base": {"types", "functional", *PARTS},
    "on_policy": {"types", "functional", *PARTS, "base"},
    "method": {"types", "functional", *PARTS, "base", "on_policy"},
    "modules": {"method"},
    "datamodules": {"types"},
    "callbacks": {"types", "functional"},
}


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            parent = node.module or ""
            submodules = [f"{parent}.{alias.name}" for alias in node.names]
            names += [name if (ROOT / (name.replace(".", "/") + ".py")).is_file() else parent for name in submodules]
    return names


def wrong_imports(module: str, names: list[str]) -> list[str]:
    mine = layer(module)
    if mine == "__main__":
        return []
    inner = [name for name in names if name.split(".")[0] in PACKAGES]
    wrong = [name for name in inner if layer(name) not in ALLOWED[mine] | ({mine} - {"method"})]
    if mine in ("types", "explain", "functional"):
        wrong += [name for name in names if name.split(".")[0] in FRAMEWORKS]
    return wrong


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    assert wrong_imports(module_name(path), imports(path)) == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("modules.functional.kl", "modules.networks.policy"),
        ("modules.functional.kl", "transformers"),
        ("modules.grpo", "modules.sft"),
        ("modules.rewards.math", "datamodules.chat"),
        ("datamodules.chat", "modules.networks.tiny"),
        ("callbacks.samples", "modules.base"),
        ("modules.types", "modules.functional.kl"),
    ],
)
def test_the_rule_would_see_a_wrong_import(module, name):
    assert wrong_imports(module, [name]) == [name]


def test_top_level_holds_what_was_agreed():
    agreed = {"pyproject.toml", "README.md", "Makefile", "LICENSE", "constraints.txt", "configs", "tests", "runs", *PACKAGES}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and not path.name.endswith(".egg-info")}
    assert found <= agreed


def test_configs_are_short_and_say_what_they_are():
    configs = sorted((ROOT / "configs").rglob("*.yaml"))
    assert configs
    for path in configs:
        lines = path.read_text().splitlines()
        assert lines[0].startswith("#"), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_files_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 260
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 50, node.name
            assert len(node.args.args) + len(node.args.kwonlyargs) <= WIDE.get(path.name, 18), node.name  # self included


@pytest.mark.parametrize("path", sorted((ROOT / "modules/functional").glob("*.py")), ids=lambda path: path.name)
def test_public_maths_documents_its_shapes(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert "[" in (ast.get_docstring(node) or ""), node.name
