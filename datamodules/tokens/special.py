"""The special tokens of a tokenizer."""

from transformers import PreTrainedTokenizerBase


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the texts of the special tokens, also of those that are only marked so among the added tokens."""
    marked = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *marked]))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the special tokens."""
    marked = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    return frozenset([*tokenizer.all_special_ids, *marked])


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the end token. Raises ValueError without one."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token (eos_token), so a model could never learn to stop; set one")
    return int(tokenizer.eos_token_id)
