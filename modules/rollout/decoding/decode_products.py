"""The matrix products of a decode step: modules as they are, or copies of their weights in the layout of the CPU's library.

oneDNN multiplies a few rows much faster by weights that it has laid out itself ("packed"). The layers that read the same
input are packed as one.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from modules.networks.lora import list_adapters, merge_layers

MOST_PACKED = 4e9  # bytes of packed weights; larger models are too slow on a CPU to be worth the memory


class LayerProducts(Protocol):
    """The products of one decoder layer, for activations [N, features]."""

    def make_heads(self, x: Tensor) -> Tensor:
        """Return queries, keys and values side by side, [N, (heads + 2 kv heads) * D]."""

    def join_heads(self, x: Tensor) -> Tensor:
        """Return what the attention adds to the residual stream."""

    def widen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return gate and up projection of the MLP."""

    def narrow(self, x: Tensor) -> Tensor:
        """Return what the MLP adds to the residual stream."""


class PlainProducts:
    """Calls the modules of a layer as they are, adapters included."""

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        self.attention, self.mlp = layer.self_attn, layer.mlp

    def make_heads(self, x: Tensor) -> Tensor:
        return torch.cat([self.attention.q_proj(x), self.attention.k_proj(x), self.attention.v_proj(x)], -1)

    def join_heads(self, x: Tensor) -> Tensor:
        joined: Tensor = self.attention.o_proj(x)
        return joined

    def widen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mlp.gate_proj(x), self.mlp.up_proj(x)

    def narrow(self, x: Tensor) -> Tensor:
        narrowed: Tensor = self.mlp.down_proj(x)
        return narrowed


class PackedLinear:
    """Several linear layers that read the same input as one, from a packed copy of their weights."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weights = [layer.weight.detach() for layer in layers]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0].contiguous()
        biases = [layer.bias.detach() if layer.bias is not None else None for layer in layers]
        self.bias = None
        if any(bias is not None for bias in biases):
            rows = zip(layers, biases, strict=True)
            self.bias = torch.cat([weight.new_zeros(len(la.weight)) if bias is None else bias for la, bias in rows])
        self.num_bytes = weight.numel() * weight.element_size()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the products [N, features of all layers] with x [N, features]."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product


class PackedProducts:
    """The products of a layer from packed weights."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        queries, keys, values, out, gate, up, down = linears
        self.make_heads = PackedLinear([queries, keys, values])
        self.join_heads, self.narrow = PackedLinear([out]), PackedLinear([down])
        self._wide = PackedLinear([gate, up])
        self.num_bytes = sum(each.num_bytes for each in (self.make_heads, self.join_heads, self.narrow, self._wide))

    def widen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self._wide(x).chunk(2, -1)
        return gate, up


class DecodeProducts:
    """All matrix products of a model that ``decode.supports`` accepts.

    On a CPU they come from a packed copy of the weights as they are now, adapters merged, if oneDNN is there and the copy
    takes at most 4 GB; else the modules compute them.

    Args:
        model: with the weights.
        packed: whether the weights may be packed.

    Attributes:
        packed: whether the weights are packed.
        num_bytes: of the packed copy; 0 without one.
        layers: of each decoder layer.
        head: activations [N, features] -> logits [N, V].
    """

    def __init__(self, model: PreTrainedModel, packed: bool = True) -> None:
        self.packed = packed and can_pack(model)
        self._versions = count_changes(model)
        self.layers: list[LayerProducts]
        self.head: Callable[[Tensor], Tensor]
        self.num_bytes = 0
        if self.packed:
            layers, head = [PackedProducts(linears) for linears in find_linears(model)], PackedLinear([model.lm_head])
            self.layers, self.head = [*layers], head
            self.num_bytes = head.num_bytes + sum(each.num_bytes for each in layers)
        else:
            self.layers, self.head = [PlainProducts(layer) for layer in model.model.layers], model.lm_head

    def are_of(self, model: PreTrainedModel) -> bool:
        """Return whether the model's weights are unchanged since they were packed, as far as PyTorch notes changes."""
        return not self.packed or self._versions == count_changes(model)


def count_changes(model: PreTrainedModel) -> list[int]:
    """Return how often each weight of a model was changed in place."""
    return [weight._version for weight in model.parameters()]


def can_pack(model: PreTrainedModel) -> bool:
    """Return whether the weights of a model can be packed here."""
    linears = [model.lm_head, *(part for layer in model.model.layers for part in linear_layers(layer))]
    weights = [part.weight for part in linears]
    halves = any(weight.dtype == torch.bfloat16 for weight in weights)
    return (
        all(weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) for weight in weights)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (not halves or torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and sum(weight.numel() * weight.element_size() for weight in weights) <= MOST_PACKED
        and all(type(part) is nn.Linear or hasattr(part, "get_base_layer") for part in linears[1:])
        and type(model.lm_head) is nn.Linear
    )


def find_linears(model: PreTrainedModel) -> Iterator[list[nn.Linear]]:
    """Return the seven linear layers of each decoder layer, with adapters merged into copies."""
    adapted = merge_layers(model) if list_adapters(model) else iter(())
    for layer in model.model.layers:
        yield [next(adapted)[1] if hasattr(part, "get_base_layer") else part for part in linear_layers(layer)]  # type: ignore[misc]


def linear_layers(layer: LlamaDecoderLayer) -> list[nn.Module]:
    """Return the seven linear layers of a decoder layer, in the order of its modules."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]
