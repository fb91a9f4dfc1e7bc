"""Low-rank adapters (LoRA, arXiv 2106.09685) from the peft library.

A model trains a product of two thin matrices beside each of its linear layers, and leaves its own weights alone.

Several sets of adapters can lie on one frozen backbone: the policy's, a critic's, a reward model's. Each set is a model
of its own and costs only its thin matrices. The layers compute with the policy's set, except inside ``using``.
"""

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

POLICY = "default"  # name of the policy's own set
ADAPTERS = "adapters"  # subfolder of an export that holds its adapters apart from the backbone
HEAD_FILE = "head.safetensors"  # in that subfolder, if the adapters have a head: weight [heads, H]
WEIGHTS_FILE = "adapter_model.safetensors"  # peft's file name; its metadata hold the digest of the backbone
PREFIX = "base_model.model."  # peft puts this before the names of the weights in that file


@dataclass(frozen=True)
class Lora:
    """Adds (alpha / r) B A to every chosen linear layer W. B starts at zero, so training starts at the model itself.

    Raises:
        ValueError: a value is out of range.
    """

    r: int = 16  # >= 1, rank of the update
    alpha: float = 32.0  # > 0; the update is scaled by alpha / r
    dropout: float = 0.05  # [0, 1), on the adapter's input; off in reinforcement learning and preference losses
    # ends of layer names, such as q_proj; empty = all linear layers except the output head
    target_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora: r must be >= 1, alpha > 0 and dropout in [0, 1), got {self.r}, {self.alpha} and {self.dropout}"
            )


class OtherBackbone(ValueError):
    """Raised for adapters that were trained on another backbone."""


def add_adapters(model: PreTrainedModel, lora: Lora, name: str = POLICY) -> None:
    """Put a set of trainable adapters into ``model``, in place, and freeze the backbone.

    Other sets stay as they are. Only the policy's set has dropout.

    Args:
        model: the model that gets the adapters.
        lora: rank, scale, dropout and layers.
        name: name of the set.

    Raises:
        ImportError: the package peft is not installed.
        ValueError: the model has none of the named layers, or it already has a set of this name.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(
            "lora needs the package peft; install it with: pip install 'lightning-align[lora]'"
        ) from error
    targets = list(lora.target_modules) or "all-linear"
    dropout = lora.dropout if name == POLICY else 0.0
    _inject(model, LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=dropout, target_modules=targets), name)  # type: ignore[arg-type]


@contextmanager
def using(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let the layers compute with the set ``name`` inside the ``with`` block.

    A layer without that set computes with the backbone alone. A backward pass may come after the block: its gradients
    go to the set that computed. What the backward pass computes again needs ``find_recomputation``, or the block.

    Raises:
        ValueError: the model has no set of this name.
    """
    if name not in list_adapters(model):
        raise ValueError(
            f"the model has no adapters named '{name}'; it has {', '.join(sorted(list_adapters(model))) or 'none'}"
        )
    layers = [layer for _, layer in _layers(model)]
    with _activating(layers, [[name]] * len(layers)):
        yield


def find_recomputation(
    part: nn.Module,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Return the ``context_fn`` by which torch's checkpoint computes a part of a model again with the same adapters."""
    layers = [layer for _, layer in _layers(part)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _activating(layers, [layer._active_adapter for layer in layers])

    return contexts


def list_adapters(model: PreTrainedModel) -> set[str]:
    """Return the names of the sets that ``model`` has."""
    return set(getattr(model, "peft_config", ()))


def find_adapter_parameters(model: PreTrainedModel, name: str) -> dict[str, nn.Parameter]:
    """Return the weights of the set ``name``, by their names in ``model``."""
    places = {
        f"{layer_name}.{kind}.{name}" for layer_name, layer in _layers(model) for kind in layer.adapter_layer_names
    }
    return {
        key: weight for key, weight in model.named_parameters() if key in places or key.rpartition(".")[0] in places
    }


def save_adapters(model: PreTrainedModel, name: str, folder: str | Path) -> None:
    """Write the set ``name`` to ``folder`` as peft does, with the digest of its backbone.

    The files are ``adapter_config.json`` and ``adapter_model.safetensors``.
    """
    folder = Path(folder)
    model.peft_config[name].save_pretrained(str(folder))
    weights = {
        _saved(key, name): weight.detach().cpu().contiguous()
        for key, weight in find_adapter_parameters(model, name).items()
    }
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt", "backbone": digest_backbone(model)})


@torch.no_grad()
def load_adapters(model: PreTrainedModel, folder: str | Path, name: str, trainable: bool) -> None:
    """Put a set that ``save_adapters`` wrote into ``model``, without dropout.

    Loading uses no random numbers. A set that does not learn stays out of the model's ``state_dict``, and so out of
    checkpoints, because ``folder`` holds it.

    Args:
        model: the model that gets the adapters.
        folder: where the set was written.
        name: name of the set in ``model``.
        trainable: whether the set learns.

    Raises:
        OtherBackbone: the set was trained on another backbone.
        ValueError: ``model`` already has a set of this name.
    """
    from peft import LoraConfig

    if read_digest(folder) != digest_backbone(model):
        raise OtherBackbone(
            f"'{folder}' holds adapters of another backbone than this model's; load the model that they were trained on"
        )
    config = LoraConfig.from_pretrained(str(folder))
    config.lora_dropout, config.inference_mode = 0.0, False
    with torch.random.fork_rng(devices=[]):
        _inject(model, config, name)  # type: ignore[arg-type]
    saved, own = load_file(Path(folder) / WEIGHTS_FILE), find_adapter_parameters(model, name)
    for key, weight in own.items():
        weight.copy_(saved[_saved(key, name)])
        weight.requires_grad_(trainable)
    if not trainable:
        model.register_state_dict_post_hook(partial(_leave_out, tuple(own)))
        model.register_load_state_dict_post_hook(partial(_not_missed, tuple(own)))


def read_digest(folder: str | Path) -> str | None:
    """Return the digest of the backbone that the adapters in ``folder`` were trained on; None without adapters."""
    file = Path(folder) / WEIGHTS_FILE
    if not file.is_file():
        return None
    with safe_open(file, "pt") as opened:
        return (opened.metadata() or {}).get("backbone")


def digest_backbone(model: PreTrainedModel) -> str:
    """Hash the weights of the backbone, without adapters and without output head.

    Reward models and critics do not read the output head, so it may differ.
    """
    backbone, found = model.base_model, hashlib.blake2b(digest_size=16)
    inside = tuple(f"{name}." for name, _ in _layers(backbone))
    for key, weight in backbone.state_dict().items():
        if ".base_layer." in key or not key.startswith(inside):
            found.update(key.replace(".base_layer.", ".").encode())
            found.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of ``model`` as a plain model: the policy's adapters are added into its weights, others are
    dropped.
    """
    plain = copy.deepcopy(model)
    for name, layer in _layers(plain):
        layer.merge(adapter_names=[POLICY])
        plain.set_submodule(name, layer.get_base_layer())
    del plain.peft_config
    return plain


def merge_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Return each layer with adapters, one after another: its name, and a copy as a plain layer that ``merge_adapters``
    would make.
    """
    for name, layer in _layers(model):
        layer = copy.deepcopy(layer)
        layer.merge(adapter_names=[POLICY])
        yield name, layer.get_base_layer()


def _inject(model: PreTrainedModel, config: "LoraConfig", name: str) -> None:
    """Wrap the layers that ``config`` names in peft's layers, and add a trainable set ``name``.

    The layers go on computing with the policy's set.
    """
    from peft import inject_adapter_in_model

    if name in list_adapters(model):
        raise ValueError(f"the model already has adapters named '{name}'; choose another name")
    before = [
        (weight, weight.requires_grad)
        for other in list_adapters(model)
        for weight in find_adapter_parameters(model, other).values()
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several sets are intended
        inject_adapter_in_model(config, model, name)
    for _, layer in _layers(model):
        layer._active_adapter = [POLICY]
    for weight, learns in [*before, *((weight, True) for weight in find_adapter_parameters(model, name).values())]:
        weight.requires_grad_(learns)


@contextmanager
def _activating(layers: list[Any], names: list[list[str]]) -> Iterator[None]:
    """Let each of peft's layers compute with the sets that are named for it inside the ``with`` block."""
    before = [layer._active_adapter for layer in layers]
    try:
        for layer, active in zip(layers, names, strict=True):
            layer._active_adapter = active  # peft's set_adapter would also decide what learns
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return peft's layers with their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _saved(key: str, name: str) -> str:
    """Return the name of a weight of the set ``name`` in peft's file, which leaves out the set's name."""
    layer, _, kind = key.rpartition(f".{name}")
    return f"{PREFIX}{layer}{kind}"


def _leave_out(keys: tuple[str, ...], module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for key in keys:
        state.pop(prefix + key, None)


def _not_missed(keys: tuple[str, ...], module: nn.Module, found: Any) -> None:
    found.missing_keys[:] = [key for key in found.missing_keys if not key.endswith(keys)]
