"""What a text says about thinking: flags that ask for a thought or not, the thought itself, settings of a template."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

OPEN_TAG, CLOSE_TAG = "<think>", "</think>"
FLAG = re.compile(r"(?<![\w/.<])/(no_)?think(?![\w/])")
# What a prompt ends with when the chat template opens a thought, or writes an empty one.
PROMPT_BLOCK = re.compile(r"<think>\s*(</think>\s*)?\Z")
EMPTY_BLOCK = re.compile(r"<think>\s*</think>\s*\Z")


def asks_for_thought(dialogue: str | Sequence[Mapping[str, Any]]) -> bool | None:
    """Tell whether a prompt's flags ask for a thought: the last ``/think`` or ``/no_think`` wins (Qwen3, 2505.09388).

    Flags count as words of their own, in messages of the user and of the system; a text is read as one message. None =
    there is no flag, which means thinking.

    >>> asks_for_thought([{"role": "user", "content": "2+3? /think"}, {"role": "user", "content": "4+5? /no_think"}])
    False
    >>> asks_for_thought("7+*=/think"), asks_for_thought("what do </think> and example.com/think mean?")
    (True, None)
    """
    texts = (
        [dialogue]
        if isinstance(dialogue, str)
        else [message["content"] for message in dialogue if message["role"] in ("user", "system")]
    )
    flags = [flag for text in texts for flag in FLAG.finditer(text)]
    return flags[-1][1] is None if flags else None


def find_thought(text: str) -> str | None:
    """Return the first thought of a text without spaces around it, "" for an empty one; None = the text opens none.

    >>> find_thought("<think>2 or 3</think>4"), find_thought("<think>\\n\\n</think>\\n\\n4"), find_thought("4")
    ('2 or 3', '', None)
    """
    before, opened, rest = text.partition(OPEN_TAG)
    return rest.partition(CLOSE_TAG)[0].strip() if opened else None


def set_in_template(template: Any, settings: Mapping[str, Any]) -> str:
    """Return a chat template in which some of its variables are set, such as ``enable_thinking``.

    Args:
        template: the Jinja text of a chat template.
        settings: variable -> text, number, True or False.

    Raises:
        ValueError: there is no single template, it does not read a variable, or a value is something else.

    >>> set_in_template("{% if enable_thinking %}a{% endif %}", {"enable_thinking": False})
    '{% set enable_thinking = false +%}{% if enable_thinking %}a{% endif %}'
    """
    if not isinstance(template, str):
        raise ValueError(
            "chat_template_kwargs are settings of a chat template, and the tokenizer has no single one: leave them out"
        )
    for name, value in settings.items():
        if not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", template):
            raise ValueError(
                f"chat_template_kwargs: the chat template does not read {name!r}, so it would change nothing"
            )
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"chat_template_kwargs: {name} is {value!r}; a text, a number, true or false is expected")
    return "".join(f"{{% set {name} = {json.dumps(value)} +%}}" for name, value in settings.items()) + template
