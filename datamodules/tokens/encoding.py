"""Makes tokens of texts and conversations: renders a row, tokenises it once, and marks what is learned."""

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from datamodules.tokens.picture import shorten, token_picture
from datamodules.tokens.special import end_token_id, special_ids, special_tokens
from modules.functional.thoughts import PROMPT_BLOCK


class Message(TypedDict):
    """One turn, as chat templates read it."""

    role: str
    content: str
    reasoning_content: NotRequired[str]  # thoughts before an answer
    tool_calls: NotRequired[list[dict[str, Any]]]  # {"type": "function", "function": {"name": ..., "arguments": {...}}}
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


@dataclass(frozen=True)
class Tokens:
    """A tokenised row: two lists of one length."""

    ids: list[int]
    supervised: list[bool]  # True = learned
    documents: tuple[int, ...] = ()  # lengths of the documents of a packed row; empty = one document
    whole: bool = False  # a plain text, which may be cut into pieces


class Turn(NamedTuple):
    """Where an assistant turn stands in a rendered conversation, in characters."""

    start: int  # where the prompt for it ends
    end: int  # where the answer ends
    tail: int  # up to where the template may have written its end of turn


MARK = "\N{SNOWMAN}"  # a text that shows where the template puts a content
END_OF_TEXT = "<|endoftext|>"  # what data sets write behind a completion, whatever the tokenizer
IN_FRONT = ("\n", ".", "a")  # texts that a continuation is tokenised behind, so that nothing is put before it
Dialogue = str | list[Message]
Tools = list[dict[str, Any]]
LossOn = Literal["assistant", "last", "all"]


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Dialogue,
    completion: Dialogue,
    origin: str,
    chat: bool = False,
    system: str | None = None,
    loss_on: LossOn = "assistant",
    tools: Tools | None = None,
    unlearned: Collection[int] = (),
) -> Tokens:
    """Encode a supervised row; ``chat`` and ``system`` are those of :func:`encode_prompt`.

    In a text, the completion and one end token are supervised. A prompt that the chat template has rendered already, as
    ``predict`` writes it, is read as it stands, and the end token is that of a turn. In messages, assistant turns are
    supervised with their end-of-turn token, and what follows the last of these turns is left out. An end token that is
    written as text behind an answer is cut.

    Args:
        loss_on: ``assistant`` = every assistant turn of ``completion``; ``last`` = the last of these alone, so that
            templates may rewrite the turns before it; ``all`` = every token but the first.
        tools: JSON schemas that the chat template writes.
        unlearned: numbers of messages of ``completion`` that are not learned.

    Raises:
        ValueError: with ``origin``, for rows that cannot be learned from.
    """
    rendered = None
    if isinstance(prompt, str) and isinstance(completion, str):
        rendered = encode_rendered(tokenizer, prompt, completion, origin)
    if not isinstance(completion, str) and [message["role"] for message in completion[:1]] == ["system"]:
        system = None  # the row's own wins
    prompt = as_dialogue(prompt, chat, system, origin) if rendered is None else prompt
    if rendered is not None:
        tokens = rendered
    elif isinstance(prompt, str) and isinstance(completion, str):
        tokens = encode_text(tokenizer, prompt, completion, origin)
    elif isinstance(prompt, str):
        raise ValueError(
            f"{origin}: the prompt is text and the completion a list of messages; use text for both or messages for "
            "both"
        )
    else:
        messages = prompt + (
            [Message(role="assistant", content=completion)] if isinstance(completion, str) else completion
        )
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if loss_on != "all":
            turns = [turn for turn in turns if turn >= len(prompt) and turn - len(prompt) not in unlearned]
        tokens = encode_messages(tokenizer, messages, origin, turns[-1:] if loss_on == "last" else turns, tools)
    if loss_on == "all" and any(tokens.supervised):
        tokens = Tokens(tokens.ids, [False, *[True] * (len(tokens.ids) - 1)])
    return _check_learnable(tokenizer, tokens, origin)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Dialogue,
    origin: str,
    chat: bool = False,
    system: str | None = None,
    tools: Tools | None = None,
) -> tuple[str, list[int]]:
    """Render a prompt and return it with its tokens. The assistant continues it in a new turn, or in its own open
    turn.

    A text that the chat template has rendered already, as ``predict`` writes it, is read as it stands.

    Args:
        chat: make a text prompt one user message.
        system: system message in front; a row's own system message wins.
        tools: JSON schemas that the chat template writes.

    Raises:
        ValueError: with ``origin``, for an empty prompt and for what the chat template does not write.
    """
    if isinstance(prompt, str) and is_rendered(tokenizer, prompt):
        return prompt, token_ids(tokenizer, prompt)
    prompt = as_dialogue(prompt, chat, system, origin)
    if isinstance(prompt, str):
        text, ids = prompt, prompt_ids(tokenizer, prompt)
    else:
        check_written(tokenizer, prompt, origin, tools)
        opens = not prompt or prompt[-1]["role"] != "assistant"
        text = render(tokenizer, prompt, origin, opens, tools, goes_on=not opens)
        ids = token_ids(tokenizer, text)
    if not ids:
        raise ValueError(f"{origin}: the prompt is empty")
    return text, ids


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str, origin: str) -> Tokens:
    """Encode a plain text, with the tokenizer's BOS and one end token; all tokens but the first are supervised."""
    text = without_end(tokenizer, text)
    if not text.strip():
        raise ValueError(f"{origin}: the text is empty")
    ids = [*prompt_ids(tokenizer, text), end_token_id(tokenizer)]
    return Tokens(ids, [False, *[True] * (len(ids) - 1)], whole=True)


def as_dialogue(prompt: Dialogue, chat: bool, system: str | None, origin: str) -> Dialogue:
    """Wrap a text prompt into one user message if ``chat``, and put ``system`` in front of messages."""
    if isinstance(prompt, str) and chat:
        prompt = [Message(role="user", content=prompt)]
    if system is None or (not isinstance(prompt, str) and prompt and prompt[0]["role"] == "system"):
        return prompt
    if isinstance(prompt, str):
        raise ValueError(
            f"{origin}: a system message needs a chat prompt and this prompt is text; set chat: true or leave system "
            "out"
        )
    return [Message(role="system", content=system), *prompt]


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    origin: str,
    turns: Collection[int],
    tools: Tools | None = None,
) -> Tokens:
    """Encode a conversation up to the last of ``turns``, the numbers of the messages that are supervised.

    The whole conversation is rendered and tokenised once, and its turns are found by their characters. The text before
    a turn has the tokens of the prompt that asks for the turn. Raises ValueError when the template rewrites earlier
    turns: a sampled conversation would differ from the learned one.
    """
    messages = [
        _trim_answer(tokenizer, message, f"{origin}: {message['role']} message {index}")
        for index, message in enumerate(messages)
    ]
    if next((message["role"] for message in messages if message["role"] != "system"), None) == "assistant":
        raise ValueError(f"{origin}: the conversation starts with an assistant turn, so there is no prompt")
    check_written(tokenizer, messages, origin, tools)
    if not turns:
        ids = token_ids(tokenizer, render(tokenizer, messages, origin, False, tools)) if messages else []
        return Tokens(ids, [False] * len(ids))
    text, spans = _find_turns(tokenizer, messages, origin, sorted(turns), tools)
    whole = TokenisedText(tokenizer, text, special_ids(tokenizer))
    tokens, place = Tokens([], []), 0
    for span in spans:
        context = whole.prompt(place, span.start)
        learned, place = _learned_ids(whole, span.start, span.end, span.tail)
        tokens.ids.extend(context + learned)
        tokens.supervised.extend([False] * len(context) + [True] * len(learned))
    rest = whole.part(place, len(whole.text))
    return Tokens(tokens.ids + rest, tokens.supervised + [False] * len(rest))


def encode_rendered(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, origin: str) -> Tokens | None:
    """Encode a prompt that the chat template has rendered already, and the assistant's text behind it.

    The text is supervised with its end of turn. Returns None for a plain prompt, which does not end as the template
    opens an assistant turn.
    """
    if not is_rendered(tokenizer, prompt):
        return None
    text = prompt + without_end(tokenizer, completion)
    if not text[len(prompt) :].strip():
        raise ValueError(f"{origin}: the completion is empty")
    closed = text + _frame(tokenizer, str(tokenizer.chat_template))[1]
    whole = TokenisedText(tokenizer, closed, special_ids(tokenizer))
    before, (learned, _) = token_ids(tokenizer, prompt), _learned_ids(whole, len(prompt), len(text), len(closed))
    return Tokens(before + learned, [False] * len(before) + [True] * len(learned))


def is_rendered(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Tell whether a text ends as the chat template opens an assistant turn, with or without a thought."""
    opening = _frame(tokenizer, str(tokenizer.chat_template))[0] if tokenizer.chat_template is not None else ""
    opening = PROMPT_BLOCK.sub("", opening)
    return bool(opening.strip()) and PROMPT_BLOCK.sub("", prompt).endswith(opening)


@lru_cache(maxsize=8)
def _frame(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str]:
    """Find what the template writes between a user's content and the assistant's, and behind the assistant's.

    Both are empty where the template refuses a lone question.
    """
    user, assistant = (Message(role=role, content=MARK) for role in ("user", "assistant"))
    try:
        opened, closed = render(tokenizer, [user], "", True), render(tokenizer, [user, assistant], "", False)
    except ValueError:
        return "", ""
    return opened.rpartition(MARK)[2], closed.rpartition(MARK)[2]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    origin: str,
    open_turn: bool,
    tools: Tools | None = None,
    goes_on: bool = False,
) -> str:
    """Write a conversation as text. ``open_turn`` opens an assistant turn; ``goes_on`` leaves the last turn open.

    The template gets reasoning under each of its usual names. Raises ValueError with ``origin``.
    """
    if tokenizer.chat_template is None:
        advice = "use text prompts, or put a chat_template.jinja into the model's folder"
        raise ValueError(
            f"{origin}: messages need a chat template and this tokenizer has none (a base model?); {advice}"
        )
    conversation: list[Any] = [
        {**message, **{name: message["reasoning_content"] for name in ("thinking", "reasoning")}}
        if "reasoning_content" in message
        else dict(message)
        for message in messages
    ]
    try:
        rendered = tokenizer.apply_chat_template(
            conversation,
            tools=tools,  # type: ignore[arg-type]
            tokenize=False,
            add_generation_prompt=open_turn,
            continue_final_message=goes_on,
        )
    except (TemplateError, ValueError) as error:
        raise ValueError(f"{origin}: the chat template refuses these messages: {error}") from error
    return str(rendered)


def check_written(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], origin: str, tools: Tools | None = None
) -> None:
    """Refuse a chat template that leaves out the tools, or a name, a tool call or the reasoning of a turn.

    Raises ValueError with ``origin``. Templates may drop the reasoning of earlier turns, so each turn is rendered as
    the last one. A tool's name and the ids of calls are not checked, since they only link turns.
    """
    if tools and render(tokenizer, messages, origin, False, tools) == render(tokenizer, messages, origin, False):
        raise ValueError(
            f"{origin}: the row has tools and the chat template does not write them; use a template that reads tools"
        )
    for index, message in enumerate(messages):
        for field in ("reasoning_content", "tool_calls", "name"):
            if not message.get(field) or (field == "name" and message["role"] == "tool"):
                continue
            so_far = messages[: index + 1]
            bare: Any = {key: part for key, part in message.items() if key != field}
            if field == "tool_calls" and not message["content"].strip():
                bare["content"] = MARK  # some templates refuse a turn that says nothing
            said = render(tokenizer, so_far, origin, False, tools)
            if said == render(tokenizer, [*messages[:index], bare], origin, False, tools).replace(MARK, ""):
                what = {"reasoning_content": "reasoning", "tool_calls": "tool call"}.get(field, field)
                raise ValueError(
                    f"{origin}: {message['role']} message {index}: the chat template changes its {what}; use a "
                    f"template that writes a {what}, or remove it from the row"
                )


def _trim_answer(tokenizer: PreTrainedTokenizerBase, message: Message, where: str) -> Message:
    """Cut an end token from the text of an assistant turn. Raises ValueError for an empty turn."""
    if message["role"] == "assistant":
        content = without_end(tokenizer, message["content"])
        if content.rstrip().endswith(special_tokens(tokenizer)):
            content = content.rstrip().removesuffix(_frame(tokenizer, str(tokenizer.chat_template))[1].strip())
        message = {**message, "content": content}
    if not message["content"].strip() and not message.get("tool_calls") and message["role"] not in ("tool", "system"):
        raise ValueError(f"{where} is empty")
    return message


def _find_turns(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], origin: str, turns: list[int], tools: Tools | None
) -> tuple[str, list[Turn]]:
    """Render a conversation up to the last of ``turns``, and find where each of them stands in the text.

    Raises ValueError for a turn that does not follow its own prompt, or that changes when other turns follow.
    """
    whole, spans = render(tokenizer, messages[: turns[-1] + 1], origin, False, tools), []
    for place, turn in enumerate(turns):
        opened = render(tokenizer, messages[:turn], origin, True, tools)
        closed = whole if turn == turns[-1] else render(tokenizer, messages[: turn + 1], origin, False, tools)
        if not closed.startswith(opened):
            raise ValueError(
                f"{origin}: the chat template writes assistant message {turn} unlike the prompt that it gives for it: "
                f"{shorten(closed[_count_shared(closed, opened) :])} where the prompt ends in {shorten(opened[-40:])}"
            )
        end = _find_answer_end(tokenizer, messages[: turn + 1], opened, closed, origin, tools)
        tail = _count_shared(whole, closed)
        if tail < end:
            alone = encode_messages(tokenizer, messages[: turn + 1], origin, [turn], tools)
            raise ValueError(
                f"{origin}: the chat template rewrites what stands before assistant message {turns[place + 1]}, such "
                "as <think> of earlier turns; set data.loss_on: last, or give each turn a row of its own: "
                f"{token_picture(tokenizer, alone.ids, alone.supervised)}"
            )
        spans.append(Turn(len(opened), end, tail))
    return whole, spans


def _find_answer_end(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    opened: str,
    closed: str,
    origin: str,
    tools: Tools | None,
) -> int:
    """Find where the last message's answer ends in the text ``closed``, which begins with its prompt ``opened``.

    An answer that the template does not write as it is ends where one more letter would stand. After tool calls, the
    last special token is the template's.
    """
    message, start = messages[-1], len(opened)
    if not message.get("tool_calls") and message["content"].strip() and closed.startswith(message["content"], start):
        end = start + len(message["content"])
    elif message.get("tool_calls"):
        ends = [closed.rfind(token, start) for token in special_tokens(tokenizer)]
        end = max((place for place in ends if place >= 0), default=len(closed))
    else:
        longer: Message = {**message, "content": message["content"] + MARK}
        end = _count_shared(closed, render(tokenizer, [*messages[:-1], longer], origin, False, tools))
    parts = [("text", message["content"]), ("reasoning", message.get("reasoning_content", ""))]
    for what, text in [*parts, *(("tool call", call["function"]["name"]) for call in message.get("tool_calls", []))]:
        if text.strip() not in closed[start:end]:
            ids = token_ids(tokenizer, closed[start:])
            hint = (
                "write it the way the template renders it" if what == "text" else f"use a template that writes a {what}"
            )
            raise ValueError(
                f"{origin}: assistant message {len(messages) - 1}: the chat template changes its {what}; {hint}: "
                f"{token_picture(tokenizer, ids, [True] * len(ids))}"
            )
    return end


def _count_shared(first: str, second: str) -> int:
    """Count the characters that two texts share at their beginning."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _learned_ids(whole: "TokenisedText", start: int, end: int, tail: int) -> tuple[list[int], int]:
    """Return the learned ids of a turn, with its end-of-turn token, and the place behind them.

    An end token is added where the template writes none before ``tail``.
    """
    closing = whole.first_special(end, tail)
    if closing is not None:
        return whole.part(start, closing), closing
    return [*whole.part(start, end), end_token_id(whole.tokenizer)], end


def _check_learnable(tokenizer: PreTrainedTokenizerBase, tokens: Tokens, origin: str) -> Tokens:
    """Refuse a row in which nothing is learned, or the first token, or which begins with two BOS tokens."""
    if not any(tokens.supervised):
        raise ValueError(
            f"{origin}: no supervised token; the row has no assistant turn to learn: "
            f"{token_picture(tokenizer, tokens.ids, tokens.supervised)}"
        )
    if tokenizer.bos_token_id is not None and tokens.ids[:2] == [tokenizer.bos_token_id] * 2:
        picture = token_picture(tokenizer, tokens.ids, tokens.supervised)
        raise ValueError(
            f"{origin}: two BOS tokens at the start, from the chat template and the row's own text; remove one: "
            f"{picture}"
        )
    if tokens.supervised[0]:
        raise ValueError(
            f"{origin}: the prompt is empty and the tokenizer adds no BOS, so the first token has nothing to be "
            "predicted from"
        )
    return tokens


def encode_text(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, origin: str) -> Tokens:
    """Encode a prompt, with the tokenizer's BOS, and a completion and one end token, which are supervised."""
    completion = without_end(tokenizer, completion)
    if not completion.strip():
        raise ValueError(f"{origin}: the completion is empty")
    whole = TokenisedText(tokenizer, prompt + completion, special_ids(tokenizer))
    before = prompt_ids(tokenizer, prompt)
    learned = [*whole.part(len(prompt), len(whole.text)), end_token_id(tokenizer)]
    return Tokens(before + learned, [False] * len(before) + [True] * len(learned))


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
        self.tokenizer, self.text, self.special = tokenizer, text, special
        self._encoding = tokenise(tokenizer, text)
        self.ids: list[int] = self._encoding.ids

    def part(self, start: int, end: int) -> list[int]:
        """Return the tokens of ``text[start:end]``."""
        first = clean = self._token_at(start)
        while clean < len(self.ids) and self._start(clean) < start:
            clean += 1
        across = self.text[start : min(end, self._end(clean - 1))] if clean > first else ""
        ids = continuation_ids(self.tokenizer, across) if across else []
        last = self._token_at(end)
        if last < clean:
            return ids
        ids += self.ids[clean:last]
        if last < len(self.ids) and self._start(last) < end:
            ids += continuation_ids(self.tokenizer, self.text[max(start, self._start(last)) : end])
        return ids

    def prompt(self, start: int, end: int) -> list[int]:
        """Return the tokens that ``text[start:end]`` has in a text that ends at ``end``, as a prompt does."""
        inside = range(self._token_at(end) - 1, -1, -1)
        anchor = next(
            (self._encoding.token_to_chars(index)[0] for index in inside if self.ids[index] in self.special), 0
        )
        # No token reaches over a special one.
        tail = _tokenise_tail(self.tokenizer, self.text[anchor:end], self.special, len(self.tokenizer))
        if start <= anchor:
            return self.part(start, anchor) + tail.ids
        return tail.part(start - anchor, end - anchor)

    def first_special(self, start: int, end: int) -> int | None:
        """Find where the first special token of ``text[start:end]`` ends; None without one."""
        for index in range(self._token_at(start), len(self.ids)):
            if self._end(index) > end:
                return None
            if self.ids[index] in self.special:
                return self._end(index)
        return None

    def _token_at(self, place: int) -> int:
        """Find the first token with a character at ``place`` or behind it."""
        index = bisect_right(range(len(self.ids)), place, key=self._end)
        while index > 0 and self._end(index - 1) == place and self._start(index - 1) >= place:
            index -= 1  # a token without characters
        return index

    def _start(self, index: int) -> int:
        """Find where a token begins, with a space in front that some tokenizers do not count."""
        start = int(self._encoding.token_to_chars(index)[0])
        if self.ids[index] in self.special:
            return start
        return min(start, self._end(index - 1)) if index else 0

    def _end(self, index: int) -> int:
        """Find where a token ends."""
        return int(self._encoding.token_to_chars(index)[1])


@lru_cache(maxsize=64)
def _tokenise_tail(
    tokenizer: PreTrainedTokenizerBase, text: str, special: frozenset[int], num_tokens: int
) -> TokenisedText:
    """Tokenise the end of a prompt once, since most conversations share it. With ``num_tokens`` in the cache's key, a
    changed tokenizer is noticed.
    """
    return TokenisedText(tokenizer, text, special)


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str, with_special: bool = False) -> Any:
    """Tokenise a text as the tokenizer does when it is called, without the time that the call costs.

    Args:
        tokenizer: a fast one.
        text: of any length; it is neither cut nor padded.
        with_special: add the special tokens that the tokenizer puts around a text.

    Returns:
        an ``Encoding`` of the library ``tokenizers``.
    """
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend.encode(text, add_special_tokens=with_special)


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text that continues another, without the space that some tokenizers put in front."""
    for before in IN_FRONT:
        whole = tokenise(tokenizer, before + text)
        place = next((i for i, (_, end) in enumerate(whole.offsets) if end > len(before)), None)
        if place and whole.offsets[place - 1][1] == len(before) <= whole.offsets[place][0]:
            return list(whole.ids[place:])
    return token_ids(tokenizer, text)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text, with nothing added and no warning about its length: long rows are counted later."""
    if not tokenizer.is_fast:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    return list(tokenise(tokenizer, text).ids)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the tokens of a text with the tokenizer's BOS, and without an end token.

    There is one BOS even if the text has its own.
    """
    if tokenizer.is_fast:
        ids = list(tokenise(tokenizer, prompt, with_special=True).ids)
    else:
        ids = list(tokenizer(prompt, verbose=False).input_ids)
    if ids and ids[-1] == tokenizer.eos_token_id:
        plain = token_ids(tokenizer, prompt)
        if plain and ids[-len(plain) :] != plain:
            ids = ids[:-1]  # an end token that the tokenizer puts behind every text
    while tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    return ids


def without_end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Cut the end tokens that are written behind a text."""
    for end in (tokenizer.eos_token, END_OF_TEXT):
        if end is not None and text.rstrip().endswith(str(end)):
            return without_end(tokenizer, text.rstrip().removesuffix(str(end)))
    return text
