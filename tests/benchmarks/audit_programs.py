"""Generated programs for unit tests: right ones in several forms, wrong ones, and ones that try to pass unworked."""

from collections.abc import Iterator
from random import Random

from audit_cases import Case

# name -> (parameters, what it should do, right bodies, wrong bodies, assertions about ``candidate``)
TASKS: dict[str, tuple[str, str, list[str], list[str], list[str]]] = {
    "add": (
        "a, b", "Return the sum.", ["return a + b", "return sum([a, b])"], ["return a - b", "return a + b + 1", "return a"],
        ["candidate(2, 3) == 5", "candidate(-1, 1) == 0", "candidate(10, 0) == 10"],
    ),
    "turn_round": (
        "text", "Return the text backwards.", ["return text[::-1]", "return ''.join(reversed(text))"],
        ["return text", "return text[:-1]", "return sorted(text)"],
        ["candidate('abc') == 'cba'", "candidate('') == ''", "candidate('xy') == 'yx'"],
    ),
    "is_prime": (
        "n", "Return whether n is prime.",
        ["return n > 1 and all(n % d for d in range(2, n))", "if n < 2:\n    return False\nfor d in range(2, int(n ** 0.5) + 1):\n    if n % d == 0:\n        return False\nreturn True"],
        ["return n % 2 == 1", "return all(n % d for d in range(2, n))", "return n > 1"],
        ["candidate(7)", "not candidate(1)", "not candidate(9)", "candidate(2)"],
    ),
    "count_vowels": (
        "text", "Count a, e, i, o and u.", ["return sum(sign in 'aeiou' for sign in text)", "return len([c for c in text if c in 'aeiou'])"],
        ["return len(text)", "return text.count('a')", "return len(set(text) & set('aeiou'))"],
        ["candidate('banana') == 3", "candidate('xyz') == 0", "candidate('education') == 5"],
    ),
    "largest": (
        "numbers", "Return the largest number, None for an empty list.", ["return max(numbers, default=None)", "return sorted(numbers)[-1] if numbers else None"],
        ["return max(numbers)", "return min(numbers, default=None)", "return numbers[-1] if numbers else None"],
        ["candidate([1, 9, 3]) == 9", "candidate([]) is None", "candidate([-2, -5]) == -2"],
    ),
    "fibonacci": (
        "n", "Return the n-th Fibonacci number, of which the first two are 0 and 1.", ["a, b = 0, 1\nfor _ in range(n):\n    a, b = b, a + b\nreturn a"],
        ["a, b = 1, 1\nfor _ in range(n):\n    a, b = b, a + b\nreturn a", "return n"],
        ["candidate(0) == 0", "candidate(1) == 1", "candidate(10) == 55"],
    ),
    "distinct": (
        "items", "Return the items without repetitions, in order.", ["return list(dict.fromkeys(items))", "found = []\nfor item in items:\n    if item not in found:\n        found.append(item)\nreturn found"],
        ["return sorted(set(items), reverse=True)", "return items", "return list(items)[:2]"],
        ["candidate([2, 1, 2, 3]) == [2, 1, 3]", "candidate([]) == []", "candidate(['b', 'b']) == ['b']"],
    ),
}  # fmt: skip
# Programs that do no work; {name} is the function that is asked for.
TRICKS = {
    "ends early": "import sys\nsys.exit(0)",
    "ends at once": "import os\nos._exit(0)",
    "ends in the function": "import os\ndef {name}(*given):\n    os._exit(0)",
    "says that it passed": "print('all tests passed')\ndef {name}(*given):\n    print('+')",
    "equals everything": "class Same:\n    def __eq__(self, other):\n        return True\n    def __bool__(self):\n        return True\ndef {name}(*given):\n    return Same()",
    "changes the error": "import builtins\nbuiltins.AssertionError = BaseException\ndef {name}(*given):\n    return None",
    "defines the check": "def check(candidate):\n    pass\ndef {name}(*given):\n    return None",
    "crashes": "def {name}(*given):\n    raise MemoryError",
    "recurses": "def {name}(*given):\n    return {name}(*given)",
    "does not parse": "def {name}(*given)\n    return 1",
    "other name": "def other(*given):\n    return 1",
    "no program": "I cannot write this.",
    "empty": "",
}


def indent(body: str) -> str:
    """Return the body of a function, four spaces deep."""
    return "".join(f"    {line}\n" for line in body.splitlines())


def program_cases(rng: Random, rounds: int = 3) -> Iterator[Case]:
    """Yield programs for rows with HumanEval's columns."""
    for name, (parameters, does, right, wrong, assertions) in TASKS.items():
        head = f'def {name}({parameters}):\n    """{does}"""\n'
        test = "def check(candidate):\n" + "".join(f"    assert {line}\n" for line in assertions)
        info = {"prompt": head, "test": test, "entry_point": name}
        for label, bodies in ((1.0, right), (0.0, wrong)):
            for _ in range(rounds):
                whole = head + indent(rng.choice(bodies))
                other = head + indent(rng.choice(wrong if label else right))
                forms = {
                    "plain": whole,
                    "fenced": f"Here it is:\n```python\n{whole}```\nIt loops.",
                    "goes on with the prompt": indent(rng.choice(bodies)),
                    "last of two blocks": f"```python\n{other}```\nBetter:\n```python\n{whole}```",
                    "after thinking": f"<think>\n```python\n{other}```\n</think>\n```python\n{whole}```",
                    "with a helper": f"```\ndef same(value):\n    return value\n\n{whole}```",
                }
                yield from (
                    Case(f"{'right' if label else 'wrong'}, {form}", text, label, info=info)
                    for form, text in forms.items()
                )
        yield Case(
            "wrong, only in the thinking",
            f"<think>\n```python\n{head}{indent(right[0])}```\n</think>\nDone.",
            0.0,
            info=info,
        )
        for kind, text in TRICKS.items():
            yield Case(f"wrong, {kind}", text.format(name=name), 0.0, info=info)
