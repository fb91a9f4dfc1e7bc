"""From text to tokens: the start and end tokens of a row, and a picture of what is learned."""

from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"  # what data sets write behind a completion, whatever the tokenizer
PICTURE = 200  # characters of a token picture


@dataclass(frozen=True)
class Tokens:
    """A tokenised row: two lists of one length."""

    ids: list[int]
    supervised: list[bool]  # True = learned
    documents: tuple[int, ...] = ()  # lengths of the documents of a packed row; empty = one document
    whole: bool = False  # a plain text, which may be cut into pieces


def encode_text(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, origin: str) -> Tokens:
    """Prompt tokens with the BOS that the tokenizer itself adds; completion tokens and exactly one end token,
    supervised.
    """
    completion = without_end(tokenizer, completion)
    before, learned = prompt_ids(tokenizer, prompt), [*token_ids(tokenizer, completion), end_id(tokenizer)]
    if not completion.strip():
        raise ValueError(f"{origin}: the completion is empty")
    return Tokens(before + learned, [False] * len(before) + [True] * len(learned))


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str, origin: str) -> Tokens:
    """A plain text with the BOS that the tokenizer itself adds and exactly one end token; all but the first token
    supervised.
    """
    text = without_end(tokenizer, text)
    if not text.strip():
        raise ValueError(f"{origin}: the text is empty")
    ids = [*prompt_ids(tokenizer, text), end_id(tokenizer)]
    return Tokens(ids, [False, *[True] * (len(ids) - 1)], whole=True)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts of the special tokens, those included that are only marked so among the added ones."""
    marked = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *marked]))


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a piece of text, nothing added; silent about its length, since long rows are counted later."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of a text with the BOS that the tokenizer itself adds, one even if the text brings its own, and
    without an end token.
    """
    plain, ids = token_ids(tokenizer, prompt), list(tokenizer(prompt, verbose=False).input_ids)
    if plain and ids[-1] == tokenizer.eos_token_id and ids[-len(plain) :] != plain:
        ids = ids[:-1]  # an end token that the tokenizer puts behind every text
    while tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    return ids


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The end token. ValueError when there is none."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token (eos_token), so a model could never learn to stop; set one")
    return int(tokenizer.eos_token_id)


def without_end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text without the end tokens that are written out behind it."""
    for end in (tokenizer.eos_token, END_OF_TEXT):
        if end is not None and text.rstrip().endswith(str(end)):
            return without_end(tokenizer, text.rstrip().removesuffix(str(end)))
    return text


def token_picture(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> str:
    """The tokens as one line of text, supervised runs in [brackets]; the middle of a long one is left out."""
    runs = groupby(zip(tokens.ids, tokens.supervised, strict=True), key=lambda token: token[1])
    texts = [(str(tokenizer.decode([token for token, _ in run])), supervised) for supervised, run in runs]
    return shortened("".join(f"[{text}]" if supervised else text for text, supervised in texts)) or "(no tokens)"


def shortened(text: str) -> str:
    """One line of at most PICTURE characters and a gap, for error messages."""
    line = text.replace("\n", "\\n")
    return line if len(line) <= PICTURE else f"{line[: PICTURE // 2]} ... {line[-PICTURE // 2 :]}"
