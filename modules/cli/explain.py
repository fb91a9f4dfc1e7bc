"""Turns a parser's error, which lists every type that a value is not, into one sentence."""

import difflib
import importlib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Not a valid subclass of",
    "Subclass types expect",
    "a class path (str)",
    "a dict with",
    "Problem with given class_path 'lightning.Callback'",  # the other reading of one callback in a list
)
OTHER_TYPES = ("Expected a <class 'str'>", "Expected a <class 'list'>")  # offered beside a class
PLAIN_TYPE = re.compile(r"Expected a <class '(int|float|bool|dict)'>")
ABSTRACT = re.compile(r"Expected an instantiatable class, but (\S+) is abstract")
FILE = re.compile(
    r"Problem with given class_path '([^']+\.(?:jsonl?|ndjson|csv|tsv|parquet|arrow|txt|gz))': No module .*"
)
CLASS = re.compile(r"Expected a dot import path string: (\S+)")
LACKS = re.compile(
    r"module '(?:callbacks|datamodules|modules)\b[\w.]*' has no attribute '([A-Z]\w*)'(?!; did you mean)"
)
NO_SUBCLASS = re.compile(r"Import path (?:(\S+) )?does not correspond to a subclass of (\w+)")
BASES = ("modules.types", "modules.losses", "modules.rollout", "datamodules", "lightning.pytorch", "torch.optim")
VALUE = re.compile(r"Given value: (.*?)(?:\. Got value: .*)?$", re.MULTILINE)
INNER_CHOICE = re.compile(r'Parser key "\w+": expected one of ')
CHOICES = re.compile(r"Expected a typing\.Literal\[(.*)\]")


def write_sentence(message: str, names: Sequence[str]) -> str:
    """Write the reasons of ``message`` on one line; ``names`` are the names that a misspelt value may mean."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    reasons = [line for line in dict.fromkeys(lines) if line and not line.startswith(NOISE) and line not in OTHER_TYPES]
    choices = [
        choice for line in reasons for group in CHOICES.findall(line) for choice in re.findall(r"'([^']+)'", group)
    ]
    if choices:
        rest = [line for line in reasons if not CHOICES.match(line) and not PLAIN_TYPE.match(line)]
        reasons = [*rest, f"expected one of {', '.join(sorted(set(choices)))}"]
    if any(PLAIN_TYPE.match(line) for line in reasons):
        reasons = [line for line in reasons if not CLASS.match(line)]
    if any(INNER_CHOICE.search(line) for line in reasons):  # whose class was recognised
        reasons = [line for line in reasons if not PLAIN_TYPE.match(line)]
    joined = ": ".join(line.rstrip(":") for line in reasons)
    joined = re.sub(
        r"Type typing\.Callable.* expects a function or a callable class: |\. Got value: Namespace\(.*", "", joined
    )
    joined = PLAIN_TYPE.sub(r"expected type \1", joined)
    joined = ABSTRACT.sub(lambda match: ask_for_class(match[1], names), joined)
    joined = NO_SUBCLASS.sub(lambda match: ask_to_derive(match[1] or "the class", match[2]), joined)
    joined = FILE.sub(
        r"'\1' is a file, which has no options; write, for example, --data.train Files --data.train.path \1", joined
    )
    joined = LACKS.sub(lambda match: match[0] + suggest_names(match[1], names), joined)
    joined += quote_value(message, joined)
    joined = re.sub(
        r'Parser key "([\w.]+)"$', r"\1 does not take the value that it has; leave it out, or set another", joined
    )
    if choices and (value := VALUE.search(message)):
        joined += suggest_names(value[1], choices)
    return CLASS.sub(
        lambda match: (
            f"there is no class {match[1]!r}"
            + (suggest_names(match[1], names) or "; name a class of ours, or the whole class path of another")
        ),
        joined,
    )


def ask_for_class(path: str, names: Sequence[str]) -> str:
    """Ask for the class whose option was set; ``path`` is the abstract class that it must derive from."""
    module, _, name = path.rpartition(".")
    base, known = getattr(importlib.import_module(module), name), vars(importlib.import_module(module))
    choices = [name for name in names if isinstance(known.get(name), type) and issubclass(known[name], base)]
    return (
        f"name the class first, such as {', '.join(choices) or f'one that derives from {path}'}, and then its options"
    )


def ask_to_derive(path: str, base: str) -> str:
    """Ask for a class that derives from ``base``."""
    module = next((name for name in BASES if base in vars(importlib.import_module(name))), "")
    function = ", or name a plain function (prompts, completions, answers, **columns)" if base == "Reward" else ""
    return f"{path} is no {base}: derive it from {module}{'.' if module else ''}{base}{function}"


def quote_value(message: str, joined: str) -> str:
    """Quote the value of the wrong type, if the reasons end without it."""
    value = VALUE.search(message)
    return (
        f", got {value[1]!r}"
        if value and re.search(r"expected (type \w+|one of [^:;]+)$", joined) and not value[1].startswith("NestedArg")
        else ""
    )


EXAMPLES = {
    "policy": "--model.policy PATH_OR_HUB_ID",
    "reward": "--model.reward ExactMatch, or another reward's name",
    "train": "--data.train my.jsonl",
}


def explain_command(message: str) -> str:
    """Say what to write instead of a command line without a method, or with a file in the wrong place; else empty."""
    missing = re.search(r"arguments are required: (\w+)\.(?:data|model)\b", message)
    if missing and message.endswith(f"{missing[1]}.data"):
        return f"{missing[1]} needs data: add --data.train my.jsonl"
    if missing:
        example = "configs/tiny/grpo.yaml" if missing[1] == "predict" else "configs/tiny/sft.yaml"
        return f"{missing[1]} needs a method and data: add --config {example}, or another YAML of configs"
    if message.endswith("arguments are required: policy"):
        return "chat needs a model: add --policy FOLDER, such as the export of a run"
    file = re.search(r"unrecognized arguments: (?!-)(\S+\.ya?ml)\b", message)
    if file:
        return f"{file[1]} stands alone: write --config before it"
    command = re.search(r"invalid choice: '([^']+)' \(choose from (.*)\)", message)
    if command is None or "subcommand" not in message:
        return ""
    if command[1].endswith((".yaml", ".yml")):
        return f"{command[1]} is no command: write fit --config before it, or another command"
    known = [*re.findall(r"'(\w+)'", command[2]), "chat", "merge"]
    others = {"train": "fit", "finetune": "fit", "eval": "validate", "evaluate": "validate", "generate": "predict"}
    meant = others.get(command[1])
    near = f"; did you mean {meant}?" if meant else suggest_names(command[1], known)
    return f"there is no command {command[1]!r}; the commands are {', '.join(known)}{near}"


def explain_missing_arguments(message: str) -> str:
    """Say what to add to the command if a class lacks an argument that it needs; empty for other errors."""
    found = re.search(r"class_path '(?:[\w.]+\.)?(\w+)'.*?arguments are required: ([\w, ]+)", message, flags=re.DOTALL)
    if found is None:
        return ""
    wanted = "; ".join(f"add {EXAMPLES.get(name, f'the argument {name}')}" for name in found[2].split(", "))
    own = f"with nothing of your own, configs/tiny/{name_tiny_config(found[1])}.yaml runs offline"
    return f"{found[1]} needs {found[2]}: {wanted}; {own}"


def name_tiny_config(kind: str) -> str:
    """Return the stem of the configuration in ``configs/tiny`` that runs a class; ``<method>`` if it is no method.

    >>> name_tiny_config("OnlineDPOModule"), name_tiny_config("PreferenceDataModule")
    ('online_dpo', '<method>')
    """
    method = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.removesuffix("Module")).lower()
    return method if kind.endswith("Module") and not kind.endswith("DataModule") else "<method>"


def suggest_argument(message: str) -> str:
    """Suggest the arguments of a class that are nearest to a misspelt one, as the end of a sentence."""
    found = re.search(r"class_path '([\w.]+)':[\s-]*Option '([\w.]+)' is not accepted(.*)", message, flags=re.DOTALL)
    if found is None or "did you mean" in found[3]:
        return ""
    module, _, name = found[1].rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    return suggest_names(found[2], list(inspect.signature(kind).parameters))


OURS = {  # by frequent names of TRL and LLaMA-Factory
    **dict.fromkeys(("learning_rate", "lr"), ["model.optimizer.lr"]),
    **dict.fromkeys(("loss_type", "pref_loss", "loss"), ["model.objective"]),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "epochs"), ["trainer.max_epochs"]),
    **dict.fromkeys(
        ("per_device_train_batch_size", "train_batch_size", "batch_size"), ["data.batch_size", "data.prompts_per_phase"]
    ),
    **dict.fromkeys(("max_seq_length", "cutoff_len", "max_length"), ["data.max_length"]),
    **dict.fromkeys(("max_new_tokens", "max_completion_length"), ["model.sampling.max_completion_length"]),
    **dict.fromkeys(("model_name_or_path", "model_name"), ["model.policy"]),
    **dict.fromkeys(("lora_r", "lora_rank"), ["model.lora.r"]),
    **dict.fromkeys(("test", "eval_dataset"), ["data.val"]),
    "beta": ["model.beta", "model.kl.coef"],
    "bf16": ["trainer.precision"],
    "gradient_accumulation_steps": ["trainer.accumulate_grad_batches"],
    "lr_scheduler_type": ["model.scheduler"],
    "max_grad_norm": ["trainer.gradient_clip_val"],
    "max_prompt_length": ["data.max_prompt_length"],
    "output_dir": ["out"],
    "report_to": ["logger"],
    "resume_from_checkpoint": ["ckpt_path"],
    "reward_funcs": ["model.reward"],
    "seed": ["seed_everything"],
    "temperature": ["model.sampling.temperature"],
}


def name_our_option(message: str) -> str:
    """Name, as the end of a sentence, our option for a name of TRL or LLaMA-Factory; empty for other names.

    Only the outermost parser's message tells where the option was set.
    """
    chain = re.findall(r"Parser key \"(\w+)\":[^\"]*?class_path '([\w.]+)'", message)
    found = re.search(r"unrecognized arguments: --([\w.]+)|option '([\w.]+)'$|Option '(\w+)' is not accepted", message)
    if found is None or len(chain) > 1 or bool(chain) != bool(found[3]):
        return ""
    place = f"{chain[0][0]}.{found[3]}" if chain else found[1] or found[2]
    owner, _, name = place.rpartition(".")
    meant = [option for option in OURS.get(name, []) if option != place and owner in ("", "model", "data", "trainer")]
    if chain:
        module, _, kind = chain[0][1].rpartition(".")
        known = inspect.signature(getattr(importlib.import_module(module), kind)).parameters
        meant = [option for option in meant if not option.startswith(f"{owner}.") or option.split(".")[1] in known]
    return f"; here this is {' or '.join(f'--{option}' for option in meant)}" if meant else ""


def point_to_owner(message: str) -> str:
    """Say, as the end of a sentence, that an outer class has the option that was set in one of its parts."""
    chain = re.findall(r"Parser key \"(\w+)\":[^\"]*?class_path '([\w.]+)'", message)
    refused = re.search(r"Option '(\w+)' is not accepted", message)
    unnamed = re.search(r"name the class first.*NestedArg\(key='[\w.]+\.(\w+)'", message, flags=re.DOTALL)
    found = refused or unnamed
    if found is None:
        return ""
    for depth, (_, path) in enumerate(chain[:-1] if refused else chain, start=1):
        module, _, name = path.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        if found[1] in inspect.signature(kind).parameters:
            keys = ".".join(key for key, _ in chain[:depth])
            return f"; {found[1]} is an option of {name}: --{keys}.{found[1]}"
    return ""


def point_to_part(message: str) -> str:
    """Say, as the end of a sentence, that a part of the class whose option was set has that option."""
    chain = re.findall(r"Parser key \"(\w+)\":[^\"]*?class_path '([\w.]+)'", message)
    refused = re.search(r"Option '(\w+)' is not accepted", message)
    if not chain or chain[0][0] not in ("model", "data") or refused is None:  # else an outer parser will say it
        return ""
    module, _, name = chain[-1][1].rpartition(".")
    keys = ".".join(key for key, _ in chain)
    for part, parameter in inspect.signature(getattr(importlib.import_module(module), name)).parameters.items():
        for kind in (parameter.annotation, *get_args(parameter.annotation)):
            own = isinstance(kind, type) and kind.__module__.startswith("modules.")
            if own and refused[1] in inspect.signature(kind).parameters:
                option = f"--{keys}.{part} {kind.__name__} --{keys}.{part}.{refused[1]}"
                return f"; {refused[1]} is an option of {kind.__name__}: {option}"
    return ""


def explain_taken_name(message: str) -> str:
    """Say, as the end of a sentence, that a folder of the user's has the name of a package of ours."""
    for name in re.findall(r"class_path '(callbacks|datamodules|modules)\.", message):
        here = Path(name).resolve()
        if here.is_dir() and here != Path(__file__).parents[2] / name:
            return f"; the folder {name} here has the name of a package of this program: rename it"
    return ""


def suggest_names(name: str, known: Sequence[str], before: str = "") -> str:
    """Suggest, as the end of a sentence, the known names that begin like a shortened one, or are nearest to a misspelt
    one. Empty if none is near, or if the name is known.

    Args:
        name: the misspelt name.
        known: the right names.
        before: text in front of each suggestion.
    """
    if name in known:
        return ""
    near = {other: difflib.SequenceMatcher(None, name, other).ratio() for other in sorted(set(known))}
    best = max(near.values(), default=0.0)
    whole = [other for other in near if other.startswith(name)][:3]
    close = (
        whole
        or sorted((other for other in near if near[other] >= max(0.6, best - 0.1)), key=lambda other: -near[other])[:3]
    )
    return f"; did you mean {' or '.join(before + other for other in close)}?" if close else ""
