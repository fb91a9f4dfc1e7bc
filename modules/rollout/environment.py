"""Environments: classes of the user's whose methods are tools; every completion gets its own instance."""

import ctypes
import faulthandler
import inspect
import json
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import FunctionType, MethodType
from typing import Any, cast

from transformers.utils import get_json_schema

from modules.functional.ranges import check_numbers
from modules.rollout.engine import InProcessEngine, RolloutEngine
from modules.rollout.sampling import Sampling
from modules.rollout.tool_calls import Call, ToolFormat
from modules.types import Completion, PromptBatch, check_scores, find_own_place

NO_TOOLS = ("reset", "get_reward")  # public methods that a model cannot call
GRACE = 60.0  # seconds that a tool which holds Python's lock may take beyond its time, before the process ends


@dataclass(frozen=True)
class Environment:
    """Lets completions call tools: the public methods of a class, by the contract of TRL's ``environment_factory``.

    The class is made without arguments, once for each completion. ``reset(**columns) -> str | None`` gets the columns of
    the row that its parameters name, and returns text that is put behind the last user message, the same for all
    completions of a prompt. Each tool has a docstring in Google style and annotations. ``get_reward() -> float``, if
    there is one, is read by ``EnvironmentReward``.

    A tool that raises, or is called wrongly, answers with the error. One that is not done in time answers so, and the
    environment of that completion is left alone from then on, with None for its reward. A warning tells of it, again
    whenever the count of that tool has doubled. What its thread does in Python ends; what waits in C, as for a socket,
    is left waiting and does not keep the process from its end. A tool that lets no other thread run, as a regular
    expression may, ends the process ``GRACE`` seconds later, with status 1 and the stacks of all threads, since
    nothing else can: run such work in a process of its own.

    Attributes:
        late: calls that were not done in time so far, by tool.

    Raises:
        ValueError: the class does not keep to the contract, or values are out of range.
    """

    factory: type  # for example my_package.MyEnvironment
    max_turns: int = 4  # >= 1, turns of a completion; calls in the last one are not answered
    timeout: float = 10.0  # > 0, seconds that a tool may take
    late: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_numbers("environment", max_turns=(self.max_turns, "[1, inf)"), timeout=(self.timeout, "(0, inf)"))
        name = self.factory.__name__
        if not callable(getattr(self.factory, "reset", None)):
            raise ValueError(f"environment {name} has no method reset(**columns) -> str | None: add it")
        needed = [each.name for each in inspect.signature(self.factory).parameters.values() if is_needed(each)]
        if needed:
            raise ValueError(
                f"environment {name} needs {', '.join(needed)}, and is made without arguments: give defaults"
            )
        if not self.tools():
            raise ValueError(f"environment {name} has no tools: add public methods with docstring and annotations")

    def tell_late(self, tool: str) -> None:
        """Count a call that was not done in time, and warn if the count of its tool is 1 or has doubled."""
        self.late[tool] += 1
        count = self.late[tool]
        if count & (count - 1) == 0:
            warnings.warn(
                f"environment {self.factory.__name__}: the tool {tool} was not done in {self.timeout:g} s, {count} times so "
                "far; each such completion waits that long, and gets no more answers and no reward of the environment",
                stacklevel=2,
            )

    @property
    def has_reward(self) -> bool:
        """Whether the class has ``get_reward``."""
        return callable(getattr(self.factory, "get_reward", None))

    def tools(self) -> list[dict[str, Any]]:
        """Return the JSON schemas of the tools, in the order of their names."""
        names = [name for name in dir(self.factory) if name[0] != "_" and name not in NO_TOOLS]
        found = [(name, inspect.getattr_static(self.factory, name)) for name in names]
        return [self.describe(name, tool) for name, tool in found if isinstance(tool, FunctionType)]

    def describe(self, name: str, tool: FunctionType) -> dict[str, Any]:
        """Return the JSON schema of a tool. Raises ValueError where docstring and annotations do not suffice."""
        if inspect.iscoroutinefunction(tool):
            raise ValueError(f"environment {self.factory.__name__}: the tool {name} is async: make it a plain method")
        try:
            return get_json_schema(MethodType(tool, object()))
        except Exception as error:  # of a docstring or an annotation that is missing or not understood
            raise ValueError(
                f"environment {self.factory.__name__}: the tool {name} needs a docstring in Google style and annotations "
                f"of its arguments: {error}"
            ) from error

    def sample(
        self,
        engine: RolloutEngine,
        form: ToolFormat,
        prompts: PromptBatch,
        num_generations: int,
        sampling: Sampling,
        seeds: list[int],
    ) -> tuple[PromptBatch, list[list[Completion]]]:
        """Sample completions that may call tools.

        Returns:
            the prompts as the environments open them, and the completions of each; see ``RolloutEngine.generate``.

        Raises:
            ValueError: a prompt is no conversation that ends with the user, or the environment fails outside of tools.
        """
        episodes = [[Episode(self, form, prompts, i) for _ in range(num_generations)] for i in range(len(seeds))]
        texts = [self.open_prompt(form, prompts, i, group) for i, group in enumerate(episodes)]
        ids = [
            given if text == before else form.tokenise(text)
            for text, before, given in zip(texts, prompts["prompt"], prompts["prompt_ids"], strict=True)
        ]
        replies = [episode for group in episodes for episode in group]
        found = cast(InProcessEngine, engine).generate(ids, num_generations, sampling, seeds, replies=replies)
        completions = [
            [replace(each, earned=episode.find_reward()) for each, episode in zip(group, mine, strict=True)]
            for group, mine in zip(found, episodes, strict=True)
        ]
        return {**prompts, "prompt": texts, "prompt_ids": ids}, completions

    def open_prompt(self, form: ToolFormat, prompts: PromptBatch, index: int, episodes: list["Episode"]) -> str:
        """Return a prompt with what its environments put behind the user's message."""
        uid, texts = prompts["uid"][index], {episode.opening for episode in episodes}
        if len(texts) > 1:
            raise ValueError(
                f"{uid}: {self.factory.__name__}.reset returned {len(texts)} different texts for the completions of one "
                "prompt, which are compared with each other: let the text depend on the columns alone"
            )
        prompt = form.extend(prompts["prompt"][index], texts.pop() or "")
        if prompt is None:
            raise ValueError(
                f"{uid}: model.environment needs prompts that end with a user's message in the chat template, and this "
                "one does not: leave data.chat out or set it to true, and end each conversation with the user"
            )
        return prompt


class Episode:
    """One completion's environment; called with each turn that ended, it returns the tokens that follow (``Reply``).

    Args:
        environment: the settings.
        form: how calls are written.
        prompts: prompts with their rows.
        index: which of them is the completion's.
    """

    def __init__(self, environment: Environment, form: ToolFormat, prompts: PromptBatch, index: int) -> None:
        self.settings, self.form, self.turns, self.timed_out = environment, form, 0, False
        self.instance = guard(environment, "()", environment.factory)
        columns = {"prompt": prompts["prompt"][index], "answer": prompts["answer"][index], **prompts["info"][index]}
        wanted = inspect.signature(self.instance.reset).parameters.values()
        takes_all = any(each.kind is each.VAR_KEYWORD for each in wanted)
        missing = [each.name for each in wanted if is_needed(each) and each.name not in columns]
        if missing:
            raise ValueError(
                f"{prompts['uid'][index]}: {environment.factory.__name__}.reset asks for {', '.join(missing)}, and the row "
                f"has {', '.join(columns)}"
            )
        named = {each.name for each in wanted}
        given = {name: value for name, value in columns.items() if takes_all or name in named}
        self.opening: str | None = guard(environment, ".reset", lambda: self.instance.reset(**given))
        if self.opening is not None and not isinstance(self.opening, str):
            raise ValueError(f"{environment.factory.__name__}.reset returned {self.opening!r}: return text or None")

    def __call__(self, text: str) -> list[int] | None:
        """Answer the calls of a turn; None = it calls no tool, or there are no turns left."""
        self.turns += 1
        calls = self.form.read(text) if self.turns < self.settings.max_turns else []
        return self.form.write([(call.name, self.answer(call)) for call in calls]) if calls else None

    def answer(self, call: Call) -> str:
        """Return what a tool says to a call, or the error."""
        if call.problem is None and call.name not in self.form.names:
            return f"error: there is no tool {call.name!r}; the tools are {', '.join(self.form.names)}"
        if call.problem is not None or self.timed_out:
            return f"error: {call.problem or 'the environment does not answer any more'}"
        tool = getattr(self.instance, call.name)
        positional, named = ([], call.arguments) if isinstance(call.arguments, dict) else (call.arguments, {})
        try:
            inspect.signature(tool).bind(*positional, **named)
        except TypeError as error:
            return f"error: {call.name}: {error}"
        done, result = call_in_time(lambda: tool(*positional, **named), self.settings.timeout)
        self.timed_out = not done
        if not done:
            self.settings.tell_late(call.name)
            return f"error: {call.name} was not done in {self.settings.timeout:g} s"
        if isinstance(result, BaseException):
            return f"error: {result or type(result).__name__}"
        return result if isinstance(result, str) else json.dumps(result, default=str, ensure_ascii=False)

    def find_reward(self) -> float | None:
        """Return what ``get_reward`` gives; None without one, and after a tool that was not done in time."""
        if not self.settings.has_reward or self.timed_out:
            return None
        value = guard(self.settings, ".get_reward", self.instance.get_reward)
        return check_scores(f"{self.settings.factory.__name__}.get_reward", [value], 1)[0]


def is_needed(parameter: inspect.Parameter) -> bool:
    """Return whether a parameter must be given."""
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variadic


def guard(environment: Environment, what: str, function: Callable[[], Any]) -> Any:
    """Call a part of the user's class. Raises ValueError with its name and place for an error of its own."""
    try:
        return function()
    except Exception as error:
        name, place = f"{environment.factory.__name__}{what}", find_own_place(error)
        where = f" at {place}" if place else ""
        raise ValueError(f"environment {name} failed{where}: {type(error).__name__}: {error}") from error


def call_in_time(function: Callable[[], Any], seconds: float) -> tuple[bool, Any]:
    """Call a function in a thread of its own, and wait for it; a function that is late gets a SystemExit.

    Returns:
        (True, what it returned or raised), or (False, None) if it is not done in time.
    """
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:  # a tool may exit
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    # Without Python's lock neither this thread nor a handler of signals runs; this watch needs no lock.
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        thread.start()
        thread.join(seconds)
    finally:
        faulthandler.cancel_dump_traceback_later()
    if found:
        return True, found[0]
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
    return False, None


def check_environment(environment: Environment, engine: RolloutEngine, sampling: Sampling) -> None:
    """Refuse an engine that takes no replies, and stop strings.

    Raises:
        ValueError: it is refused; the message says what to change.
    """
    if "replies" not in inspect.signature(engine.generate).parameters:
        raise ValueError(
            f"environment: {type(engine).__name__}.generate takes no replies, so that it cannot go on behind the result "
            "of a tool: leave model.engine or model.environment out"
        )
    if sampling.stop:
        raise ValueError(
            f"environment: turns end with their end token, and sampling.stop {list(sampling.stop)} would end them "
            "elsewhere: leave it out"
        )
