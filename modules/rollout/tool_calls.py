"""How a model calls tools and reads their results: by its chat template, or as a plain line where that writes no tools."""

import json
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from modules.types import cut_final_text

MARK = "\N{SNOWMAN}"  # a text that shows where the template puts a content
BLOCK = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
LINE = re.compile(r"(\w+)\((.*)\)")


class Call(NamedTuple):
    """A tool that a turn calls, with arguments by name or in order; ``problem`` says why it cannot be read."""

    name: str
    arguments: dict[str, Any] | list[Any]
    problem: str | None = None


class ToolFormat:
    """Reads calls and writes results in the turns of a chat template.

    A template that writes tools must write calls as ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (Hermes,
    Qwen). With any other template the last line of a turn is a call if it reads ``tool(argument, ...)``, with arguments
    in JSON, such as ``calculate("2+3")``; the prompt does not tell of the tools then. Results are turns of the role
    ``tool``.

    Args:
        tokenizer: one with a chat template.
        tools: JSON schemas of the tools.
        stop_token_ids: tokens that end a turn.

    Raises:
        ValueError: the template writes calls in another way, or no results.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]], stop_token_ids: Collection[int]
    ) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                "environment: results of tools are turns of a chat template, and this tokenizer has none (a base "
                "model?): name a chat model, or put a chat_template.jinja into its folder"
            )
        self.tokenizer, self.names = tokenizer, [tool["function"]["name"] for tool in tools]
        self._ends = [str(tokenizer.decode([token])) for token in sorted(stop_token_ids)]
        self._special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        ask = [{"role": "user", "content": MARK}]
        self.opening = self._render(ask).rpartition(MARK)[2]
        self.writes_tools = self._render(ask, tools) != self._render(ask)
        self._check()

    def read(self, text: str) -> list[Call]:
        """Find the calls in a turn's text, behind its thoughts; [] = it calls no tool."""
        said = cut_final_text(text)
        if self.writes_tools:
            return [read_json_call(block) for block in BLOCK.findall(said)]
        lines = said.strip().splitlines()
        found = LINE.fullmatch(lines[-1].strip()) if lines else None
        if found is None or found[1] not in self.names:
            return []
        try:
            return [Call(found[1], json.loads(f"[{found[2]}]"))]
        except ValueError as error:
            return [Call(found[1], [], f"the arguments are no JSON: {error}")]

    def write(self, results: Sequence[tuple[str, str]]) -> list[int]:
        """Return the tokens that follow a turn with calls: a turn for each result, and the opening of the next turn.

        Special tokens are cut from a result, so that it cannot end its turn.

        Args:
            results: (name of the tool, what it returned).
        """
        turns = [{"role": "tool", "name": name, "content": self._clean(result)} for name, result in results]
        return self.tokenise(self._behind_turn(turns))

    def extend(self, prompt: str, text: str) -> str | None:
        """Return a rendered prompt with ``text`` behind its last user message; None if it does not end with one."""
        if not prompt.endswith(self.opening):
            return None
        return prompt.removesuffix(self.opening) + text + self.opening

    def tokenise(self, text: str) -> list[int]:
        """Return the tokens of a rendered text."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _behind_turn(self, turns: list[dict[str, str]]) -> str:
        """Return what the template writes from the end of an assistant's turn to the opening of the next."""
        called: dict[str, Any] = {"role": "assistant", "content": MARK}
        if self.writes_tools:
            called["tool_calls"] = [make_call(turn["name"], {}) for turn in turns]
        rest = self._render([{"role": "user", "content": "?"}, called, *turns]).partition(MARK)[2]
        places = [rest.index(end) + len(end) for end in self._ends if end and end in rest]
        return rest[min(places) :] if places else ""

    def _check(self) -> None:
        """Refuse a template that writes calls or results in a way that is not read here."""
        results = self._behind_turn([{"role": "tool", "name": self.names[0], "content": MARK}])
        if MARK not in results:
            raise ValueError(
                "environment: the chat template writes no turns of the role tool behind the end token of a turn, so "
                "that a model cannot read what a tool returned: use a template that does"
            )
        if not self.writes_tools:
            return
        call = {"role": "assistant", "content": "", "tool_calls": [make_call(self.names[0], {"x": 1})]}
        text = self._render([{"role": "user", "content": "?"}, call])
        if self.read(text)[-1:] != [Call(self.names[0], {"x": 1})]:
            raise ValueError(
                f"environment: the chat template writes a call as {text[-120:]!r}, and only "
                '<tool_call>{"name": ..., "arguments": {...}}</tool_call> is read: use a model with such a template'
            )

    def _clean(self, result: str) -> str:
        for token in self._special:
            result = result.replace(token, "")
        return result

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,  # type: ignore[arg-type]
                    tokenize=False,
                    add_generation_prompt=messages[-1]["role"] != "assistant",
                )
            )
        except (TemplateError, ValueError) as error:
            raise ValueError(f"environment: the chat template refuses turns of tools: {error}") from error


def read_json_call(text: str) -> Call:
    """Read the JSON of a call."""
    try:
        found = json.loads(text)
        name, arguments = found["name"], found.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return Call("", {}, f"the call is no JSON object with name and arguments: {error}")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return Call(str(name), {}, "the name of a tool is text and its arguments are an object")
    return Call(name, arguments)


def make_call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Make a call as chat templates read it."""
    return {"id": "call", "type": "function", "function": {"name": name, "arguments": arguments}}
