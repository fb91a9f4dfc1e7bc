"""Low-rank adapters (LoRA, arXiv 2106.09685), from the peft library: a model's linear layers plus a trained product of
two thin matrices.

Several sets of adapters may lie side by side on one frozen backbone, each a model of its own at the price of its thin
matrices: the policy's, a critic's, a reward model's. The layers compute with the policy's set, except inside ``using``.
"""

import copy
import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peft import LoraConfig

POLICY = "default"  # the policy's own set
ADAPTERS = "adapters"  # subfolder of an export that holds its adapters apart from the backbone
HEAD_FILE = "head.safetensors"  # in that subfolder, where the adapters have a head: weight [heads, H]
WEIGHTS_FILE = "adapter_model.safetensors"  # peft's; the backbone's digest is in its metadata
PREFIX = "base_model.model."  # of the weights' names in that file


@dataclass(frozen=True)
class Lora:
    """W + (alpha / r) B A beside every named linear layer; B starts at zero, so that training starts at the model
    itself.

    Raises:
        ValueError: values out of range.
    """

    r: int = 16  # >= 1, rank of the update
    alpha: float = 32.0  # > 0, its scale is alpha / r
    dropout: float = 0.05  # [0, 1), on the adapter's input; off in reinforcement learning and preference losses
    target_modules: tuple[
        str, ...
    ] = ()  # ends of layer names, such as q_proj; none = all linear layers but the output head

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora: r must be >= 1, alpha > 0 and dropout in [0, 1), got {self.r}, {self.alpha} and {self.dropout}"
            )


class OtherBackbone(ValueError):
    """Adapters that were trained on another model."""


def add_adapters(model: PreTrainedModel, lora: Lora, name: str = POLICY) -> None:
    """Put a set of adapters that learns into ``model``, in place, and freeze the backbone; other sets stay as they are.

    A set beside the policy's has no dropout. ImportError without peft, ValueError for unknown layers and for a name
    that is taken.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("lora needs the package peft: pip install 'lightning-align[lora]'") from error
    targets = list(lora.target_modules) or "all-linear"
    dropout = lora.dropout if name == POLICY else 0.0
    _inject(model, LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=dropout, target_modules=targets), name)  # type: ignore[arg-type]


@contextmanager
def using(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside, the layers compute with the set ``name``, those without it with the backbone alone; afterwards as before.
    ValueError without it.

    A backward pass may come afterwards: its gradients go to the set that computed. What is computed anew in the
    backward pass, as gradient checkpointing does, must be inside as well.
    """
    if name not in adapter_names(model):
        raise ValueError(f"the model has no adapters named '{name}', only {sorted(adapter_names(model))}")
    layers = [layer for _, layer in _layers(model)]
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [name]  # peft's set_adapter would also decide what learns
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def adapter_names(model: PreTrainedModel) -> set[str]:
    """The sets of ``model``."""
    return set(getattr(model, "peft_config", ()))


def adapter_parameters(model: PreTrainedModel, name: str) -> dict[str, nn.Parameter]:
    """The weights of the set ``name``, by their names in ``model``."""
    places = {
        f"{layer_name}.{kind}.{name}" for layer_name, layer in _layers(model) for kind in layer.adapter_layer_names
    }
    return {
        key: weight for key, weight in model.named_parameters() if key in places or key.rpartition(".")[0] in places
    }


def save_adapters(model: PreTrainedModel, name: str, folder: str | Path) -> None:
    """Write the set ``name`` as peft does, ``adapter_config.json`` and ``adapter_model.safetensors``, with the digest
    of its backbone.
    """
    folder = Path(folder)
    model.peft_config[name].save_pretrained(str(folder))
    weights = {
        _saved(key, name): weight.detach().cpu().contiguous() for key, weight in adapter_parameters(model, name).items()
    }
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt", "backbone": backbone_digest(model)})


@torch.no_grad()
def load_adapters(model: PreTrainedModel, folder: str | Path, name: str, trainable: bool) -> None:
    """Put the set of ``save_adapters`` beside those that ``model`` has, under ``name``, without dropout; costs no
    random numbers.

    A set that does not learn stays out of the model's ``state_dict``, and so out of checkpoints, since ``folder`` has
    it.

    Raises:
        OtherBackbone: the set was trained on another backbone.
        ValueError: the name is taken.
    """
    from peft import LoraConfig

    if saved_digest(folder) != backbone_digest(model):
        raise OtherBackbone(
            f"'{folder}' holds adapters of another backbone than this model's: load the model that they were trained on"
        )
    config = LoraConfig.from_pretrained(str(folder))
    config.lora_dropout, config.inference_mode = 0.0, False
    with torch.random.fork_rng(devices=[]):
        _inject(model, config, name)  # type: ignore[arg-type]
    saved, own = load_file(Path(folder) / WEIGHTS_FILE), adapter_parameters(model, name)
    for key, weight in own.items():
        weight.copy_(saved[_saved(key, name)])
        weight.requires_grad_(trainable)
    if not trainable:
        model.register_state_dict_post_hook(partial(_leave_out, tuple(own)))
        model.register_load_state_dict_post_hook(partial(_not_missed, tuple(own)))


def saved_digest(folder: str | Path) -> str | None:
    """The digest of the backbone that the adapters in ``folder`` were trained on; None where there are none."""
    file = Path(folder) / WEIGHTS_FILE
    if not file.is_file():
        return None
    with safe_open(file, "pt") as opened:
        return (opened.metadata() or {}).get("backbone")


def backbone_digest(model: PreTrainedModel) -> str:
    """A hash of the weights without adapters and without output head, which reward models and critics do not read."""
    backbone, found = model.base_model, hashlib.blake2b(digest_size=16)
    inside = tuple(f"{name}." for name, _ in _layers(backbone))
    for key, weight in backbone.state_dict().items():
        if ".base_layer." in key or not key.startswith(inside):
            found.update(key.replace(".base_layer.", ".").encode())
            found.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` with the policy's adapters added into its weights and without all others: a plain model
    again.
    """
    plain = copy.deepcopy(model)
    for name, layer in _layers(plain):
        layer.merge(adapter_names=[POLICY])
        plain.set_submodule(name, layer.get_base_layer())
    del plain.peft_config
    return plain


def _inject(model: PreTrainedModel, config: "LoraConfig", name: str) -> None:
    """peft's layers around those that ``config`` names, with a set ``name``, which learns; the policy's set stays the
    one they compute with.
    """
    from peft import inject_adapter_in_model

    if name in adapter_names(model):
        raise ValueError(f"the model has adapters named '{name}' already: choose another name")
    before = [
        (weight, weight.requires_grad)
        for other in adapter_names(model)
        for weight in adapter_parameters(model, other).values()
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several sets are the intention
        inject_adapter_in_model(config, model, name)
    for _, layer in _layers(model):
        layer._active_adapter = [POLICY]
    for weight, learns in [*before, *((weight, True) for weight in adapter_parameters(model, name).values())]:
        weight.requires_grad_(learns)


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """peft's layers by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _saved(key: str, name: str) -> str:
    """The name in peft's file of a weight of the set ``name``: without the set."""
    layer, _, kind = key.rpartition(f".{name}")
    return f"{PREFIX}{layer}{kind}"


def _leave_out(keys: tuple[str, ...], module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for key in keys:
        state.pop(prefix + key, None)


def _not_missed(keys: tuple[str, ...], module: nn.Module, found: Any) -> None:
    found.missing_keys[:] = [key for key in found.missing_keys if not key.endswith(keys)]
