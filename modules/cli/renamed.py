"""Names of an earlier layout: with them a ``config.yaml`` that an earlier version saved still runs."""

import re
from typing import Any

MODULES = {  # where classes lay -> where they lie
    "callbacks.instruction_writer": "callbacks.writers.instruction_writer",
    "callbacks.knowledge_writer": "callbacks.writers.knowledge_writer",
    "callbacks.prediction_writer": "callbacks.writers.prediction_writer",
    "callbacks.preference_writer": "callbacks.writers.preference_writer",
    "datamodules.candidates": "datamodules.predict.candidates",
    "datamodules.facts": "datamodules.predict.facts",
    "datamodules.mixture_streams": "datamodules.loaders.mixture_streams",
    "datamodules.ptx": "datamodules.loaders.ptx",
    "datamodules.seed_tasks": "datamodules.predict.seed_tasks",
    "datamodules.sources.addition": "datamodules.sources.toys.addition",
    "datamodules.sources.base": "datamodules.sources.source",
    "datamodules.sources.facts": "datamodules.sources.toys.invented_facts",
    "datamodules.sources.guarded": "datamodules.sources.toys.guarded_addition",
    "datamodules.sources.number_texts": "datamodules.sources.toys.number_texts",
    "modules.knowledge": "modules.predict.knowledge",
    "modules.label": "modules.predict.label",
    "modules.objectives": "modules.losses",
    "modules.losses.pairs": "modules.losses.preference",
    "modules.objectives.pairs": "modules.losses.preference",
    "modules.objectives.policy": "modules.losses.policy",
    "modules.objectives.preference": "modules.losses.preference",
    "modules.rewards.base": "modules.rewards.combined",
    "modules.rewards.chat_client": "modules.rewards.chat.clients",
    "modules.rewards.function": "modules.types",
    "modules.rewards.judge": "modules.rewards.chat.judge",
    "modules.rewards.length": "modules.rewards.combined",
    "modules.rewards.math": "modules.rewards.answers",
    "modules.rewards.refusal_judge": "modules.rewards.chat.refusal_judge",
    "modules.rewards.versus": "modules.rewards.combined",
    "modules.rewards.weighted_sum": "modules.rewards.combined",
    "modules.rollout.in_process": "modules.rollout.engine",
    "modules.self_instruct": "modules.predict.self_instruct",
}
FUNCTIONS = {  # classes that became functions, and the settings of those functions
    "GroupCenter": ("modules.functional.advantages.group_center", {}),
    "GroupZScore": ("modules.functional.advantages.group_zscore", {"eps": 1e-4}),
    "LeaveOneOut": ("modules.functional.advantages.leave_one_out", {}),
}
VALIDATION = {"accuracy": "validation.accuracy", "val_generations": "validation.generations"}
OPTIONS = {  # by class: options that moved into a group; "" = the option had no effect and is gone
    "GRPOModule": VALIDATION,
    "LabelModule": {"policy": ""},
    "MixtureDataModule": {"decay_start": "decay.start", "ramp_steps": "decay.ramp_steps"},
    "OnlineDPOModule": VALIDATION,
    "PPOModule": {
        **VALIDATION,
        "gamma": "gae.gamma",
        "lam": "gae.lam",
        "whiten_rewards": "gae.whiten_rewards",
        "cliprange": "clip.ratio",
        "dual_clip": "clip.dual",
        "cliprange_value": "clip.value",
        "vf_coef": "value.coef",
        "kl_coef": "kl.coef",
        "adaptive_kl": "kl.adaptive",
        "kl_loss": "kl.loss",
        "reference": "kl.reference",
        "missing_eos": "incentives.missing_eos",
        "missing_eos_penalty": "incentives.missing_eos.penalty",
        "replace_missing_eos": "incentives.missing_eos.replace",
        "entropy_coef": "incentives.entropy",
        "ptx_coef": "incentives.ptx",
    },
    "SelfInstructModule": {"policy": ""},
}
# By class: options that now have another unit, the default that they had, and what says the same today.
REPLACED = {
    "InProcessEngine": {
        "max_batch_tokens": (65536, "set max_cache_gb, a bound in GB (65536 tokens of SmolLM2-135M in fp32 are 3 GB)")
    }
}
# Options that switched their group on: without a value, the other options of the group had no effect.
SWITCHES = {"missing_eos_penalty": "incentives.missing_eos.", "decay_start": "decay."}
OLD = re.compile(rf"\b({'|'.join(sorted(map(re.escape, MODULES), key=len, reverse=True))})\.(?=[A-Za-z_]\w*$)")


def renew(value: Any) -> Any:
    """Put today's names into a loaded configuration, or into a part of it.

    >>> renew({"class_path": "modules.objectives.policy.Clipped", "init_args": {"clip_low": 0.2}})
    {'class_path': 'modules.losses.policy.Clipped', 'init_args': {'clip_low': 0.2}}
    """
    if isinstance(value, str):
        return OLD.sub(lambda match: f"{MODULES[match[1]]}.", value)
    if isinstance(value, list):
        return [renew(part) for part in value]
    if isinstance(value, dict):
        name = str(value.get("class_path")).rpartition(".")[2]
        if name in FUNCTIONS:
            return find_function(name, value.get("init_args") or {})
        if name in OPTIONS and isinstance(value.get("init_args"), dict):
            value = value | {"init_args": move(value["init_args"], OPTIONS[name])}
        if name in REPLACED and isinstance(value.get("init_args"), dict):
            value = value | {"init_args": leave_out(name, value["init_args"])}
        return {key: renew(part) for key, part in value.items()}
    return value


def find_function(name: str, arguments: dict[str, Any]) -> str:
    """Return the path of the function that a class became.

    Raises:
        ValueError: the class had other settings than the function.
    """
    path, settings = FUNCTIONS[name]
    other = {option: value for option, value in arguments.items() if settings.get(option) != value}
    if other:
        raise ValueError(
            f"{name} had {other} and {path} has {settings}: name a function of your own that calls it with "
            f"{', '.join(f'{option}={value}' for option, value in other.items())}"
        )
    return path


def leave_out(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a class without those that have another unit today.

    Raises:
        ValueError: one of them was not left at its default.
    """
    for option, (default, advice) in REPLACED[name].items():
        if arguments.get(option, default) != default:
            raise ValueError(f"{name} has no {option} any more, which was {arguments[option]}: {advice}")
    return {option: value for option, value in arguments.items() if option not in REPLACED[name]}


def move(arguments: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
    """Move arguments into the groups that hold them now, as ``places`` says.

    >>> move({"lam": 0.9, "seed": 0}, {"lam": "gae.lam"})
    {'seed': 0, 'gae': {'lam': 0.9}}
    """
    kept = {name: value for name, value in arguments.items() if name not in places}
    off = [group for switch, group in SWITCHES.items() if switch in places and arguments.get(switch) is None]
    for name, place in places.items():
        if name in arguments and place and not place.startswith(tuple(off)):
            *groups, option = place.split(".")
            inner = kept
            for group in groups:
                inner[group] = dict(inner.get(group) or {})
                inner = inner[group]
            inner[option] = arguments[name]
    return kept
