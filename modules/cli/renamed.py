"""Names of an earlier layout, so that a ``config.yaml`` that an earlier version saved still runs."""

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
    "modules.objectives.pairs": "modules.losses.pairs",
    "modules.objectives.policy": "modules.losses.policy",
    "modules.objectives.preference": "modules.losses.preference",
    "modules.rewards.base": "modules.rewards.combined",
    "modules.rewards.chat_client": "modules.rewards.chat.clients",
    "modules.rewards.judge": "modules.rewards.chat.judge",
    "modules.rewards.length": "modules.rewards.combined",
    "modules.rewards.refusal_judge": "modules.rewards.chat.refusal_judge",
    "modules.rewards.versus": "modules.rewards.combined",
    "modules.rewards.weighted_sum": "modules.rewards.combined",
    "modules.self_instruct": "modules.predict.self_instruct",
}
FUNCTIONS = {  # classes that became functions
    "GroupCenter": "modules.functional.advantages.group_center",
    "GroupZScore": "modules.functional.advantages.group_zscore",
    "LeaveOneOut": "modules.functional.advantages.leave_one_out",
}
OPTIONS = {  # of a class, that moved into a group; "" = that had no effect and is gone
    "LabelModule": {"policy": ""},
    "SelfInstructModule": {"policy": ""},
    "PPOModule": {
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
        "missing_eos_penalty": "missing_eos.penalty",
        "replace_missing_eos": "missing_eos.replace",
    },
}
OLD = re.compile(rf"\b({'|'.join(sorted(map(re.escape, MODULES), key=len, reverse=True))})\.(?=[A-Za-z_]\w*$)")


def renew(value: Any) -> Any:
    """A loaded configuration, or a part of it, with today's names.

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
            return FUNCTIONS[name]
        if name in OPTIONS and isinstance(value.get("init_args"), dict):
            value = value | {"init_args": move(value["init_args"], OPTIONS[name])}
        return {key: renew(part) for key, part in value.items()}
    return value


def move(arguments: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
    """The arguments, those that ``places`` names in the groups that hold them now.

    >>> move({"lam": 0.9, "seed": 0}, {"lam": "gae.lam"})
    {'seed': 0, 'gae': {'lam': 0.9}}
    """
    kept = {name: value for name, value in arguments.items() if name not in places}
    if arguments.get("missing_eos_penalty") is None:  # the group is there only with a penalty
        places = {name: place for name, place in places.items() if not place.startswith("missing_eos.")}
    for name, place in places.items():
        if name in arguments and place:
            group, _, option = place.partition(".")
            kept[group] = {**(kept.get(group) or {}), option: arguments[name]}
    return kept
