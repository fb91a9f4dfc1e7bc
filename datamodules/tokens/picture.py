"""Tokens as one line of text, for error messages."""

from collections.abc import Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

PICTURE = 200  # characters of a token picture


def token_picture(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], supervised: Sequence[bool]) -> str:
    """Write tokens as one line of text, supervised runs in [brackets], without the middle of a long one."""
    runs = groupby(zip(ids, supervised, strict=True), key=lambda token: token[1])
    texts = [(str(tokenizer.decode([token for token, _ in run])), learned) for learned, run in runs]
    return shorten("".join(f"[{text}]" if learned else text for text, learned in texts)) or "(no tokens)"


def shorten(text: str) -> str:
    """Cut a text to one line of at most PICTURE characters and a gap."""
    line = text.replace("\n", "\\n")
    return line if len(line) <= PICTURE else f"{line[: PICTURE // 2]} ... {line[-PICTURE // 2 :]}"
