"""The one place that renders a conversation and turns it into tokens, and that knows which of them are learned."""

from dataclasses import dataclass
from os.path import commonprefix
from typing import TypedDict

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


class Message(TypedDict):
    """One turn."""

    role: str
    content: str


Dialogue = str | list[Message]


@dataclass(frozen=True)
class Tokens:
    """A tokenised row: two lists of one length."""

    ids: list[int]
    supervised: list[bool]  # True = learned


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: Dialogue, completion: Dialogue, origin: str, chat: bool = False, system: str | None = None
) -> Tokens:
    """Tokens of a supervised row; ``chat`` and ``system`` as in :func:`encode_prompt`.

    Text: the prompt, then the supervised completion and one supervised end token. Messages: every assistant turn of ``completion`` is
    supervised up to and including its end-of-turn token. Raises ValueError with ``origin`` for rows that cannot be learned from.
    """
    prompt = as_dialogue(prompt, chat, system, origin)
    if isinstance(prompt, str) and isinstance(completion, str):
        return _checked(encode_text(tokenizer, prompt, completion, origin), origin)
    if isinstance(prompt, str):
        raise ValueError(f"{origin}: the prompt is text and the completion a list of messages; use text for both or messages for both")
    turns = [Message(role="assistant", content=completion)] if isinstance(completion, str) else completion
    return _checked(encode_messages(tokenizer, prompt + turns, origin, first=len(prompt)), origin)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Dialogue, origin: str, chat: bool = False, system: str | None = None
) -> tuple[str, list[int]]:
    """The rendered prompt and its tokens, ready for the assistant to go on.

    Args:
        chat: make a text prompt one user message.
        system: system message in front; a row's own system message wins.
    """
    prompt = as_dialogue(prompt, chat, system, origin)
    if isinstance(prompt, str):
        text, ids = prompt, _prompt_ids(tokenizer, prompt)
    else:
        text = render(tokenizer, prompt, origin, open_turn=True)
        ids = _ids(tokenizer, text)
    if not ids:
        raise ValueError(f"{origin}: the prompt is empty")
    return text, ids


def as_dialogue(prompt: Dialogue, chat: bool, system: str | None, origin: str) -> Dialogue:
    """Wraps a text prompt into one user message if ``chat``, and puts ``system`` in front of messages."""
    if isinstance(prompt, str) and chat:
        prompt = [Message(role="user", content=prompt)]
    if system is None or (not isinstance(prompt, str) and prompt and prompt[0]["role"] == "system"):
        return prompt
    if isinstance(prompt, str):
        raise ValueError(f"{origin}: a system message needs a chat prompt and this prompt is text; set chat: true or leave system out")
    return [Message(role="system", content=system), *prompt]


def encode_text(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, origin: str) -> Tokens:
    """Prompt tokens with the BOS that the tokenizer itself adds; completion tokens and exactly one end token, supervised."""
    before, learned = _prompt_ids(tokenizer, prompt), _ids(tokenizer, completion)
    end = _end_id(tokenizer)
    learned = learned if learned[-1:] == [end] else [*learned, end]
    if not completion.strip() or len(learned) < 2:
        raise ValueError(f"{origin}: the completion is empty")
    return Tokens(before + learned, [False] * len(before) + [True] * len(learned))


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[Message], origin: str, first: int = 0) -> Tokens:
    """Tokens of a conversation, the assistant turns from number ``first`` on supervised with their end-of-turn token.

    The template is rendered up to each such turn and behind it, and the pieces are tokenised one by one. Raises ValueError when the
    template rewrites earlier turns, for then a sampled conversation would not be the one that was learned.
    """
    if messages and messages[0]["role"] == "assistant":
        raise ValueError(f"{origin}: the conversation starts with an assistant turn, so there is no prompt")
    ids: list[int] = []
    supervised: list[bool] = []
    done = ""
    for turn in (index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= first):
        opened = render(tokenizer, messages[:turn], origin, open_turn=True)
        closed = render(tokenizer, messages[: turn + 1], origin, open_turn=False)
        if not opened.startswith(done) or not closed.startswith(opened):
            raise ValueError(f"{origin}: the chat template rewrites what stands before assistant message {turn}; give each turn a row of its own")
        context = _ids(tokenizer, opened[len(done) :])
        body = _assistant_text(tokenizer, messages[: turn + 1], opened, closed, origin)
        learned, rest = _assistant_ids(tokenizer, body, closed[len(opened) + len(body) :])
        ids += context + learned + rest
        supervised += [False] * len(context) + [True] * len(learned) + [False] * len(rest)
        done = closed
    return Tokens(ids, supervised)


def encode_rendered(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, origin: str) -> Tokens | None:
    """Tokens of a prompt that the chat template has rendered already and of the assistant's text behind it, supervised with its end of turn.

    None when the prompt does not end the way the template opens an assistant turn behind a user message: it is plain text.
    """
    if tokenizer.chat_template is None:
        return None
    user, assistant = Message(role="user", content="\N{SNOWMAN}"), Message(role="assistant", content="\N{SNOWMAN}")
    opening = render(tokenizer, [user], origin, open_turn=True).rpartition("\N{SNOWMAN}")[2]
    if not opening.strip() or not prompt.endswith(opening):
        return None
    closing = render(tokenizer, [user, assistant], origin, open_turn=False).rpartition("\N{SNOWMAN}")[2]
    before = _ids(tokenizer, prompt)
    learned, _ = _assistant_ids(tokenizer, completion, closing)
    return Tokens(before + learned, [False] * len(before) + [True] * len(learned))


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], origin: str, open_turn: bool) -> str:
    """The conversation as text; ``open_turn`` ends it where the assistant is to go on. Raises ValueError with ``origin``."""
    if tokenizer.chat_template is None:
        raise ValueError(f"{origin}: messages need a chat template and this tokenizer has none (a base model?); use text prompts or set one")
    conversation = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=open_turn)
    except TemplateError as error:
        raise ValueError(f"{origin}: the chat template refuses these messages: {error}") from error
    return str(rendered)


def _assistant_text(tokenizer: PreTrainedTokenizerBase, messages: list[Message], opened: str, closed: str, origin: str) -> str:
    """The last turn as rendered, without what the template puts behind it: the two renderings part where one more letter would stand."""
    content, where = messages[-1]["content"], f"{origin}: assistant message {len(messages) - 1}"
    if not content.strip():
        raise ValueError(f"{where} is empty")
    longer = render(tokenizer, [*messages[:-1], Message(role="assistant", content=content + "\N{SNOWMAN}")], origin, open_turn=False)
    body = commonprefix([closed, longer])[len(opened) :]
    if content.strip() not in body:
        raise ValueError(f"{where}: the chat template changes its text; write it the way the template renders it")
    return body


def _assistant_ids(tokenizer: PreTrainedTokenizerBase, text: str, tail: str) -> tuple[list[int], list[int]]:
    """The learned ids of a turn, its end-of-turn token included, and the ids that the template puts behind that."""
    body, closing = _ids(tokenizer, text), _ids(tokenizer, tail)
    special = set(tokenizer.all_special_ids)
    ending = next((index for index, token in enumerate(closing) if token in special), None)
    if ending is None:
        return [*body, _end_id(tokenizer)], closing
    return body + closing[: ending + 1], closing[ending + 1 :]


def _checked(tokens: Tokens, origin: str) -> Tokens:
    if not any(tokens.supervised):
        raise ValueError(f"{origin}: no supervised token; the row has no assistant turn to learn")
    if tokens.supervised[0]:
        raise ValueError(f"{origin}: the prompt is empty and the tokenizer adds no BOS, so the first token has nothing to be predicted from")
    return tokens


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)  # silent about length: long rows are counted later


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    plain, ids = _ids(tokenizer, prompt), list(tokenizer(prompt, verbose=False).input_ids)
    if plain and ids[-1] == tokenizer.eos_token_id and ids[-len(plain) :] != plain:
        ids = ids[:-1]  # an end token that the tokenizer puts behind every text
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]  # the text brought its own
    return ids


def _end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token (eos_token), so a model could never learn to stop; set one")
    return int(tokenizer.eos_token_id)
