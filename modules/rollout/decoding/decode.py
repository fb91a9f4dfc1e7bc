"""One decode step of a Llama-family model over caches of fixed sizes.

It reads the model's own parameters, or a copy of them that a CPU multiplies faster by (``products``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from modules.rollout.decoding.decode_products import DecodeProducts

FAMILY = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}
STATIC_ROPE = ("default", "llama3")  # rotary frequencies that do not depend on the length
ROW_STEP = 16  # static and compiled batches shrink in steps of this many rows


def supports(model: PreTrainedModel) -> bool:
    """Return whether ``DecodeStep`` can run the model.

    It needs a known architecture with full attention in every layer, rotary positions that do not change with the
    length, and logits that are not scaled or capped.
    """
    config = model.config.to_dict()
    return (
        isinstance(model, FAMILY.get(config["model_type"], ()))
        and config.get("sliding_window") is None
        and set(config.get("layer_types") or ["full_attention"]) == {"full_attention"}
        and config["rope_parameters"]["rope_type"] in STATIC_ROPE
    )


@dataclass
class SlotCache:
    """Keys and values of S slots, in each layer [S, kv heads, columns, head dim].

    Column c of a slot holds its position c.
    """

    keys: list[Tensor]
    values: list[Tensor]

    @staticmethod
    def allocate(model: PreTrainedModel, slots: int, columns: int) -> "SlotCache":
        """Make a cache of zeros, since a NaN in uninitialised memory would spoil attention even in a masked column."""
        attention = model.model.layers[0].self_attn
        shape = (slots, model.config.num_key_value_heads, columns, attention.head_dim)
        keys, values = (
            [torch.zeros(shape, dtype=layer_dtype(model), device=model.device) for _ in model.model.layers]
            for _ in ("keys", "values")
        )
        return SlotCache(keys, values)

    @property
    def slots(self) -> int:
        return self.keys[0].shape[0]

    @property
    def columns(self) -> int:
        return self.keys[0].shape[2]

    @property
    def num_bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in self.keys + self.values)

    def put(self, slots: Tensor, source: "SlotCache", rows: Tensor) -> None:
        """Copy ``rows`` [K] of another cache into the first columns of ``slots`` [K]."""
        columns = min(source.columns, self.columns)
        for mine, theirs in zip(self.keys + self.values, source.keys + source.values, strict=True):
            mine[slots, :, :columns] = theirs[rows, :, :columns].to(mine.dtype)

    def resize(self, slots: int, columns: int) -> None:
        """Keep the first ``slots`` slots and make room for ``columns``, layer by layer, to need little memory beside."""
        for layers in (self.keys, self.values):
            for number, old in enumerate(layers):
                new = old.new_zeros(slots, old.shape[1], columns, old.shape[3])
                new[:, :, : old.shape[2]] = old[:slots, :, :columns]
                layers[number] = new


class CachedRows(NamedTuple):
    """Consecutive rows of a batch that share a cache."""

    cache: SlotCache  # the rows lie in its first slots
    rows: int  # how many they are
    horizon: int  # a number above their positions; the step does not read columns from here on


class DecodeStep:
    """Computes next-token logits of N rows, each at its own position.

    With linear layers in 16 bits, what lies between them (residual stream, norms, rotation, head) stays in 32.

    Args:
        model: a model that ``supports`` accepts.
        columns: number of positions in the table of rotary positions.
        products: of the model; None = those of its modules.
        compiled: whether ``torch.compile`` makes the step; each combination of rows and horizons is compiled once.
    """

    def __init__(
        self, model: PreTrainedModel, columns: int, products: DecodeProducts | None = None, compiled: bool = False
    ) -> None:
        self.model, self.products = model, products or DecodeProducts(model, packed=False)
        positions = torch.arange(columns, device=model.device)[None]
        cos, sin = model.model.rotary_emb(model.lm_head.weight, positions)
        half = cos.shape[-1] // 2
        self._cos, self._sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)  # [columns, head dim]
        self._compute = compile_logits(model.device.type) if compiled else compute_logits

    def __call__(self, tokens: Tensor, positions: Tensor, parts: Sequence[CachedRows]) -> Tensor:
        """Append one token to each slot and return the logits that follow it.

        Args:
            tokens: int [N].
            positions: int [N], the column that each token goes to. The token attends to the columns up to its own.
            parts: the caches of the first rows, in order, which the step writes to. Logits of rows beyond are garbage.

        Returns:
            logits [N, V].
        """
        return self._compute(self.model, self.products, self._cos, self._sin, tokens, positions, parts)


def compute_logits(
    model: PreTrainedModel,
    products: DecodeProducts,
    cos: Tensor,
    sin: Tensor,
    tokens: Tensor,
    positions: Tensor,
    parts: Sequence[CachedRows],
) -> Tensor:
    """Do the work of ``DecodeStep`` with rotary tables [columns, head dim]."""
    device, dtype = tokens.device, layer_dtype(model)
    x = model.model.embed_tokens(tokens).to(cos.dtype)
    rope = cos[positions][:, None], sin[positions][:, None]  # [N, 1, D]
    busy = sum(part.rows for part in parts)
    places = positions[:busy].split([part.rows for part in parts])
    slots = [torch.arange(part.rows, device=device) for part in parts]
    masks = []
    for part, place in zip(parts, places, strict=True):
        hidden = torch.arange(part.horizon, device=device) > place[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, -torch.inf)
        masks.append(mask[:, None, None])
    for number, (layer, product) in enumerate(zip(model.model.layers, products.layers, strict=True)):
        heads = product.make_heads(layer.input_layernorm(x).to(dtype))
        q, k, v = split_heads(layer.self_attn, heads, model.config.num_key_value_heads)
        q, k = rotate(q, *rope).to(dtype), rotate(k, *rope).to(dtype)
        attended, start = [], 0
        for (held, rows, horizon), slot, place, mask in zip(parts, slots, places, masks, strict=True):
            keys, values, own = held.keys[number], held.values[number], slice(start, start + rows)
            keys[slot, :, place] = k[own]
            values[slot, :, place] = v[own]
            attended.append(attend(q[own], keys[:rows, :, :horizon], values[:rows, :, :horizon], mask))
            start += rows
        if start < len(tokens):
            attended.append(attended[0].new_zeros(len(tokens) - start, attended[0].shape[1]))
        together = torch.cat(attended) if len(attended) > 1 else attended[0]
        x = x + product.join_heads(together)
        gate, up = product.widen(layer.post_attention_layernorm(x).to(dtype))
        x = x + product.narrow(layer.mlp.act_fn(gate) * up)
    return products.head(model.model.norm(x))


@cache
def compile_logits(device_type: str) -> Callable[..., Tensor]:
    """Return the compiled step: shapes are fixed, so that CUDA can keep it as a graph."""
    return torch.compile(compute_logits, dynamic=False, mode="reduce-overhead" if device_type == "cuda" else None)


def layer_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the precision of the linear layers and of the keys and values."""
    dtype: torch.dtype = next(model.model.layers[0].mlp.down_proj.parameters()).dtype
    return dtype


def split_heads(
    attention: LlamaAttention | Qwen3Attention, heads: Tensor, num_key_value_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split queries, keys and values [N, (heads + 2 kv heads) * D] into [N, heads, D] each. Qwen3 also normalises queries
    and keys per head.
    """
    heads = heads.unflatten(1, (-1, attention.head_dim))
    q, k, v = heads.tensor_split((-2 * num_key_value_heads, -num_key_value_heads), 1)
    if isinstance(attention, Qwen3Attention):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q, k, v


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Apply rotary positions to x [N, heads, D]: x cos + (-second half, first half) sin.

    Args:
        x: queries or keys.
        cos: [N, 1, D].
        signed_sin: [N, 1, D], the sine with the sign of the first half turned.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Compute attention for one query position per row.

    The query heads that share a key head take the place of query positions, so keys and values are not repeated.

    Args:
        q: [N, heads, D].
        keys: [N, kv heads, T, D].
        values: [N, kv heads, T, D].
        mask: [N, 1, 1, T], added to the attention scores: 0 or -inf.

    Returns:
        [N, heads * D].
    """
    grouped = q.unflatten(1, (keys.shape[1], -1))  # [N, kv heads, group, D]
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).flatten(1)
