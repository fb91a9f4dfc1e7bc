"""The house keeps its shape: imports point one way."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("modules", "datamodules", "callbacks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FRAMEWORKS = {"lightning", "transformers", "datasets", "jsonargparse", "torchmetrics"}
PARTS = {"networks", "losses", "rewards", "rollout"}
SHARED = {"types", "functional", "trainer"}


def classes(path: Path) -> dict[str, set[str]]:
    """The classes of a file, and what each derives from."""
    found = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    return {node.name: {base.id for base in node.bases if isinstance(base, ast.Name)} for node in found}


PAGES = {path.stem: classes(path) for path in (ROOT / "modules").glob("*.py")}
BASES = {base for page in PAGES.values() for bases in page.values() for base in bases}


def is_method(page: dict[str, set[str]]) -> bool:
    """Whether a file of ``modules`` is a method's page: it has a LightningModule that no other page derives from."""
    return any(name.endswith("Module") and name not in BASES for name in page)


METHODS = {stem for stem, page in PAGES.items() if is_method(page)}


def layer(module: str) -> str:
    """modules.rollout.scoring -> rollout; modules.grpo, modules.predict.x -> method; datamodules.x -> datamodules."""
    top, *rest = module.split(".")
    if top != "modules" or not rest:
        return top
    return "method" if rest[0] in (*METHODS, "predict") else rest[0]


ALLOWED = {
    "types": set(),
    "trainer": set(),
    "functional": {"types"},
    **{part: {*SHARED, *PARTS} for part in PARTS},
    "schedulers": {"functional"},
    "base": {*SHARED, *PARTS, "schedulers"},
    "generation": {*SHARED, *PARTS, "base"},
    "on_policy": {*SHARED, *PARTS, "base", "generation"},
    "method": {*SHARED, *PARTS, "base", "generation", "on_policy", "method"},
    "modules": {"method"},
    "cli": {*SHARED, *PARTS, "base", "generation", "on_policy", "method", "modules", "schedulers"},
    "datamodules": SHARED,
    "callbacks": {*SHARED, "rewards", "rollout"},
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
    wrong = [name for name in inner if layer(name) not in ALLOWED[mine] | {mine}]
    if mine == "method":  # a method shares with another only what its own folder holds
        wrong += [name for name in inner if layer(name) == "method" and name.split(".")[1] != module.split(".")[1]]
    if mine in ("types", "functional"):
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
        ("modules.rewards.answers", "datamodules.tokens.encoding"),
        ("datamodules.tokens.encoding", "modules.networks.tiny"),
        ("callbacks.samples", "modules.base"),
        ("modules.types", "modules.functional.kl"),
    ],
)
def test_the_rule_would_see_a_wrong_import(module, name):
    assert wrong_imports(module, [name]) == [name]


def test_top_level_holds_what_was_agreed():
    agreed = {
        "pyproject.toml",
        "README.md",
        "Makefile",
        "LICENSE",
        "constraints.txt",
        "configs",
        "tests",
        "runs",
        *PACKAGES,
    }
    found = {
        path.name for path in ROOT.iterdir() if not path.name.startswith(".") and not path.name.endswith(".egg-info")
    }
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}  # what runs leave here
    assert found <= agreed | ignored


def test_no_class_has_the_name_of_another():
    found = Counter(
        node.name for path in FILES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in found.items() if count > 1] == []


# What a user names in YAML, and what configurations call by the paper's word, may stand on two floors.
SHARED_NAMES = {"__init__", "base", "policy", "preference"}


def test_a_file_name_says_where_one_is():
    found = Counter(path.stem for path in FILES)
    assert {name for name, count in found.items() if count > 1} <= SHARED_NAMES


def test_a_method_is_told_from_what_methods_share():
    assert {"sft", "grpo"} <= METHODS and not {"base", "generation", "on_policy", "types"} & METHODS
