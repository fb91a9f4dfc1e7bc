"""The parser of the command line: errors in one sentence, plain functions as rewards, the usual DataModule."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from modules.cli.choices import NAMES, choose_data, spell_out
from modules.cli.explain import (
    explain_command,
    explain_missing_arguments,
    explain_taken_name,
    name_our_option,
    point_to_owner,
    point_to_part,
    suggest_argument,
    suggest_names,
    write_sentence,
)
from modules.cli.renamed import renew
from modules.types import Reward, as_reward, make_printable

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

set_parsing_settings(import_path_denylist=[])  # enforces the parser's own list: os, subprocess, pickle, ...
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def refuse(error: Exception) -> NoReturn:
    """End the run with exit status 1 and the error on one line.

    The line is written in one call, so that the lines of several ranks do not mix.
    """
    said = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is None:  # of a logger
        said = f"a file of the run cannot be read or written: {error.strerror}; earlier files are as they were"
    sys.stderr.write(make_printable(f"error: {' '.join(said.split())}\n"))
    sys.exit(1)


def build(kind: type, /, *args: Any, **kwargs: Any) -> Any:
    """Make an object that the configuration names, with plain functions turned into the rewards that it asks for.

    An error of its constructor ends the run here, since the parser would bury it.
    """
    try:
        for name, value in kwargs.items():
            if any(isinstance(part, FunctionType) for part in walk(value)) and takes_reward(kind, name):
                kwargs[name] = as_reward(value)
        return kind(*args, **kwargs)
    except (ValueError, ImportError, OSError, MisconfigurationException) as error:
        refuse(error)


def walk(value: Any) -> Iterator[Any]:
    """Walk over the value, or over what a list or dict holds."""
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from walk(part)
    else:
        yield value


def takes_reward(kind: Callable[..., Any], name: str) -> bool:
    """Return whether the annotation of a class's argument names ``Reward``."""
    parameter = inspect.signature(kind).parameters.get(name)
    return parameter is not None and names_reward(parameter.annotation)


def names_reward(annotation: Any) -> bool:
    """Return whether ``Reward`` is in an annotation, which may be written as text."""
    if isinstance(annotation, str):
        return re.search(r"\bReward\b", annotation) is not None
    return annotation is Reward or any(names_reward(part) for part in get_args(annotation))


NO_COMMAND = 'expected "subcommand" to be one of {fit,validate,test,predict}, but it was not provided.'
OF_A_RUN = ("gradient_checkpointing", "torch_compile", "on_nonfinite", "on_unscored", "out")  # options of no class
ROWS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz")  # ends of files that hold rows
EXAMPLE = "python -m modules fit --config configs/tiny/sft.yaml"


class Parser(LightningArgumentParser):
    """A parser that reports an error in one sentence, without a page of usage. Options are written in full."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the sentence and exit status 2."""
        owner = point_to_owner(message) or point_to_part(message)
        ends = (suggest_argument(message), owner, explain_taken_name(message))
        whole = explain_missing_arguments(message) or explain_command(message)
        told = whole or write_sentence(message, NAMES) + "".join(ends)
        ours = name_our_option(message)
        if ours:
            told = write_sentence(message, NAMES).partition("; did you mean")[0] + ours
        told = told.replace(
            NO_COMMAND, "name a command: fit, validate, test, predict, chat or merge; for example, " + EXAMPLE
        )
        unknown = re.search(r"^unrecognized arguments: --([^\s=;]+)|[Oo]ption '([\w.]+)'(?: is not|$)", message)
        if unknown and not ours and "did you mean" not in message:
            name = unknown[1] or unknown[2]
            plain, known = name.rpartition(".")[2], self.options(name)
            inside = plain in OF_A_RUN and bool(unknown[2] or plain != name)  # set in a part of the run
            told += f"; did you mean --{plain}?" if inside else suggest_names(name, known, "--" if unknown[1] else "")
        inner = re.match(r'Parser key "(\w+)":', told)  # written there without the name of the group
        if inner and "unrecognized arguments: --" in told:
            told = re.sub(r"(?<=[ ,])--(?=\w)", f"--{inner[1]}.", told)
        super().error(told, ex)

    def options(self, name: str) -> list[str]:
        """Return every option that ``name`` may mean, of this parser and of its commands, without the dashes.

        An option that takes a class has one ``.help``; the options of that class follow its name.
        """
        commands = [
            parser for action in self._actions if isinstance(action.choices, dict) for parser in action.choices.values()
        ]
        known = [option.lstrip("-") for parser in (self, *commands) for option in parser._option_string_actions]
        owner, dot, last = name.rpartition(".")
        inner = dot + last if dot and owner not in known else ""  # else that group has all its options in the list
        return [option.removesuffix(".help") + inner if option.endswith(".help") else option for option in known]

    def instantiate_classes(self, cfg: Namespace, **kwargs: Any) -> Namespace:
        """Make every object by ``build``."""
        return self.instantiate(cfg, instantiators=[(build, object, True)], **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **settings: Any) -> Any:
        """Parse the arguments. Raises ValueError for a configuration that is no YAML, or has a key twice in one mapping.

        jsonargparse hands an option of a class on as one argument, in which it writes null as None.
        """
        if isinstance(args, list) and len(args) == 1 and args[0].endswith("=None"):
            args = [f"{args[0].removesuffix('None')}null"]
        for place, text in read_mappings(sys.argv[1:] if args is None else args):
            try:
                repeated = find_repeated_key(text)
            except (yaml.YAMLError, RecursionError) as error:
                if not Path(place).is_file():
                    continue  # the parser will say so
                mark = getattr(error, "problem_mark", None)
                where = f"{place}:{mark.line + 1}" if mark else place
                raise ValueError(f"{where}: this file is no YAML; --config takes a YAML of options") from error
            if repeated is not None:
                line, key = repeated
                where = f"{place}:{line}" if Path(place).is_file() else place
                raise ValueError(f"{where}: the key {key!r} stands twice in one mapping; keep one of them")
        return super().parse_args(args, *rest, **settings)

    def parse_object(self, obj: Any, namespace: Any = None, *rest: Any, **settings: Any) -> Any:
        """Parse the arguments of a class, beside those in ``namespace`` that another class has left.

        Such an argument may be a group for one of the two classes, and an option that is also null for the other one.
        """
        parts = [action.dest for action in self._actions if not action.dest.endswith(".help")]
        for name, value in (vars(namespace) if namespace else {}).items():
            in_group = any(part.startswith(f"{name}.") for part in parts)
            if name not in parts or not isinstance(value, Namespace) or in_group != ("class_path" in value):
                continue
            namespace[name] = value.get("init_args", Namespace()) if in_group else value.as_dict()
        return super().parse_object(obj, namespace, *rest, **settings)

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: ``--help`` tells the usage."""


def read_old_names() -> None:
    """Let configurations use names of an earlier layout, and short names of our functions."""
    load = get_loader("yaml")
    if getattr(load, "renews", False):
        return

    def load_renewed(stream: str) -> Any:
        return spell_out("", renew(load(stream)))

    load_renewed.renews = True  # type: ignore[attr-defined]
    set_loader("yaml", load_renewed, (yaml.YAMLError,))


def sort_arguments(arguments: list[str]) -> list[str]:
    """Put configurations before options, and first of all ``--model`` and ``--data`` if no configuration has a class.

    >>> sort_arguments(["fit", "--model.beta", "0.5", "--model=DPOModule", "--config", "x.yaml"])
    ['fit', '--model=DPOModule', '--config', 'x.yaml', '--model.beta', '0.5']
    """
    groups: list[list[str]] = [[]]  # the command, then each option with its values
    for argument in arguments:
        if argument.startswith("--") or argument in ("-c", "-h"):
            groups.append([])
        groups[-1].append(argument)
    files = [group for group in groups if group and group[0].partition("=")[0] in ("--config", "-c")]
    named = [part for group in files for part in group]
    free = [f"--{key}" for key in ("model", "data") if find_class(key, named) is None]
    first = [group for group in groups if group and group[0].partition("=")[0] in free]
    rest = [group for group in groups[1:] if group not in files and group not in first]
    return [argument for group in (groups[0], *first, *files, *rest) for argument in group]


def read_mappings(args: list[str]) -> Iterator[tuple[str, str]]:
    """Read the configurations and mappings that arguments give, each with its file or option.

    Raises:
        ValueError: a file of rows is given as a configuration.
    """
    for argument, after in zip_longest(args, args[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        value = value if equals else after
        if not name.startswith("-"):
            continue
        if name in ("--config", "-c") and value.endswith(ROWS):
            raise ValueError(f"--config {value}: rows are no configuration; name them with --data.train {value}")
        if name in ("--config", "-c") and Path(value).is_file():
            try:
                yield value, Path(value).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # the parser will say so
        elif value.lstrip().startswith(("{", "[")):
            yield name, value


def find_repeated_key(text: str) -> tuple[int, str] | None:
    """Find the first key that stands twice in a mapping of a YAML text: its line and its name.

    Merge keys (``<<``) may stand in a mapping beside the keys that they bring.

    Raises:
        yaml.YAMLError: the text is no YAML.
    """
    found = [mark for document in yaml.compose_all(text, Loader=LOADER) for mark in find_repeated_keys(document)]
    return min(found, default=None)


def find_repeated_keys(document: yaml.Node | None) -> Iterator[tuple[int, str]]:
    """Find the line and the name of every key of a YAML document that stands twice in a mapping."""
    seen: set[int] = set()  # an anchor's node stands wherever an alias names it
    nodes = [document]
    while nodes:
        node = nodes.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys: set[tuple[str, str]] = set()
            for key, value in node.value:
                nodes += [key, value]
                name = (key.tag, str(key.value))
                if name in keys and key.tag != "tag:yaml.org,2002:merge":
                    yield key.start_mark.line + 1, str(key.value)
                keys.add(name)
        else:
            nodes += node.value


def add_data_module(args: list[str]) -> list[str]:
    """Add the usual DataModule of the method to arguments that set ``--data.train`` or the like but name none.

    Raises:
        ValueError: the method has no usual DataModule.
    """
    named = find_class("data", args)
    asked = [place for place, argument in enumerate(args) if argument.startswith("--data.")]
    method = find_class("model", args)
    if named is not None or not asked or method is None:
        return args
    kind = next(
        (kind for kind in walk_subclasses(LightningModule) if method in (kind.__name__, write_class_path(kind))), None
    )
    data = kind and choose_data(kind)
    if data is None:
        raise ValueError(f"no DataModule is named, and {method} has no usual one: add --data and its class name")
    return [*args[: asked[0]], f"--data={data}", *args[asked[0] :]]


def find_class(key: str, args: list[str]) -> str | None:
    """Find the class that arguments, or their configurations, name last for ``model`` or ``data``."""
    found = None
    for place, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        value = value if equals else next(iter(args[place + 1 :]), "")
        if name in (f"--{key}", f"--{key}.class_path"):
            found = value
        elif name in ("--config", "-c") and Path(value).is_file():
            try:
                part = (yaml.safe_load(Path(value).read_text(encoding="utf-8")) or {}).get(key) or {}
                found = part if isinstance(part, str) else part.get("class_path", found)
            except (yaml.YAMLError, AttributeError, UnicodeDecodeError):
                continue  # the parser will say so
    return found


def walk_subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    """Walk over a class and all classes that derive from it."""
    yield kind
    for derived in kind.__subclasses__():
        yield from walk_subclasses(derived)


def write_class_path(kind: type) -> str:
    """Write the shortest path by which a configuration may name a class of ours."""
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"
