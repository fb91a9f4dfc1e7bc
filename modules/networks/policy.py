"""A causal language model with its tokenizer: loading, log-probabilities in chunks, prompts computed once per group,
export.

This is the only file that shifts anything: everyone else sees per-token tensors aligned to their own token.
"""

from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from modules.functional.logprobs import mean_logprobs, token_entropies, token_logprobs
from modules.modes import evaluating
from modules.networks.loading import check_supported, load, max_positions, remove_dropout, stop_token_ids
from modules.networks.lora import Lora, add_adapters, merged
from modules.networks.packed_rows import check_packing, flattens
from modules.types import ALPACA_PROMPT, PolicyBatch, PreferenceBatch

MAX_LOGITS = 2**24  # entries of one chunk of logits: 64 MB in fp32
SHARING = (
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)  # architectures whose shared prompts are tested against separate rows
PROBE = ((3, 1, 4, 1, 5), (9, 2, 6))  # two ragged rows


class TokenScores(NamedTuple):
    """Scores of given tokens by the next-token distributions: per token, zero where it was not asked."""

    logprobs: Tensor  # nats, with gradient
    entropies: Tensor | None = None  # nats, of the whole distribution, without gradient unless it was asked for
    hits: Tensor | None = None  # 1 where the token is the most likely one, else 0
    mean_logits: Tensor | None = None  # mean of the logits over the vocabulary, no gradient
    means: Tensor | None = None  # nats, mean of the log-probs over the vocabulary, with gradient


class Policy(nn.Module):
    """A causal LM from ``tiny``, a Hugging Face folder, a GGUF file or a hub id.

    Args:
        path: ``tiny`` (built in, no download), a folder with ``config.json``, a ``.gguf`` file, or a hub id.
        dropout: False sets every dropout rate of the model to zero (reinforcement learning, preference losses).
        lora: train low-rank adapters of the linear layers and leave the model's own weights alone; None trains all
            weights.
        role: what it is called where it cannot be loaded.

    Attributes:
        model: the Hugging Face model, fp32.
        tokenizer: its tokenizer; a missing pad token is set to the eos token (masks never look at it).
        stop_token_ids: the eos tokens and the chat template's end-of-turn token.
        max_positions: tokens that the model has positions for; None = no limit.

    Raises:
        ValueError: the path is none of the four kinds, the tokenizer is larger than the model's vocabulary, or the
            architecture transforms its logits in a way that the chunked log-probabilities do not know.
    """

    def __init__(self, path: str, dropout: bool = True, lora: Lora | None = None, role: str = "policy") -> None:
        super().__init__()
        self.path = path
        self.model, self.tokenizer = load(path, role)
        self.has_adapters = lora is not None
        if lora is not None:
            add_adapters(self.model, lora)
        self.model.train()  # from_pretrained leaves it in eval mode, and fit does not change that
        if not dropout:
            remove_dropout(self.model)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.stop_token_ids = stop_token_ids(self.model, self.tokenizer)
        self.max_positions = max_positions(self.model.config)
        check_supported(path, self.model, self.tokenizer)
        self.check_scores()
        self.packing_checked = False  # until the first packed rows

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt may be computed once for all its completions: a tested architecture whose layers all cache
        plain keys and values.

        Sliding windows and position biases count columns, and padding between prompt and completion would shift them.
        """
        layers = DynamicCache(config=self.model.config).layers
        return self.model.config.model_type in SHARING and all(type(layer) is DynamicLayer for layer in layers)

    @torch.no_grad()
    def check_scores(self) -> None:
        """Refuse, with a ValueError, a model whose own forward gives other log-probabilities than ours.

        Two short rows are compared, to 1e-3 nats.
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
                        f"policy: '{self.path}' ({self.model.config.model_type}) makes its logits in a way that is not "
                        f"supported yet: log-probabilities from its hidden states are off by {gap:.3g} nats"
                    )

    def token_scores(
        self,
        input_ids: Tensor,
        mask: Tensor,
        position_ids: Tensor | None = None,
        details: bool = False,
        means: bool = False,
    ) -> TokenScores:
        """Log-probability of each token of whole rows given those before it.

        Args:
            input_ids: int [N, T], padded on the right (a causal model never looks there, so no attention mask is
                needed).
            mask: bool [N, T], True = wanted. Logits are computed for these positions only; column 0 is predicted by
                nothing.
            position_ids: int [N, T] where rows hold several documents, each starting at 0.
            details: also entropies, hits and mean logits.

        Returns:
            scores [N, T], aligned to their own token.
        """
        wanted = mask[:, 1:] if position_ids is None else mask[:, 1:] & (position_ids[:, 1:] > 0)
        hidden = self.hidden_states(input_ids, position_ids)[:, :-1]
        scores = self.score(hidden[wanted], input_ids[:, 1:][wanted], details=details, means=means)
        return spread(scores, nn.functional.pad(wanted, (1, 0)))

    def completion_scores(
        self, batch: PolicyBatch | PreferenceBatch, temperature: float = 1.0, details: bool = False
    ) -> TokenScores:
        """Log-probability of each completion token, each prompt computed once where the architecture allows it.

        Args:
            batch: ``prompt_ids``, ``prompt_mask`` [P, Tp], ``completion_ids``, ``completion_mask`` [N, Tc],
                ``prompt_index`` [N].
            temperature: logits are divided by it, so that the result describes the distribution that was sampled.
            details: also entropies, hits and mean logits.

        Returns:
            scores [N, Tc], aligned to their own token.
        """
        return self.scores_of(self.token_states(batch), batch, temperature, details)

    def token_states(self, batch: PolicyBatch | PreferenceBatch) -> Tensor:
        """Hidden states [N, Tc, H] in which the completion tokens are chosen: behind the prompt and all earlier tokens,
        without the token itself.
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
        """``completion_scores`` from the ``token_states`` [N, Tc, H] of the batch; with ``entropy`` the entropies have
        a gradient.
        """
        mask = batch["completion_mask"]
        return spread(
            self.score(states[mask], batch["completion_ids"][mask], temperature, details, entropy=entropy), mask
        )

    def completion_states(self, batch: PolicyBatch | PreferenceBatch) -> Tensor:
        """Hidden state [N, H] at the last kept token of each completion, what a scalar head reads."""
        hidden = (
            self._hidden_shared(batch, batch["completion_ids"]) if self._shares(batch) else self._hidden_rows(batch)
        )
        return hidden[torch.arange(len(hidden), device=hidden.device), batch["completion_mask"].sum(1)]

    def check_packing(self) -> None:
        """Refuse, with a ValueError, a model in which the documents of a packed row see each other; asked once."""
        if not self.packing_checked:
            self.packing_checked = True
            check_packing(
                self.path,
                self.model,
                lambda ids, places: self.token_scores(ids, torch.ones_like(ids, dtype=torch.bool), places).logprobs,
            )

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Last hidden states [N, T, H] of right-padded rows; ``hidden[:, t]`` predicts token ``t + 1``.

        Without a cache and an attention mask transformers reads from ``position_ids`` where a document starts and keeps
        documents apart; the first packed rows raise ValueError for models that mix them all the same.
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
        """Scores [K] of ``targets`` [K] from ``hidden`` [K, H], a chunk of logits at a time.

        With gradients, a chunk's logits are dropped and computed again in the backward pass; a single chunk is simply
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
        """Tokens of a conversation, ready for the assistant to go on; without a chat template of one user message in
        Alpaca's prompt.

        Raises ValueError for several messages without a chat template.
        """
        if self.tokenizer.chat_template is not None:
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if [message["role"] for message in messages] != ["user"]:
            raise ValueError(
                f"policy: '{self.path}' has no chat template (a base model?), so it can be asked one user message alone"
            )
        ids = list(self.tokenizer(ALPACA_PROMPT.format(instruction=messages[0]["content"]), verbose=False).input_ids)
        return (
            ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids
        )  # an end token that the tokenizer puts behind every text

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer as a Hugging Face folder, adapters merged into the weights."""
        (merged(self.model) if self.has_adapters else self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _score_chunk(
        self, hidden: Tensor, targets: Tensor, temperature: float, details: bool, means: bool, entropy: bool
    ) -> TokenScores:
        logits = self.model.get_output_embeddings()(hidden)[None]  # [1, K, V]
        scores = TokenScores(token_logprobs(logits, targets[None], temperature)[0])
        if means:
            scores = scores._replace(means=mean_logprobs(logits / temperature)[0])
        if details:
            detached = logits.detach().float()
            hits = (detached[0].argmax(-1) == targets).float()
            scores = scores._replace(
                entropies=token_entropies(detached / temperature)[0], hits=hits, mean_logits=detached[0].mean(-1)
            )
        if entropy:
            scores = scores._replace(entropies=token_entropies(logits / temperature)[0])
        return scores

    def _shares(self, batch: PolicyBatch | PreferenceBatch) -> bool:
        return self.shares_prompts and len(batch["prompt_index"]) > len(batch["prompt_ids"])

    def _hidden_rows(self, batch: PolicyBatch | PreferenceBatch) -> Tensor:
        """[N, Tc + 1, H], after the prompt and after each completion token: one row each, moved together so that
        padding is on the right only.
        """
        lengths = batch["prompt_mask"].sum(1)[batch["prompt_index"]]  # [N]
        columns = torch.arange(batch["completion_ids"].shape[1] + 1, device=lengths.device)
        at = lengths[:, None] + columns  # [N, Tc + 1], where each completion token goes, and one more
        prompts = batch["prompt_ids"][batch["prompt_index"]]
        rows = nn.functional.pad(prompts, (0, len(columns) - 1)).scatter(1, at[:, :-1], batch["completion_ids"])
        width = int(
            (lengths + batch["completion_mask"].sum(1)).max()
        )  # the longest prompt need not have the longest completion
        hidden = self.hidden_states(rows[:, :width])
        return hidden.gather(1, (at - 1).clamp(max=width - 1)[..., None].expand(-1, -1, hidden.shape[-1]))

    def _hidden_shared(self, batch: PolicyBatch | PreferenceBatch, tokens: Tensor) -> Tensor:
        """[N, T + 1, H], after the prompt and after each of ``tokens`` [N, T], the first of the completions.

        Each prompt runs once with a cache, which is repeated for its completions; gradients flow through it.
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
        last_place = (
            int((lengths[index] + batch["completion_mask"].sum(1)).max()) - 1
        )  # of a real token; padding must not go beyond it
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


def spread(scores: TokenScores, mask: Tensor) -> TokenScores:
    """Put scores [K] of the kept positions back into the shape of ``mask`` [N, T] (K True entries), zero elsewhere."""
    zeros = torch.zeros(mask.shape, device=mask.device)
    logprobs, *details = (None if part is None else zeros.masked_scatter(mask, part) for part in scores)
    assert logprobs is not None
    return TokenScores(logprobs, *details)
