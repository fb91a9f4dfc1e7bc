"""A causal language model with its tokenizer: loading, log-probabilities in chunks, and export.

This is the only file that shifts tokens. Everywhere else a per-token tensor is aligned to its own token.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from modules.functional.logprobs import chosen_logprobs, entropies, token_logprobs, vocabulary_logprobs
from modules.networks.digests import hash_base
from modules.networks.loading import (
    check_packing,
    check_supported,
    find_stop_tokens,
    flattens,
    load,
    read_max_positions,
    remove_dropout,
)
from modules.networks.lora import Lora, add_adapters, find_recomputation, merge_adapters
from modules.trainer.modes import evaluating
from modules.trainer.pieces import Batch, compute_in_pieces, plan_pieces
from modules.types import ALPACA_PROMPT, PolicyBatch, PreferenceBatch, find_attended

# Padded tokens of a forward pass without gradients.
CPU_TOKENS, DEVICE_TOKENS = 1024, 16384
# What such a pass reads of a batch of completions, and of one of rows.
READ = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "prompt_index", "attended")
ROWS_READ = ("input_ids", "attention_mask", "wanted", "position_ids")
MAX_LOGITS = 2**24  # entries of one chunk of logits: 64 MB in fp32
# Architectures for which a test compares shared prompts with separate rows.
SHARING = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
PROBE = ((3, 1, 4, 1, 5), (9, 2, 6))  # two rows of different length


class TokenScores(NamedTuple):
    """What the model's next-token distributions say about given tokens, one entry per token.

    An entry is zero at positions that were not asked for, and a field is None if it was not asked for.
    """

    logprobs: Tensor  # log-probabilities of the tokens, nats, with gradient
    entropies: Tensor | None = None  # nats, of the whole distribution; without gradient unless one was asked for
    hits: Tensor | None = None  # 1 where the token is the most likely one, else 0
    mean_logits: Tensor | None = None  # mean of the logits over the vocabulary, without gradient
    means: Tensor | None = None  # mean of the log-probs over the vocabulary, nats, with gradient


class Policy(nn.Module):
    """A causal language model and its tokenizer.

    Args:
        path: ``tiny``, ``tiny-addition``, ``tiny-calculator`` or ``tiny-chains`` (built in), a Hugging Face folder, a
            ``.gguf`` file, or a hub id.
        dropout: False sets every dropout rate of the model to zero, as reinforcement learning and preference losses
            need.
        lora: low-rank adapters to train instead of the model's own weights; None trains all weights.
        role: name of the option that asks for the model, for error messages.

    Attributes:
        model: the Hugging Face model, fp32.
        tokenizer: its tokenizer. A missing pad token is set to the eos token; masks never look at it.
        stop_token_ids: the eos tokens and the end-of-turn token of the chat template.
        max_positions: how many tokens the model has positions for; None = no limit.
        base_id: what tells the weights under the adapters from others; None without adapters.

    Raises:
        ValueError: ``path`` is none of these, the tokenizer is larger than the model's vocabulary, or the architecture
            makes its logits in a way that the chunked log-probabilities do not support.
    """

    def __init__(self, path: str, dropout: bool = True, lora: Lora | None = None, role: str = "policy") -> None:
        super().__init__()
        self._watch: Callable[[Tensor], None] | None = None  # see ``watching``
        self.path, self.name = path, f"{role}: '{path}'"  # name: how messages begin
        self.model, self.tokenizer = load(path, role)
        self.has_adapters = lora is not None
        if lora is not None:
            add_adapters(self.model, lora)
        self.base_id = None if lora is None else hash_base(self.state_dict().items())
        self.model.train()  # from_pretrained leaves the model in eval mode, and fit does not change that
        if not dropout:
            remove_dropout(self.model)
        self.lacks_pad = self.tokenizer.pad_token is None
        if self.lacks_pad:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.stop_token_ids = find_stop_tokens(self.model, self.tokenizer)
        self.max_positions = read_max_positions(self.model.config)
        check_supported(self.name, self.model, self.tokenizer)
        self.packing_checked = False  # True after the first packed rows
        self.recomputes = False  # see ``recompute_layers``
        self.check_scores()

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt may be computed once for all its completions.

        That is so for a tested architecture whose layers all cache plain keys and values. Sliding windows and position
        biases count columns, and the padding between prompt and completion would shift them. Layers that are computed
        again would write into the cache twice.
        """
        if self.recomputes:
            return False
        layers = DynamicCache(config=self.model.config).layers
        return self.model.config.model_type in SHARING and all(type(layer) is DynamicLayer for layer in layers)

    def recompute_layers(self) -> None:
        """Keep only the input of each layer for the backward pass, which computes the rest of it again (1604.06174).

        Raises:
            ValueError: the layers of this architecture cannot be computed one by one.
        """
        for layer in self.find_layers("gradient_checkpointing"):
            contexts: dict[str, Any] = {"context_fn": find_recomputation(layer)} if self.has_adapters else {}
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, **contexts)
        self.recomputes = True

    def compile_layers(self) -> None:
        """Compile each layer with ``torch.compile``, for any batch and length; names of weights stay as they are.

        Raises:
            ValueError: this architecture has no layers that can be compiled one by one.
        """
        layers = self.find_layers("torch_compile")
        # A forward pass with a cache is compiled for each layer, and all layers share one code.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 8 * len(layers))
        for layer in layers:
            layer.compile(dynamic=True)

    def find_layers(self, option: str) -> list[Any]:
        """Return the layers of the model. Raises ValueError with the name of the option that asks, if there are none."""
        layers = [part for part in self.model.modules() if isinstance(part, GradientCheckpointingLayer)]
        if not layers:
            raise ValueError(
                f"{option}: {self.name} ({self.model.config.model_type}) has no layers that can be told apart; leave it "
                "out"
            )
        return layers

    @torch.no_grad()
    def check_scores(self) -> None:
        """Compare our log-probabilities of two short rows with those of the model's own forward.

        Raises:
            ValueError: they differ by more than 1e-3 nats.
        """
        with evaluating(self.model):
            for tokens in PROBE:
                ids = torch.tensor([tokens]) % self.model.config.vocab_size
                padded = nn.functional.pad(ids, (0, 2))
                mask = torch.arange(padded.shape[1])[None] < len(tokens)
                mine = self.token_scores(padded, mask).logprobs[:, 1 : len(tokens)]
                gap = float((mine - token_logprobs(self.model(ids).logits[:, :-1], ids[:, 1:])).abs().max())
                if not gap <= 1e-3:
                    raise ValueError(
                        f"{self.name} ({self.model.config.model_type}) makes its logits in a way that is not "
                        f"supported: log-probabilities from its hidden states are off by {gap:.3g} nats; use another "
                        "model"
                    )

    def token_scores(
        self,
        input_ids: Tensor,
        mask: Tensor,
        position_ids: Tensor | None = None,
        details: bool = False,
        means: bool = False,
    ) -> TokenScores:
        """Return the log-probability of each wanted token, given the tokens before it.

        Args:
            input_ids: int [N, T], padded on the right. A causal model never looks there, so it needs no attention mask.
            mask: bool [N, T], True = wanted. Logits are computed at these positions only. Column 0 has no token before
                it, so its score is 0.
            position_ids: int [N, T] for rows that hold several documents; each document starts at 0.
            details: also return entropies, hits and mean logits.
            means: also return the mean log-probs over the vocabulary.

        Returns:
            scores [N, T], aligned to their own token.

        Raises:
            ValueError: packed rows are given to a model that mixes their documents.
        """

        def compute(rows: Batch) -> TokenScores:
            ids, mask, places = rows["input_ids"], rows["wanted"], rows.get("position_ids")
            wanted = mask[:, 1:] if places is None else mask[:, 1:] & (places[:, 1:] > 0)
            hidden = self.hidden_states(ids, places)[:, :-1]
            scores = self.score(hidden[wanted], ids[:, 1:][wanted], details=details, means=means)
            return spread_scores(scores, nn.functional.pad(wanted, (1, 0)))

        batch: Batch = {"input_ids": input_ids, "wanted": mask}
        if position_ids is not None:
            batch["position_ids"] = position_ids
        if torch.is_grad_enabled():
            return compute(batch)
        batch["attention_mask"] = mask.flip(1).cumsum(1).flip(1) > 0  # nothing reads behind the last wanted token
        return TokenScores(*self._in_pieces(compute, batch))

    def completion_scores(
        self, batch: PolicyBatch | PreferenceBatch, temperature: float = 1.0, details: bool = False
    ) -> TokenScores:
        """Return the log-probability of each completion token, with each prompt computed once where the architecture
        allows it.

        Args:
            batch: ``prompt_ids``, ``prompt_mask`` [P, Tp], ``completion_ids``, ``completion_mask`` [N, Tc],
                ``prompt_index`` [N].
            temperature: > 0; logits are divided by it, so that the scores describe the distribution that was sampled.
            details: also return entropies, hits and mean logits.

        Returns:
            scores [N, Tc], aligned to their own token.
        """

        def compute(part: Any) -> TokenScores:
            return self.scores_of(self.token_states(part), part, temperature, details)

        if torch.is_grad_enabled() or self._watch is not None:  # which sees the tokens in their order
            return compute(batch)
        return TokenScores(*self._in_pieces(compute, batch))

    def token_states(self, batch: PolicyBatch | PreferenceBatch) -> Tensor:
        """Return the hidden states [N, Tc, H] in which the completion tokens are chosen.

        The state of a token has read the prompt and all earlier tokens, but not the token itself.
        """
        return (
            self._hidden_shared(batch, batch["completion_ids"][:, :-1])
            if self._shares(batch)
            else self._hidden_rows(batch)[:, :-1]
        )

    def scores_of(
        self,
        states: Tensor,
        batch: PolicyBatch | PreferenceBatch,
        temperature: float = 1.0,
        details: bool = False,
        entropy: bool = False,
    ) -> TokenScores:
        """Return ``completion_scores`` from the ``token_states`` [N, Tc, H] of the batch.

        Args:
            states: the hidden states.
            batch: prompts and completions.
            temperature: see ``completion_scores``.
            details: see ``completion_scores``.
            entropy: also return entropies, with gradient.
        """
        mask = batch["completion_mask"]
        return spread_scores(
            self.score(states[mask], batch["completion_ids"][mask], temperature, details, entropy=entropy), mask
        )

    def plan_forwards(self, batch: PolicyBatch | PreferenceBatch) -> list[list[int]]:
        """Tell which completions of a batch a forward pass without gradients takes at a time, see ``cut_by_length``."""
        return plan_pieces(cast(Batch, batch), self._forward_tokens, self.shares_prompts)

    @property
    def _forward_tokens(self) -> int:
        """Padded tokens of a forward pass without gradients."""
        return CPU_TOKENS if self.model.device.type == "cpu" else DEVICE_TOKENS

    def completion_states(self, batch: PolicyBatch | PreferenceBatch) -> Tensor:
        """Return the hidden state [N, H] at the last kept token of each completion, which a scalar head reads."""

        def compute(part: Any) -> list[Tensor]:
            hidden = (
                self._hidden_shared(part, part["completion_ids"]) if self._shares(part) else self._hidden_rows(part)
            )
            return [hidden[torch.arange(len(hidden), device=hidden.device), find_attended(part).sum(1)]]

        (states,) = compute(batch) if torch.is_grad_enabled() else self._in_pieces(compute, batch, of_tokens=False)
        assert states is not None
        return states

    def check_packing(self) -> None:
        """Check, at the first packed rows, that the model keeps their documents apart.

        Raises:
            ValueError: the documents of a packed row see each other.
        """
        if not self.packing_checked:
            self.packing_checked = True
            check_packing(
                self.name,
                self.model,
                lambda ids, places: self.token_scores(ids, torch.ones_like(ids, dtype=torch.bool), places).logprobs,
            )

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Return the last hidden states [N, T, H] of right-padded rows; ``hidden[:, t]`` predicts token ``t + 1``.

        Without a cache and an attention mask, transformers reads from ``position_ids`` where a document starts, and
        keeps documents apart.

        Raises:
            ValueError: packed rows are given to a model that mixes their documents all the same.
        """
        if position_ids is not None:
            self.check_packing()
        shape = input_ids.shape
        if position_ids is not None and flattens(self.model):
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        return self.model.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state.view(*shape, -1)

    def score(
        self,
        hidden: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        details: bool = False,
        means: bool = False,
        entropy: bool = False,
    ) -> TokenScores:
        """Return the scores [K] of ``targets`` [K] from ``hidden`` [K, H], one chunk of logits at a time.

        With gradients, the logits of a chunk are dropped and computed again in the backward pass. A single chunk is
        kept.
        """
        size = max(1, MAX_LOGITS // self.model.config.vocab_size)
        pairs = list(zip(hidden.split(size), targets.split(size), strict=True))
        if torch.is_grad_enabled() and len(pairs) > 1:
            chunks = [
                checkpoint(self._score_chunk, h, y, temperature, details, means, entropy, use_reentrant=False)
                for h, y in pairs
            ]
        else:
            chunks = [self._score_chunk(h, y, temperature, details, means, entropy) for h, y in pairs]
        logprobs, *others = (None if column[0] is None else torch.cat(column) for column in zip(*chunks, strict=True))
        assert logprobs is not None
        return TokenScores(logprobs, *others)

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens of a conversation, ready for the assistant to answer.

        A tokenizer without a chat template takes one user message, which is put into Alpaca's prompt.

        Args:
            messages: each with ``role`` and ``content``.

        Raises:
            ValueError: there is no chat template, and the messages are not a single user message.
        """
        if self.tokenizer.chat_template is not None:
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if [message["role"] for message in messages] != ["user"]:
            raise ValueError(
                f"{self.name} has no chat template (a base model?), so it takes a single user message; name "
                "a chat model"
            )
        ids = list(self.tokenizer(ALPACA_PROMPT.format(instruction=messages[0]["content"]), verbose=False).input_ids)
        # Some tokenizers put an eos token behind every text.
        return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids

    @contextmanager
    def watching(self, watch: Callable[[Tensor], None]) -> Iterator[None]:
        """Show ``watch`` the log-probabilities [K, V] of every token that is scored inside the ``with`` block, chunk by
        chunk in the order of the tokens.
        """
        self._watch = watch
        try:
            yield
        finally:
            self._watch = None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer as a Hugging Face folder, with adapters merged into the weights.

        The generation config holds ``stop_token_ids`` and nothing that changes what is likely, so that ``generate`` of
        transformers says what our samples say. A pad token that the tokenizer lacked is not written.
        """
        model = merge_adapters(self.model) if self.has_adapters else self.model
        given = model.generation_config
        if given is not None:
            stops = sorted(self.stop_token_ids)
            kept = {name: getattr(given, name) for name in ("bos_token_id", "pad_token_id")}
            model.generation_config = GenerationConfig(
                **kept, eos_token_id=stops[0] if len(stops) == 1 else stops or None
            )
            own = {*kept, "eos_token_id", "transformers_version", "use_cache"}
            named = given.to_diff_dict().items()
            unused = {name for name, value in named if value not in (None, False) and name[0] != "_"} - own
            if unused:
                rank_zero_info(
                    f"export: {self.name} generates by {', '.join(sorted(unused))}; training did not, and the "
                    "export does not"
                )
        model.save_pretrained(folder)
        tokenizer = copy.deepcopy(self.tokenizer) if self.lacks_pad else self.tokenizer
        if self.lacks_pad:
            tokenizer.pad_token = None
        tokenizer.save_pretrained(folder)

    def _score_chunk(
        self, hidden: Tensor, targets: Tensor, temperature: float, details: bool, means: bool, entropy: bool
    ) -> TokenScores:
        """Return the scores of a chunk, all from one softmax over the vocabulary."""
        head = self.model.get_output_embeddings()
        with torch.autocast(hidden.device.type, enabled=False):  # rounding of 16 bits here would be the largest error
            logits = head(hidden.to(self.model.dtype))  # [K, V]
        logprobs, whole = chosen_logprobs(logits, targets, temperature)  # [K], [K, V]
        if self._watch is not None:
            self._watch(whole)
        scores = TokenScores(logprobs)
        if means:
            scaled = logits / temperature
            scores = scores._replace(means=scaled.mean(-1) - scaled.logsumexp(-1))
        if details:
            seen = logits.detach().float()
            scores = scores._replace(hits=(seen.argmax(-1) == targets).float(), mean_logits=seen.mean(-1))
        if details or entropy:
            whole = vocabulary_logprobs(logits, temperature) if entropy else whole  # a gradient of its own
            scores = scores._replace(entropies=entropies(whole))
        return scores

    def _in_pieces(
        self, compute: Callable[[Batch], Iterable[Tensor | None]], batch: Any, of_tokens: bool = True
    ) -> Any:
        """Compute tensors of the rows of a batch without gradients and, as far as it pays, without their padding."""
        read = {name: batch[name] for name in (*READ, *ROWS_READ) if name in batch}
        return compute_in_pieces(compute, read, self._forward_tokens, self.shares_prompts, of_tokens)

    def _shares(self, batch: PolicyBatch | PreferenceBatch) -> bool:
        return self.shares_prompts and len(batch["prompt_index"]) > len(batch["prompt_ids"])

    def _hidden_rows(self, batch: PolicyBatch | PreferenceBatch) -> Tensor:
        """Return the hidden states [N, Tc + 1, H] after the prompt and after each completion token, from one row per
        completion.

        The completion is moved next to its prompt, so that padding is on the right only.
        """
        lengths = batch["prompt_mask"].sum(1)[batch["prompt_index"]]  # [N]
        columns = torch.arange(batch["completion_ids"].shape[1] + 1, device=lengths.device)
        at = lengths[:, None] + columns  # [N, Tc + 1], the column of each completion token, and the next one
        prompts = batch["prompt_ids"][batch["prompt_index"]]
        rows = nn.functional.pad(prompts, (0, len(columns) - 1)).scatter(1, at[:, :-1], batch["completion_ids"])
        # The longest prompt need not have the longest completion.
        width = int((lengths + find_attended(batch).sum(1)).max())
        hidden = self.hidden_states(rows[:, :width])
        return hidden.gather(1, (at - 1).clamp(max=width - 1)[..., None].expand(-1, -1, hidden.shape[-1]))

    def _hidden_shared(self, batch: PolicyBatch | PreferenceBatch, tokens: Tensor) -> Tensor:
        """Return the hidden states [N, T + 1, H] after the prompt and after each of ``tokens`` [N, T].

        ``tokens`` are the first T of each completion. Each prompt runs once with a cache, which is repeated for its
        completions; gradients flow through the cache.
        """
        index, prompt_mask = batch["prompt_index"], batch["prompt_mask"]
        lengths = prompt_mask.sum(1)  # [P]
        cache = DynamicCache(config=self.model.config)
        prompts = self.model.base_model(
            input_ids=batch["prompt_ids"], past_key_values=cache, use_cache=True
        ).last_hidden_state
        last = prompts[torch.arange(len(prompts), device=index.device), lengths - 1][index][:, None]  # [N, 1, H]
        if tokens.shape[1] == 0:
            return last
        for layer in cast(list[Any], cache.layers):
            layer.keys, layer.values = layer.keys.index_select(0, index), layer.values.index_select(0, index)
        ragged = not bool(prompt_mask.all())
        # The last position of a real token; padding must not go beyond the positions of the model.
        last_place = int((lengths[index] + find_attended(batch).sum(1)).max()) - 1
        hidden = self.model.base_model(
            input_ids=tokens,
            attention_mask=torch.cat([prompt_mask[index], torch.ones_like(tokens, dtype=torch.bool)], 1)
            if ragged
            else None,
            position_ids=(lengths[index][:, None] + torch.arange(tokens.shape[1], device=index.device)).clamp(
                max=last_place
            ),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return torch.cat([last, hidden], 1)


def spread_scores(scores: TokenScores, mask: Tensor) -> TokenScores:
    """Put the scores [K] of kept positions back into the shape of ``mask`` [N, T] (K True entries), zero elsewhere."""
    zeros = torch.zeros(mask.shape, device=mask.device)
    logprobs, *details = (None if part is None else zeros.masked_scatter(mask, part) for part in scores)
    assert logprobs is not None
    return TokenScores(logprobs, *details)


def load_companion(
    policy: Policy, path: str, role: str, lora: Lora | None = None, may_know_more: bool = False
) -> Policy:
    """Load the model at ``path``, without dropout, as a partner of the policy.

    Args:
        policy: the partner must read its tokens.
        path: see ``Policy``.
        role: name of the option that asks for the model, for error messages.
        lora: adapters to train on the model; None = none.
        may_know_more: accept a model with more tokens than the policy. Log-probs would then not compare, but values do.

    Raises:
        ValueError: the model cannot be loaded, or it reads other tokens than the policy.
    """
    other = Policy(path, dropout=False, lora=lora, role=role)
    mine, theirs = policy.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if (
        not may_know_more
        and len(theirs) > len(mine)
        or any(theirs.get(token) != number for token, number in mine.items())
    ):
        raise ValueError(
            f"{role}: the tokens of '{path}' are not those of '{policy.path}'; name a model with the same tokenizer"
        )
    return other
