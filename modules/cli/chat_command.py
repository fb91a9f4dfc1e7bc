"""The command ``python -m modules chat --policy FOLDER``: asks a model from the terminal or from a pipe."""

import sys
from collections.abc import Iterator
from typing import Any, Literal

from transformers import AutoConfig, AutoTokenizer

from modules.cli.parser import Parser
from modules.functional.ranges import check_numbers
from modules.functional.thoughts import set_in_template
from modules.networks.loading import is_classifier
from modules.networks.policy import Policy
from modules.rewards.learned import LearnedReward
from modules.rollout.engine import InProcessEngine
from modules.rollout.sampling import Sampling
from modules.types import ALPACA_PROMPT, Completion, Rollout, make_printable

Form = Literal["chat", "alpaca", "text"]
SAID: dict[Form, str] = {
    "chat": "a conversation, by the chat template",
    "alpaca": "each line is an instruction in Alpaca's prompt",
    "text": "it continues each line",
}


def chat(
    policy: str,
    form: Form | None = None,
    max_completion_length: int = 256,
    temperature: float = 0.0,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> None:
    """Answer each line that is typed. An empty line begins a new conversation, and Ctrl-D ends.

    With a reward model one types a prompt and an answer, and gets the score.

    Args:
        policy: ``tiny``, a Hugging Face folder such as the export of a run, a GGUF file or a hub id.
        form: how the model reads a line: as a turn of a ``chat`` in the chat template, as the instruction in
            ``alpaca``'s prompt, or as a ``text`` to continue. None = chat if there is a template, else text.
        max_completion_length: tokens of an answer.
        temperature: of the sampling; 0 = greedy.
        chat_template_kwargs: variables that the chat template is given, such as ``{enable_thinking: false}``.

    Raises:
        ValueError: a number is out of range, or an option does not fit the model.
    """
    check_numbers(
        "chat", temperature=(temperature, "[0, inf)"), max_completion_length=(max_completion_length, "[1, inf)")
    )
    if holds_classifier(policy):
        if chat_template_kwargs:
            raise ValueError(
                f"'{policy}' is a reward model, which scores with its own template: leave chat_template_kwargs out"
            )
        score_lines(policy)
        return
    model, engine = Policy(policy, dropout=False), InProcessEngine()
    engine.sync_weights(model, 0)
    form = form or ("chat" if model.tokenizer.chat_template is not None else "text")
    if form == "chat" and model.tokenizer.chat_template is None:
        raise ValueError(f"'{policy}' has no chat template: --form text or --form alpaca")
    if chat_template_kwargs and form != "chat":
        raise ValueError(f"chat_template_kwargs are settings of a chat template, and --form {form} uses none")
    if chat_template_kwargs:
        model.tokenizer.chat_template = set_in_template(model.tokenizer.chat_template, chat_template_kwargs)
    say(f"{policy}: {SAID[form]}; Ctrl-D ends")
    messages: list[dict[str, str]] = []
    for number, line in enumerate(read_lines("> ")):
        if not line:
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        text = ALPACA_PROMPT.format(instruction=line) if form == "alpaca" else line
        prompt = model.prompt_ids(messages) if form == "chat" else encode_line(model, text)
        positions = model.max_positions
        room = max_completion_length if positions is None else min(max_completion_length, positions - len(prompt))
        if room < 1:
            say("the conversation is too long for the model; type an empty line to begin a new one")
            continue
        sampling = Sampling(temperature=temperature, max_completion_length=room)
        answer = engine.generate([prompt], 1, sampling, [number])[0][0].text
        print(make_printable(answer), flush=True)
        messages.append({"role": "assistant", "content": answer})


def score_lines(path: str) -> None:
    """Print the score of each pair of lines, a prompt and an answer."""
    reward, tokenizer = LearnedReward(path), AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    say(f"{path}: a reward model; type a prompt, then an answer; Ctrl-D ends")
    for prompt in read_lines("prompt> "):
        answer = next(read_lines("answer> "), None)
        if answer is None:
            return
        if tokenizer.chat_template is not None:
            turn = [{"role": "user", "content": prompt}]
            prompt = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        rollout = Rollout("chat", prompt, [], None, Completion([], [], answer, "stop"), 0, {}, None)
        print(reward([rollout])[0], flush=True)


def holds_classifier(policy: str) -> bool:
    """Return whether a folder or hub id holds a reward model."""
    try:
        return is_classifier(AutoConfig.from_pretrained(policy, trust_remote_code=False))
    except (OSError, ValueError):
        return False  # a built-in model, a GGUF file, or something that ``Policy`` refuses


def encode_line(model: Policy, text: str) -> list[int]:
    """Encode a text that the model continues."""
    ids = list(model.tokenizer(text, verbose=False).input_ids)
    return ids[:-1] if ids and ids[-1] == model.tokenizer.eos_token_id else ids


def read_lines(prompt: str) -> Iterator[str]:
    """Read lines from standard input; ``prompt`` is shown in a terminal only."""
    while True:
        if sys.stdin.isatty():
            print(prompt, end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")


def say(text: str) -> None:
    """Print a message to standard error; standard output gets the answers only."""
    print(text, file=sys.stderr, flush=True)


def run_chat(args: list[str]) -> None:
    """Run the command with its arguments."""
    parser = Parser(prog="python -m modules chat", description="Ask a model.")
    parser.add_function_arguments(chat, as_positional=False)
    chat(**parser.parse_args(args).as_dict())
