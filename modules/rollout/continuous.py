"""The fast path of the Llama family: continuous batching over a cache of slots, with the live parameters of the model."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from modules.rollout.ledger import Ledger

FAMILY = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}
STATIC_ROPE = ("default", "llama3")  # frequencies that do not depend on the length
TRANSPOSED_ROWS = range(16, 256)  # batch sizes where W @ x beats x @ W.T on CPU
PREFILL_TOKENS = 2048  # padded prompt tokens of one forward
DRAW_ROWS = 256  # rows of logits turned into first tokens at a time
ROW_STEP = 16  # batches shrink in steps of this: on CPU 2 rows cost as much as 12


def supports(model: PreTrainedModel) -> bool:
    """Whether ``DecodeStep`` knows this architecture: full attention in every layer, static rotary positions, plain
    logits.
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
    """Keys and values of S slots: per layer [S, kv heads, columns, head dim]. Column c of a slot belongs to its
    position c.
    """

    keys: list[Tensor]
    values: list[Tensor]

    @staticmethod
    def allocate(model: PreTrainedModel, slots: int, columns: int) -> "SlotCache":
        """Zeros, not garbage: a NaN in a masked column would still spoil the attention sum."""
        attention = model.model.layers[0].self_attn
        shape = (slots, model.config.num_key_value_heads, columns, attention.head_dim)
        keys, values = (
            [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in model.model.layers]
            for _ in ("keys", "values")
        )
        return SlotCache(keys, values)

    def put(self, slots: Tensor, source: "SlotCache", rows: Tensor) -> None:
        """Copy ``rows`` [K] of another cache into the first columns of ``slots`` [K]."""
        columns = min(source.keys[0].shape[2], self.keys[0].shape[2])
        for mine, theirs in zip(self.keys + self.values, source.keys + source.values, strict=True):
            mine[slots, :, :columns] = theirs[rows, :, :columns]

    def shrink(self, slots: int) -> None:
        """Keep the first ``slots`` slots."""
        self.keys = [keys[:slots] for keys in self.keys]
        self.values = [values[:slots] for values in self.values]


class Rows:
    """Activations [N, features]: every module is called as it is."""

    @staticmethod
    def turn(x: Tensor) -> Tensor:
        """From and to [N, features]."""
        return x

    @staticmethod
    def norm(module: LlamaRMSNorm, x: Tensor) -> Tensor:
        return module(x)

    @staticmethod
    def linear(module: nn.Linear, x: Tensor) -> Tensor:
        return module(x)


class Columns:
    """Activations [features, N]: on CPU ``W @ x`` is faster for mid-sized batches. Needs plain linear layers."""

    @staticmethod
    def turn(x: Tensor) -> Tensor:
        """From and to [N, features]."""
        return x.t().contiguous()

    @staticmethod
    def norm(module: LlamaRMSNorm, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(0) + module.variance_epsilon) * module.weight[:, None]

    @staticmethod
    def linear(module: nn.Linear, x: Tensor) -> Tensor:
        return module.weight @ x if module.bias is None else torch.addmm(module.bias[:, None], module.weight, x)


class DecodeStep:
    """Next-token logits of N rows, each at its own position.

    Args:
        model: one that ``supports`` accepts.
        columns: positions to prepare the rotary table for.
    """

    def __init__(self, model: PreTrainedModel, columns: int) -> None:
        self.model = model
        positions = torch.arange(columns, device=model.device)[None]
        cos, sin = model.model.rotary_emb(model.get_input_embeddings().weight, positions)
        half = cos.shape[-1] // 2
        self._cos, self._sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)  # [columns, head dim]
        # Adapters replace linear layers by modules of their own, which only the row layout calls.
        linears = [model.lm_head, *(part for layer in model.model.layers for part in linear_layers(layer))]
        self._transposable = model.device.type == "cpu" and all(type(linear) is nn.Linear for linear in linears)

    def __call__(self, tokens: Tensor, positions: Tensor, cache: SlotCache, horizon: int) -> Tensor:
        """Append one token per slot and return the logits that follow it.

        Args:
            tokens: int [N], one per slot of the cache.
            positions: int [N], the column that each token goes to; columns up to it are attended.
            cache: N slots; written to.
            horizon: more than every position; columns from here on are not read.

        Returns:
            logits [N, V].
        """
        layout = Columns if self._transposable and len(tokens) in TRANSPOSED_ROWS else Rows
        slots = torch.arange(len(tokens), device=tokens.device)
        x = layout.turn(self.model.model.embed_tokens(tokens))
        rope = self._cos[positions][:, None], self._sin[positions][:, None]  # [N, 1, D]
        hidden = torch.arange(horizon, device=tokens.device) > positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.model.dtype, device=tokens.device).masked_fill(hidden, -torch.inf)[
            :, None, None
        ]
        for layer, keys, values in zip(self.model.model.layers, cache.keys, cache.values, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            states = layout.norm(layer.input_layernorm, x)
            q, k, v = (
                layout.turn(layout.linear(part, states))
                for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k, v = split_heads(attention, q, k, v)
            keys[slots, :, positions] = rotate(k, *rope)
            values[slots, :, positions] = v
            attended = attend(rotate(q, *rope), keys[:, :, :horizon], values[:, :, :horizon], mask)
            x = x + layout.linear(attention.o_proj, layout.turn(attended))
            states = layout.norm(layer.post_attention_layernorm, x)
            gated = mlp.act_fn(layout.linear(mlp.gate_proj, states)) * layout.linear(mlp.up_proj, states)
            x = x + layout.linear(mlp.down_proj, gated)
        return layout.turn(layout.linear(self.model.lm_head, layout.norm(self.model.model.norm, x)))


def linear_layers(layer: LlamaDecoderLayer) -> list[nn.Module]:
    """The seven matrices of a decoder layer."""
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


def split_heads(
    attention: LlamaAttention | Qwen3Attention, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, heads * D] each to [N, heads, D]; Qwen3 normalises queries and keys per head."""
    q, k, v = (x.unflatten(1, (-1, attention.head_dim)) for x in (q, k, v))
    if isinstance(attention, Qwen3Attention):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q, k, v


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary positions for x [N, heads, D], cos and sin [N, 1, D]: x cos + (-second half, first half) sin, the sign
    kept in sin.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of one query position: q [N, heads, D], keys and values [N, kv heads, T, D], mask [N, 1, 1, T] -> [N,
    heads * D].

    The query heads that share a key head take the place of query positions, so nothing is repeated.
    """
    grouped = q.unflatten(1, (keys.shape[1], -1))  # [N, kv heads, group, D]
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).flatten(1)


@dataclass(frozen=True)
class Waiting:
    """K requests whose prompt is computed and whose first token is drawn."""

    cache: SlotCache  # of the prompts of one forward
    rows: Tensor  # int [K], the prompt of each request in ``cache``
    requests: Tensor  # int [K]
    tokens: Tensor  # int [K], the first token
    positions: Tensor  # int [K], the column it goes to

    def split(self, size: int) -> tuple["Waiting", "Waiting"]:
        """The first ``size`` requests and the others."""
        fields = (self.rows, self.requests, self.tokens, self.positions)
        return Waiting(self.cache, *(field[:size] for field in fields)), Waiting(
            self.cache, *(field[size:] for field in fields)
        )


class ContinuousBatch:
    """Slots over one cache, filled from a queue of prompts until every request is finished.

    Args:
        model: one that ``supports`` accepts.
        prompts: token ids of each prompt, at least one prompt.
        num_generations: G; request r is generation r % G of prompt r // G.
        ledger: draws and records tokens.
        max_batch_tokens: bound on cache columns summed over slots (one slot is always made). Computed prompts that wait
            for a slot hold at most ``PREFILL_TOKENS`` columns more.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        num_generations: int,
        ledger: Ledger,
        max_batch_tokens: int,
    ) -> None:
        self.model, self.prompts, self.num_generations, self.ledger = model, prompts, num_generations, ledger
        self.queue = sorted(
            range(len(prompts)), key=lambda index: len(prompts[index])
        )  # taken from the end: long ones first
        # The last token is never fed back, so it needs no column.
        columns = len(prompts[self.queue[-1]]) + ledger.sampling.max_completion_length - 1
        slots = max(1, min(len(prompts) * num_generations, max_batch_tokens // columns))
        self.prefill_tokens = min(PREFILL_TOKENS, max_batch_tokens)
        self.cache = SlotCache.allocate(model, slots, columns)
        self.step = DecodeStep(model, columns)
        self.waiting: Waiting | None = None
        self.requests = torch.full((slots,), ledger.idle, device=model.device)
        self.tokens, self.positions = torch.zeros_like(self.requests), torch.zeros_like(self.requests)
        self.horizon = 0
        self.stats = {"decode_steps": 0, "slots": slots, "prefill_tokens": 0}

    def run(self) -> dict[str, int]:
        """Finish every request; returns the numbers of decode steps, of slots and of prompt tokens computed."""
        busy = self._refill()
        while busy:
            logits = self.step(self.tokens, self.positions, self.cache, self.horizon)
            self.tokens, finished = self.ledger.draw(logits, self.requests)
            self.positions += 1  # idle slots start again at 0 with every refill, so they stay behind the busy ones
            self.horizon += 1
            self.stats["decode_steps"] += 1
            if bool(finished.any()):
                self.requests[finished] = self.ledger.idle
                busy = self._refill()
        return self.stats

    def _refill(self) -> bool:
        """Give free slots to waiting requests, computing prompts as needed; returns whether any slot is busy."""
        free = (self.requests == self.ledger.idle).nonzero()[:, 0]
        while len(free) and (self.queue or self.waiting):
            admitted, rest = (self.waiting or self._prefill()).split(len(free))
            slots, free = free.split([len(admitted.rows), len(free) - len(admitted.rows)])
            self.cache.put(slots, admitted.cache, admitted.rows)
            self.requests[slots], self.tokens[slots], self.positions[slots] = (
                admitted.requests,
                admitted.tokens,
                admitted.positions,
            )
            self.waiting = rest if len(rest.rows) else None
        self.positions[free] = 0
        self.horizon = int(self.positions.max()) + 1
        busy = len(self.requests) - len(free)
        if busy and len(free):
            self._compact(free, busy)
        return busy > 0

    def _compact(self, free: Tensor, busy: int) -> None:
        """Move busy slots to the front and drop the empty ones behind them, in steps of 16 rows; a single row is worth
        a step.
        """
        size = 1 if busy == 1 else min(len(self.requests), -(-busy // ROW_STEP) * ROW_STEP)
        movers = (self.requests[size:] != self.ledger.idle).nonzero()[:, 0] + size
        holes = free[: len(movers)]  # ascending, and at least as many below ``size`` as there are movers
        self.cache.put(holes, self.cache, movers)
        for field in (self.requests, self.tokens, self.positions):
            field[holes] = field[movers]
        self.requests, self.tokens, self.positions = self.requests[:size], self.tokens[:size], self.positions[:size]
        self.cache.shrink(size)

    def _prefill(self) -> Waiting:
        """Compute the next prompts of the queue and draw the first token of their requests; keep those that go on."""
        chosen = [self.queue.pop()]
        limit = self.prefill_tokens // len(self.prompts[chosen[0]])
        while self.queue and len(chosen) < limit:
            chosen.append(self.queue.pop())
        device = self.model.device
        lengths = torch.tensor([len(self.prompts[index]) for index in chosen], device=device)
        self.stats["prefill_tokens"] += int(lengths.sum())
        logits, cache = compute_prompts(self.model, [self.prompts[index] for index in chosen], lengths)
        rows = torch.arange(len(chosen), device=device).repeat_interleave(self.num_generations)
        generations = torch.arange(self.num_generations, device=device).repeat(len(chosen))
        requests = torch.tensor(chosen, device=device)[rows] * self.num_generations + generations
        drawn = [
            self.ledger.draw(logits[r], q)
            for r, q in zip(rows.split(DRAW_ROWS), requests.split(DRAW_ROWS), strict=True)
        ]
        tokens, finished = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        going = ~finished
        return Waiting(cache, rows[going], requests[going], tokens[going], lengths[rows][going])


def compute_prompts(model: PreTrainedModel, prompts: list[list[int]], lengths: Tensor) -> tuple[Tensor, SlotCache]:
    """Logits [P, V] that follow each prompt, and the keys and values of P prompts, garbage behind their ``lengths``
    [P].
    """
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(model.device)
    # On the right a causal model never looks at padding, so no attention mask is needed.
    output = model.model(input_ids=ids, use_cache=True)
    last = output.last_hidden_state[torch.arange(len(prompts), device=ids.device), lengths - 1]
    layers = output.past_key_values.layers
    return model.lm_head(last), SlotCache([layer.keys for layer in layers], [layer.values for layer in layers])
