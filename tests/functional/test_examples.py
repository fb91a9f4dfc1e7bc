"""Every public function of ``modules.functional`` has an example, and every example is right."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import modules.functional

NAMES = sorted(path.stem for path in Path(modules.functional.__file__).parent.glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_there_and_right(name):
    module = importlib.import_module(f"modules.functional.{name}")
    public = [
        function
        for function in vars(module).values()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and not function.__name__.startswith("_")
    ]
    assert public and [f.__name__ for f in public if ">>> " not in (f.__doc__ or "")] == []
    found = doctest.testmod(module)
    assert found.attempted >= len(public) and found.failed == 0
