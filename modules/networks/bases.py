"""The frozen models under adapters: checkpoints name them and leave their weights out, since ``model.policy`` has them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from modules.networks.digests import hash_base
from modules.networks.policy import Policy


def find_bases(module: nn.Module) -> dict[str, Policy]:
    """Return the models inside a module of which adapters alone are trained, by their place in it."""
    return {place: part for place, part in module.named_modules() if isinstance(part, Policy) and part.has_adapters}


def find_frozen_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights under adapters that do not learn, by their names in the module's ``state_dict``."""
    return {
        f"{place}.{name}": weight.detach()
        for place, base in find_bases(module).items()
        for name, weight in base.named_parameters(remove_duplicate=False)
        if not weight.requires_grad and "lora_" not in name
    }


def leave_out_bases(module: nn.Module, checkpoint: dict[str, Any]) -> dict[str, dict[str, str | None]]:
    """Take the frozen weights under adapters out of a checkpoint, in place.

    Returns:
        the path and the ``base_id`` of each model, by its place; ``put_back_bases`` reads them.
    """
    for name in find_frozen_weights(module):
        for state in find_states(checkpoint):
            state.pop(name, None)
    return {place: {"path": base.path, "weights": base.base_id} for place, base in find_bases(module).items()}


def put_back_bases(module: nn.Module, checkpoint: dict[str, Any], known: Mapping[str, Mapping[str, str]]) -> None:
    """Put the module's own frozen weights into a checkpoint without them, in place.

    Args:
        module: the module that will load the checkpoint.
        checkpoint: one of an earlier version holds the frozen weights and keeps them.
        known: what ``leave_out_bases`` returned; empty for a checkpoint of an earlier version.

    Raises:
        ValueError: the checkpoint's adapters were trained on other weights.
    """
    for place, base in find_bases(module).items():
        said = known.get(place)
        if (said["weights"] if said else hash_held(base, place, checkpoint["state_dict"])) != base.base_id:
            raise ValueError(
                f"the checkpoint's adapters were trained on {repr(said['path']) if said else 'another model'}, and "
                f"{base.name} has other weights: name the model that they were trained on"
            )
    for name, weight in find_frozen_weights(module).items():
        for state in find_states(checkpoint):
            state.setdefault(name, weight)


def hash_held(base: Policy, place: str, weights: Mapping[str, Tensor]) -> str:
    """Return the ``base_id`` of the weights that a checkpoint holds of a model at ``place``."""
    names = [(name, f"{place}.{name}") for name in base.state_dict()]
    return hash_base((name, weights[full]) for name, full in names if full in weights)


def find_states(checkpoint: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Return the states of weights in a checkpoint: the module's and, if that is an average, also the trained weights."""
    return [checkpoint[name] for name in ("state_dict", "current_model_state") if name in checkpoint]
