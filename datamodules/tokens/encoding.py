"""From text to tokens: a text is tokenised once and its parts are found by their characters."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"  # what data sets write behind a completion, whatever the tokenizer
PICTURE = 200  # characters of a token picture
IN_FRONT = ("\n", ".", "a")  # texts that a continuation is tokenised behind, so that nothing is put before it


@dataclass(frozen=True)
class Tokens:
    """A tokenised row: two lists of one length."""

    ids: list[int]
    supervised: list[bool]  # True = learned
    documents: tuple[int, ...] = ()  # lengths of the documents of a packed row; empty = one document
    whole: bool = False  # a plain text, which may be cut into pieces


class TokenisedText:
    """A text that is tokenised once; its parts are taken by their characters.

    A token that lies across the edge of a part is split: of its characters, those inside are tokenised as text that
    goes on. No other token changes.

    Args:
        tokenizer: one that knows the characters of its tokens. Raises ValueError for a slow one, which does not.
        text: without the special tokens that the tokenizer adds by itself.
        special: ids of the special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, special: frozenset[int]) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which does not tell the characters of its tokens; "
                "use a folder with a tokenizer.json"
            )
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self.tokenizer, self.text, self.special = tokenizer, text, special
        self.ids: list[int] = list(encoded.input_ids)
        self.starts, self.ends = ([span[side] for span in encoded.offset_mapping] for side in (0, 1))

    def part(self, start: int, end: int) -> list[int]:
        """The tokens of ``text[start:end]``."""
        first = clean = self._token_at(start)
        while clean < len(self.ids) and self._start(clean) < start:
            clean += 1
        across = self.text[start : min(end, self.ends[clean - 1])] if clean > first else ""
        ids = continuation_ids(self.tokenizer, across) if across else []
        last = self._token_at(end)
        if last < clean:
            return ids
        ids += self.ids[clean:last]
        if last < len(self.ids) and self._start(last) < end:
            ids += continuation_ids(self.tokenizer, self.text[max(start, self._start(last)) : end])
        return ids

    def prompt(self, start: int, end: int) -> list[int]:
        """The tokens of ``text[start:end]`` as they are where the text ends at ``end``: those that a prompt ends in."""
        inside = range(self._token_at(end) - 1, -1, -1)
        anchor = next((self.starts[index] for index in inside if self.ids[index] in self.special), 0)
        # texts before and behind a special token do not touch each other
        tail = TokenisedText(self.tokenizer, self.text[anchor:end], self.special)
        if start <= anchor:
            return self.part(start, anchor) + tail.ids
        return tail.part(start - anchor, end - anchor)

    def first_special(self, start: int, end: int) -> int | None:
        """Where the first special token of ``text[start:end]`` ends; None when there is none."""
        for index in range(self._token_at(start), len(self.ids)):
            if self.ends[index] > end:
                return None
            if self.ids[index] in self.special:
                return self.ends[index]
        return None

    def _token_at(self, place: int) -> int:
        """The first token with a character at ``place`` or behind it."""
        index = bisect_right(self.ends, place)
        while index > 0 and self.ends[index - 1] == place and self._start(index - 1) >= place:
            index -= 1  # a token without characters
        return index

    def _start(self, index: int) -> int:
        """Where a token begins, with the space in front that some tokenizers leave out of its characters."""
        if self.ids[index] in self.special:
            return self.starts[index]
        return min(self.starts[index], self.ends[index - 1]) if index else 0


def encode_text(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, origin: str) -> Tokens:
    """Prompt tokens with the BOS that the tokenizer itself adds; completion tokens and exactly one end token,
    supervised.
    """
    completion = without_end(tokenizer, completion)
    if not completion.strip():
        raise ValueError(f"{origin}: the completion is empty")
    whole = TokenisedText(tokenizer, prompt + completion, special_ids(tokenizer))
    before = prompt_ids(tokenizer, prompt)
    learned = [*whole.part(len(prompt), len(whole.text)), end_token_id(tokenizer)]
    return Tokens(before + learned, [False] * len(before) + [True] * len(learned))


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str, origin: str) -> Tokens:
    """A plain text with the BOS that the tokenizer itself adds and exactly one end token; all but the first token
    supervised.
    """
    text = without_end(tokenizer, text)
    if not text.strip():
        raise ValueError(f"{origin}: the text is empty")
    ids = [*prompt_ids(tokenizer, text), end_token_id(tokenizer)]
    return Tokens(ids, [False, *[True] * (len(ids) - 1)], whole=True)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts of the special tokens, those included that are only marked so among the added ones."""
    marked = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *marked]))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of the special tokens."""
    marked = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    return frozenset([*tokenizer.all_special_ids, *marked])


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a piece of text that goes on behind another: without the space that some tokenizers put before a
    text.
    """
    for before in IN_FRONT:
        whole = tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        place = next((i for i, (_, end) in enumerate(whole.offset_mapping) if end > len(before)), None)
        if place and whole.offset_mapping[place - 1][1] == len(before) <= whole.offset_mapping[place][0]:
            return list(whole.input_ids[place:])
    return token_ids(tokenizer, text)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a piece of text, nothing added; silent about its length, since long rows are counted later."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of a text with the BOS that the tokenizer itself adds, and without an end token.

    There is one BOS even if the text brings its own.
    """
    ids = list(tokenizer(prompt, verbose=False).input_ids)
    if ids and ids[-1] == tokenizer.eos_token_id:
        plain = token_ids(tokenizer, prompt)
        if plain and ids[-len(plain) :] != plain:
            ids = ids[:-1]  # an end token that the tokenizer puts behind every text
    while tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    return ids


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The end token of the tokenizer. Raises ValueError when there is none."""
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
    return shorten("".join(f"[{text}]" if supervised else text for text, supervised in texts)) or "(no tokens)"


def shorten(text: str) -> str:
    """One line of at most PICTURE characters and a gap, for error messages."""
    line = text.replace("\n", "\\n")
    return line if len(line) <= PICTURE else f"{line[: PICTURE // 2]} ... {line[-PICTURE // 2 :]}"
