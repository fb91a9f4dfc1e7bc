"""A causal language model with its tokenizer: loading, log-probabilities in chunks, prompts computed once per group, export.

This is the only file that shifts anything: everyone else sees per-token tensors aligned to their own token.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer
from transformers.utils.logging import disable_progress_bar

from modules.functional.logprobs import token_entropies, token_logprobs
from modules.networks.tiny import tiny_model, tiny_tokenizer
from modules.types import PolicyBatch, PreferenceBatch

disable_progress_bar()  # of weight loading: the Trainer's bar is the one to watch

MAX_LOGITS = 2**24  # entries of one chunk of logits: 64 MB in fp32
SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class TokenScores(NamedTuple):
    """What the next-token distributions say of given tokens: per token, zero where it was not asked."""

    logprobs: Tensor  # nats, with gradient
    entropies: Tensor | None  # nats, of the whole distribution, no gradient
    hits: Tensor | None  # 1 where the token is the most likely one, else 0


class Policy(nn.Module):
    """A causal LM from ``tiny``, a Hugging Face folder, a GGUF file or a hub id.

    Args:
        path: ``tiny`` (built in, no download), a folder with ``config.json``, a ``.gguf`` file, or a hub id.
        dropout: False sets every dropout rate of the model to zero (reinforcement learning, preference losses).

    Attributes:
        model: the Hugging Face model, fp32.
        tokenizer: its tokenizer; a missing pad token is set to the eos token (masks never look at it).
        stop_token_ids: the eos tokens and the chat template's end-of-turn token.

    Raises:
        ValueError: the path is none of the four kinds, the tokenizer is larger than the model's vocabulary, or the
            architecture transforms its logits in a way that the chunked log-probabilities do not know.
    """

    def __init__(self, path: str, dropout: bool = True) -> None:
        super().__init__()
        self.path = path
        self.model, self.tokenizer = load(path)
        self.model.train()  # from_pretrained leaves it in eval mode, and fit does not change that
        if not dropout:
            remove_dropout(self.model)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.stop_token_ids = stop_token_ids(self.model, self.tokenizer)
        check_supported(path, self.model, self.tokenizer)

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt may be computed once for all its completions: every layer caches plain keys and values."""
        layers = DynamicCache(config=self.model.config).layers
        return not self.model.config.is_encoder_decoder and all(type(layer) is DynamicLayer for layer in layers)

    def token_scores(self, input_ids: Tensor, mask: Tensor, position_ids: Tensor | None = None, details: bool = False) -> TokenScores:
        """Log-probability of each token of whole rows given those before it.

        Args:
            input_ids: int [N, T], padded on the right (a causal model never looks there, so no attention mask is needed).
            mask: bool [N, T], True = wanted. Logits are computed for these positions only; column 0 is predicted by nothing.
            position_ids: int [N, T] where rows hold several documents, each starting at 0.
            details: also entropies and hits.

        Returns:
            scores [N, T], aligned to their own token.
        """
        wanted = mask[:, 1:]
        hidden = self.hidden_states(input_ids, position_ids)[:, :-1]
        scores = self.score(hidden[wanted], input_ids[:, 1:][wanted], details=details)
        return spread(scores, nn.functional.pad(wanted, (1, 0)))

    def completion_scores(self, batch: PolicyBatch | PreferenceBatch, temperature: float = 1.0, details: bool = False) -> TokenScores:
        """Log-probability of each completion token, each prompt computed once where the architecture allows it.

        Args:
            batch: ``prompt_ids``, ``prompt_mask`` [P, Tp], ``completion_ids``, ``completion_mask`` [N, Tc], ``prompt_index`` [N].
            temperature: logits are divided by it, so that the result describes the distribution that was sampled.
            details: also entropies and hits.

        Returns:
            scores [N, Tc], aligned to their own token.
        """
        mask = batch["completion_mask"]
        shared = self.shares_prompts and len(batch["prompt_index"]) > len(batch["prompt_ids"])
        hidden = self._hidden_shared(batch) if shared else self._hidden_rows(batch)
        return spread(self.score(hidden[mask], batch["completion_ids"][mask], temperature, details), mask)

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Last hidden states [N, T, H] of right-padded rows; ``hidden[:, t]`` predicts token ``t + 1``."""
        return self.model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state

    def score(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, details: bool = False) -> TokenScores:
        """Scores [K] of ``targets`` [K] from ``hidden`` [K, H], a chunk of logits at a time.

        With gradients, a chunk's logits are dropped and computed again in the backward pass; a single chunk is simply kept.
        """
        size = max(1, MAX_LOGITS // self.model.config.vocab_size)
        pairs = list(zip(hidden.split(size), targets.split(size), strict=True))
        if torch.is_grad_enabled() and len(pairs) > 1:
            chunks = [checkpoint(self._score_chunk, h, y, temperature, details, use_reentrant=False) for h, y in pairs]
        else:
            chunks = [self._score_chunk(h, y, temperature, details) for h, y in pairs]
        return TokenScores(
            torch.cat([chunk.logprobs for chunk in chunks]),
            torch.cat([chunk.entropies for chunk in chunks if chunk.entropies is not None]) if details else None,
            torch.cat([chunk.hits for chunk in chunks if chunk.hits is not None]) if details else None,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer as a Hugging Face folder."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _score_chunk(self, hidden: Tensor, targets: Tensor, temperature: float, details: bool) -> TokenScores:
        logits = self.model.get_output_embeddings()(hidden)[None]  # [1, K, V]
        logprobs = token_logprobs(logits, targets[None], temperature)[0]
        if not details:
            return TokenScores(logprobs, None, None)
        detached = logits.detach().float()
        return TokenScores(logprobs, token_entropies(detached / temperature)[0], (detached[0].argmax(-1) == targets).float())

    def _hidden_rows(self, batch: PolicyBatch | PreferenceBatch) -> Tensor:
        """[N, Tc, H]: prompt and completion as one row each, moved together so that padding is on the right only."""
        lengths = batch["prompt_mask"].sum(1)[batch["prompt_index"]]  # [N]
        columns = torch.arange(batch["completion_ids"].shape[1], device=lengths.device)
        at = lengths[:, None] + columns  # [N, Tc], where each completion token goes
        prompts = batch["prompt_ids"][batch["prompt_index"]]
        rows = nn.functional.pad(prompts, (0, len(columns))).scatter(1, at, batch["completion_ids"])
        hidden = self.hidden_states(rows)
        return hidden.gather(1, (at - 1)[..., None].expand(-1, -1, hidden.shape[-1]))

    def _hidden_shared(self, batch: PolicyBatch | PreferenceBatch) -> Tensor:
        """[N, Tc, H]: each prompt once with a cache, the cache repeated, then the completions; gradients flow through it."""
        index, prompt_mask = batch["prompt_index"], batch["prompt_mask"]
        lengths = prompt_mask.sum(1)  # [P]
        cache = DynamicCache(config=self.model.config)
        prompts = self.model.base_model(input_ids=batch["prompt_ids"], past_key_values=cache, use_cache=True).last_hidden_state
        last = prompts[torch.arange(len(prompts), device=index.device), lengths - 1][index][:, None]  # [N, 1, H]
        tokens = batch["completion_ids"][:, :-1]
        if tokens.shape[1] == 0:
            return last
        for layer in cast(list[Any], cache.layers):
            layer.keys, layer.values = layer.keys.index_select(0, index), layer.values.index_select(0, index)
        ragged = not bool(prompt_mask.all())
        hidden = self.model.base_model(
            input_ids=tokens,
            attention_mask=torch.cat([prompt_mask[index], torch.ones_like(tokens, dtype=torch.bool)], 1) if ragged else None,
            position_ids=lengths[index][:, None] + torch.arange(tokens.shape[1], device=index.device),
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


def load(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The fp32 model and the tokenizer behind ``path`` (see ``Policy``); ValueError when there is none."""
    if path == "tiny":
        return tiny_model(), tiny_tokenizer()
    local = Path(path).expanduser()
    if path.endswith(".gguf"):
        if not local.is_file():
            raise ValueError(f"policy: no GGUF file at '{path}'")
        return load_gguf(local)
    if local.is_dir() and not (local / "config.json").is_file():
        raise ValueError(f"policy: '{path}' is a folder without config.json; name a Hugging Face model folder")
    source = str(local) if local.is_dir() else path
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"policy: '{path}' is not 'tiny', a Hugging Face model folder, a .gguf file or a hub id that can be read ({reason})"
        ) from error


def load_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a GGUF file, rebuilt from a clean config: with a quantization entry it would refuse to be saved."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError("policy: reading a GGUF file needs the package gguf: pip install 'lightning-align[gguf]'") from error
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    source = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    fields = {key: value for key, value in source.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(source.config)(**fields), dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    return model, tokenizer


def remove_dropout(model: PreTrainedModel) -> None:
    """Set every dropout rate to zero: dropout modules, and the rates that attention layers keep as numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The eos tokens of tokenizer and generation config, and the token that ends an assistant turn in the chat template."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed: Iterable[int | None] = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in (*listed, tokenizer.eos_token_id, end_of_turn_id(tokenizer)) if i is not None)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """First special token after an assistant's words in the chat template; None without a template or such a token."""
    if tokenizer.chat_template is None:
        return None
    words = "end-of-turn probe"
    turns = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": words}]
    tail = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(words)[2]
    special = set(tokenizer.all_special_ids)
    return next((i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in special), None)


def check_supported(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError for a model whose log-probabilities would come out wrong."""
    config = model.config.to_dict()
    if len(tokenizer) > config["vocab_size"]:
        raise ValueError(f"policy: the tokenizer of '{path}' has {len(tokenizer)} tokens, its model only {config['vocab_size']}")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"policy: the tokenizer of '{path}' has no eos token, so nothing could end a completion")
    for name in SCALED_LOGITS:
        if config.get(name) not in (None, 1.0):
            raise ValueError(f"policy: '{path}' ({config['model_type']}) transforms its logits by {name}, which is not supported yet")
