"""Low-rank adapters (LoRA, arXiv 2106.09685), from the peft library: a model's linear layers plus a trained product of two thin matrices."""

import copy
from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Lora:
    """W + (alpha / r) B A beside every named linear layer; B starts at zero, so that training starts at the model itself.

    Raises:
        ValueError: values out of range.
    """

    r: int = 16  # >= 1, rank of the update
    alpha: float = 32.0  # > 0, its scale is alpha / r
    dropout: float = 0.05  # [0, 1), on the adapter's input; off in reinforcement learning and preference losses
    target_modules: tuple[str, ...] = ()  # ends of layer names, such as q_proj; none = all linear layers but the output head

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"lora: r must be >= 1, alpha > 0 and dropout in [0, 1), got {self.r}, {self.alpha} and {self.dropout}")


def add_adapters(model: PreTrainedModel, lora: Lora) -> None:
    """Put adapters into ``model``, in place; they alone keep ``requires_grad``. ImportError without peft, ValueError for unknown layers."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("lora needs the package peft: pip install 'lightning-align[lora]'") from error
    targets = list(lora.target_modules) or "all-linear"
    inject_adapter_in_model(LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets), model)  # type: ignore[arg-type]


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` with the adapters added into its weights: a plain model again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()  # type: ignore[operator]
            plain.set_submodule(name, layer.get_base_layer())
    return plain
