"""Environments: what a class must have, how calls are read, and what a model is told when they go wrong."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from programs import Program, run_program

from modules.networks.tiny import tiny_tokenizer
from modules.rollout import Calculator, Environment
from modules.rollout.environment import Episode
from modules.rollout.tool_calls import Call, ToolFormat
from modules.types import PromptBatch

ROOT = Path(__file__).parents[2]
HERMES = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{% if m.role == 'tool' %}user\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}{{ m.role }}\n{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Shop:
    """Sells things; its reward is what was paid."""

    def __init__(self) -> None:
        self.paid = 0.0

    def reset(self, budget: float, place: str = "here") -> str | None:
        self.budget = budget
        return f" You have {budget} {place}."

    def buy(self, thing: str, price: float) -> dict[str, Any]:
        """Buy a thing.

        Args:
            thing: What.
            price: For how much.
        """
        if price > self.budget:
            raise ValueError("too expensive")
        self.paid += price
        return {"bought": thing}

    def wait(self, seconds: float) -> str:
        """Wait.

        Args:
            seconds: How long.
        """
        time.sleep(seconds)
        return "done"

    def count(self) -> str:
        """Count for ever."""
        while True:
            self.paid += 1

    def get_reward(self) -> float:
        return self.paid


def form(environment: Environment, template: str | None = None) -> ToolFormat:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    return ToolFormat(tokenizer, environment.tools(), {2, 4})


def prompts(**info: Any) -> PromptBatch:
    text = "<|im_start|>user\nBuy.<|im_end|>\n<|im_start|>assistant\n"
    return PromptBatch(uid=["row 1"], prompt=[text], prompt_ids=[[5]], answer=["7"], source=["x"], info=[info])


def episode(max_turns: int = 9, timeout: float = 5.0, **info: Any) -> tuple[Episode, ToolFormat]:
    shop = Environment(Shop, max_turns, timeout)
    return Episode(shop, form(shop), prompts(budget=3.0, **info), 0), form(shop)


def told(reply: list[int] | None) -> str:
    """The results in the tokens of a reply."""
    assert reply is not None
    return tiny_tokenizer().decode(reply)


def test_calls_in_a_plain_line() -> None:
    plain = form(Environment(Shop))
    assert not plain.writes_tools
    assert plain.read('I buy.\nbuy("tea", 2)') == [Call("buy", ["tea", 2])]
    assert plain.read('buy("tea", 2) and so on') == plain.read("sell(2)") == plain.read("") == []
    assert plain.read("buy(tea)")[0].problem is not None
    assert plain.read('<think>\nbuy("tea", 2)') == []  # a thought that does not end
    assert told(plain.write([("buy", "o<|im_end|>k")])) == "\n<|im_start|>tool\nok<|im_end|>\n<|im_start|>assistant\n"


def test_calls_of_a_template_that_writes_tools() -> None:
    hermes = form(Environment(Shop), HERMES)
    assert hermes.writes_tools
    two = '<tool_call>\n{"name": "buy", "arguments": {"thing": "tea", "price": 2}}\n</tool_call>'
    assert hermes.read(f"So:\n{two}\n{two}") == [Call("buy", {"thing": "tea", "price": 2})] * 2
    assert hermes.read('buy("tea", 2)') == []
    assert hermes.read("<tool_call>{'name': 1}</tool_call>")[0].problem is not None
    between = "<|im_end|>\n<|im_start|>user\n<tool_response>\n"
    ends = "\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert told(hermes.write([("buy", "a"), ("buy", "b")])) == (
        f"{between.removeprefix('<|im_end|>')}a\n</tool_response>{between}b{ends}"
    )


def test_what_a_tool_returns_and_every_error_is_told_to_the_model() -> None:
    shop, plain = episode()
    assert shop.opening == " You have 3.0 here."
    for turn, said in {
        'buy("tea", 2)': '{"bought": "tea"}',
        'buy("tea", 5)': "error: too expensive",
        'buy("tea")': "error: buy: missing a required argument: 'price'",
        "buy(tea, 2)": "error: the arguments are no JSON",
    }.items():
        assert f"tool\n{said}" in told(shop(turn))
    assert shop("I have tea.") is None
    assert shop.find_reward() == 2.0
    assert shop.answer(Call("steal", {})) == "error: there is no tool 'steal'; the tools are buy, count, wait"


def test_a_tool_that_hangs_costs_its_completion_alone() -> None:
    shop, _ = episode(timeout=0.05)
    start = time.monotonic()
    assert "tool\nerror: wait was not done in 0.05 s" in told(shop("wait(20)"))
    assert "tool\nerror: the environment does not answer any more" in told(shop('buy("tea", 2)'))
    assert time.monotonic() - start < 2 and shop.find_reward() is None


def test_a_tool_that_hangs_in_python_ends() -> None:
    shop, _ = episode(timeout=0.05)
    before = set(threading.enumerate())
    with pytest.warns(UserWarning, match=r"Shop: the tool count was not done in 0.05 s, 1 times so far"):
        assert "error: count was not done in 0.05 s" in told(shop("count()"))
    end = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < end:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before
    told_of = []
    for _ in range(3):  # the second and the fourth call are told, the third is not
        again = Episode(shop.settings, shop.form, prompts(budget=3.0), 0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again("count()")
        told_of.append(len(caught))
    assert told_of == [1, 0, 1] and shop.settings.late == {"count": 4}


HANGS = """
import time

class Calculator:
    def reset(self):
        return None

    def calculate(self, expression: str) -> str:
        '''Work out.

        Args:
            expression: What.
        '''
        print("called", flush=True)
        time.sleep(1e6)
"""
HANGING = ["fit", "--config", str(ROOT / "configs/tiny/tools.yaml"), "--trainer.accelerator=cpu", "--data.val=null"]
HANGING += ["--model.environment.factory=hangs.Calculator", "--trainer.max_epochs=1", "--data.prompts_per_phase=2"]
HANGING += ["--model.num_generations=4", "--trainer.callbacks=Samples", "--trainer.num_sanity_val_steps=0"]


def test_a_run_ends_beside_tools_that_hang(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    end = run_program("-m", "modules", *HANGING, "--model.environment.timeout=0.1", folder=tmp_path, timeout=120)
    assert end.returncode == 0, end.stderr
    assert "warning: environment Calculator: the tool calculate was not done in 0.1 s, 1 times so far" in end.stderr


def test_ctrl_c_ends_a_run_that_waits_for_a_tool(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    with Program("-m", "modules", *HANGING, "--model.environment.timeout=1e5", folder=tmp_path) as run:
        for said in ("called", "a second signal stops it at once"):
            limit = time.monotonic() + 120
            while said not in "".join(run.said()) and run.process.is_alive() and time.monotonic() < limit:
                time.sleep(0.05)
            os.kill(run.process.pid or 0, signal.SIGINT)
        run.process.join(30)
        assert run.process.exitcode == 130, run.said()


def test_a_tool_that_lets_no_other_thread_run_ends_the_process() -> None:
    program = """
import re
from modules.rollout import environment
environment.GRACE = 0.5
environment.call_in_time(lambda: re.match("(a+)+$", "a" * 60 + "b"), 0.1)
"""
    end = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert end.returncode == 1
    assert "Timeout" in end.stderr and "/re/" in end.stderr and "in run" in end.stderr


def test_at_most_so_many_turns() -> None:
    shop, _ = episode(max_turns=3)
    assert [shop('buy("tea", 1)') is None for _ in range(3)] == [False, False, True]
    assert shop.find_reward() == 2.0


def test_a_prompt_is_extended_behind_the_user() -> None:
    shop = Environment(Shop)
    group = [Episode(shop, form(shop), prompts(budget=3.0, place="there"), 0) for _ in range(2)]
    (text,) = prompts()["prompt"]
    assert shop.open_prompt(form(shop), prompts(), 0, group) == text.replace("Buy.", "Buy. You have 3.0 there.")
    group[1].opening = " Other."
    with pytest.raises(ValueError, match="row 1: Shop.reset returned 2 different texts for the completions of one"):
        shop.open_prompt(form(shop), prompts(), 0, group)
    plain = {**prompts(), "prompt": ["Buy"]}
    with pytest.raises(ValueError, match="row 1: model.environment needs prompts that end with a user's message"):
        shop.open_prompt(form(shop), plain, 0, group[:1])
    with pytest.raises(ValueError, match="row 1: Shop.reset asks for budget, and the row has prompt, answer, size"):
        Episode(shop, form(shop), prompts(size=1), 0)


@pytest.mark.parametrize(
    ("expression", "value"),
    [("37*84", "3108"), ("(1+2)*-3", "-9"), ("1/4", "0.25"), ("0.1+0.2", "0.3"), (" 6/3 ", "2")],
)
def test_the_calculator(expression: str, value: str) -> None:
    assert Calculator().calculate(expression) == value


@pytest.mark.parametrize("expression", ["2**9", "x", "abs(1)", "1;2", "1" * 201, "'a'*3", "1/0", "True+1", "(" * 199])
def test_the_calculator_takes_nothing_else(expression: str) -> None:
    calculator = Environment(Calculator)
    answer = Episode(calculator, form(calculator), prompts(), 0).answer(Call("calculate", [expression]))
    assert answer.startswith("error: ")


class NoReset:
    def tool(self) -> str:
        """Do."""
        return ""


class Needy(Shop):
    def __init__(self, url: str) -> None:
        """Needs a URL."""


class Toolless:
    def reset(self) -> None:
        """Do nothing."""


class Undocumented(Toolless):
    def tool(self, x: int) -> int:
        return x


class Unannotated(Toolless):
    def tool(self, x) -> int:  # type: ignore[no-untyped-def]
        """Do.

        Args:
            x: A number.
        """
        return x


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (NoReset, "environment NoReset has no method reset"),
        (Needy, "environment Needy needs url, and is made without arguments"),
        (Toolless, "environment Toolless has no tools"),
        (Undocumented, "environment Undocumented: the tool tool needs a docstring in Google style"),
        (Unannotated, "environment Unannotated: the tool tool needs a docstring in Google style and annotations"),
    ],
)
def test_a_class_that_breaks_the_contract_is_refused(kind: type, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Environment(kind)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "this tokenizer has none"),
        (HERMES.replace("<tool_call>", "<call>"), "the chat template writes a call as .* and only <tool_call>"),
        (
            "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
            "no turns",
        ),
    ],
)
def test_a_template_that_cannot_write_results_or_calls_is_refused(template: str | None, said: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=said):
        ToolFormat(tokenizer, Environment(Shop).tools(), {2, 4})
