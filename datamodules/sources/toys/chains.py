"""Chains of operations on one digit, which a small model works out step by step and cannot guess."""

import random
from abc import abstractmethod
from zlib import crc32

from datamodules.sources.source import Row, Source
from datamodules.sources.toys.addition import HELD_OUT_ONE_IN
from modules.trainer.seeds import run_seed

OPERATIONS = {  # sign -> what each of the digits 0 to 9 becomes
    "+": (3, 4, 5, 6, 7, 8, 9, 0, 1, 2),  # v + 3 mod 10
    "-": (9, 0, 1, 2, 3, 4, 5, 6, 7, 8),  # v - 1 mod 10
    "*": (0, 3, 6, 9, 2, 5, 8, 1, 4, 7),  # 3 v mod 10
    "~": (9, 8, 7, 6, 5, 4, 3, 2, 1, 0),  # 9 - v
    "^": (1, 0, 3, 2, 5, 4, 7, 6, 9, 8),  # 0 and 1 exchanged, 2 and 3, ...: not affine, so that sums are no short cut
}
SCRIPTS = {"digits": "0123456789", "letters": "abcdefghij"}


class DrawnChains(Source):
    """Draws chains of operations and the script of each; its subclasses say what a row asks.

    A chain is a digit and operations that are applied from left to right. About one chain in ten is held out by a fixed
    hash, in both scripts, so no held-out chain occurs in training under any seed. Rows are drawn with replacement:
    there are only 50 chains of one operation.

    Args:
        num_examples: rows, >= 1.
        least: fewest operations, >= 1.
        most: most operations. The numbers from ``least`` to ``most`` come in turn, so each has the same share.
        held_out: draw from the held-out chains in place of the training chains.
        seed: seed of the draw; None = the run's. The split does not depend on it.
        mixing: chance of each value of a thought to stand in the other script, [0, 1].
        letters: share of the rows in letters, [0, 1]; the others are in digits.

    Raises:
        ValueError: an argument is out of range.
    """

    name: str  # of the data set, in lower case

    def __init__(
        self,
        num_examples: int,
        least: int = 1,
        most: int = 8,
        held_out: bool = False,
        seed: int | None = None,
        mixing: float = 0.0,
        letters: float = 0.0,
    ) -> None:
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, got {num_examples}")
        if not 1 <= least <= most:
            raise ValueError(f"least must be at least 1 and at most most, got least {least} and most {most}")
        require_shares(mixing=mixing, letters=letters)
        self.num_examples, self.least, self.most, self.held_out = num_examples, least, most, held_out
        self.seed, self.mixing, self.letters = run_seed(seed), mixing, letters

    def rows(self) -> list[Row]:
        """Return ``num_examples`` rows."""
        side = "held-out" if self.held_out else "training"
        draw, rows = random.Random(f"{self.name} {self.seed} {side}"), []
        for index in range(self.num_examples):
            chain = draw_chain(draw, self.least + index % (self.most - self.least + 1), self.held_out)
            script = "letters" if draw.random() < self.letters else "digits"
            columns = self.columns(draw, chain, script)
            rows.append(Row(columns, f"{self.name}-{side}#{index}", self.name, plain=True))
        return rows

    @abstractmethod
    def columns(self, draw: random.Random, chain: str, script: str) -> dict[str, object]:
        """Return the columns of a row about a chain in digits, such as ``7+*``, that is asked in a script."""


class Chains(DrawnChains):
    """Makes problems such as ``7+*=`` with the completion ``<think>7+0*0</think>0``.

    The thought repeats each operation and gives the value behind it. The operations are permutations of the ten digits:
    ``+`` v + 3 mod 10, ``-`` v - 1 mod 10, ``*`` 3 v mod 10, ``~`` 9 - v, ``^`` exchanges 0 and 1, 2 and 3, and so on.
    So no operation forgets the values before it, and a guess is right one time in ten at every length. In letters the
    same problem is ``h+*=`` with ``<think>h+a*a</think>a``.

    Columns ``prompt``, ``completion``, ``answer``, and for rewards and reports ``operations`` (their number),
    ``script`` (``digits`` or ``letters``) and ``thinks`` (whether the completion holds a thought).

    Args:
        num_examples: rows, >= 1.
        least: fewest operations, >= 1.
        most: most operations. The numbers from ``least`` to ``most`` come in turn, so each has the same share.
        held_out: draw from the held-out chains in place of the training chains.
        seed: seed of the draw; None = the run's. The split does not depend on it.
        thoughts: share of the rows with a thought, [0, 1].
        bare: a row without a thought has the completion ``0``, in place of ``<think></think>0``.
        waste: chance, [0, 1), of a check ``?0`` of the last value at the end of a thought, and of each further one.
        mixing: chance of each value of a thought to stand in the other script, [0, 1].
        letters: share of the rows in letters, [0, 1]; the others are in digits.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "chains"

    def __init__(
        self,
        num_examples: int,
        least: int = 1,
        most: int = 8,
        held_out: bool = False,
        seed: int | None = None,
        thoughts: float = 1.0,
        bare: bool = False,
        waste: float = 0.0,
        mixing: float = 0.0,
        letters: float = 0.0,
    ) -> None:
        super().__init__(num_examples, least, most, held_out, seed, mixing, letters)
        require_shares(thoughts=thoughts)
        if not 0 <= waste < 1:
            raise ValueError(f"waste must lie in [0, 1), got {waste}")
        self.thoughts, self.bare, self.waste = thoughts, bare, waste

    def columns(self, draw: random.Random, chain: str, script: str) -> dict[str, object]:
        """Return the problem and its completion."""
        answer = in_script(work_out(chain)[-1], script)
        thinks = draw.random() < self.thoughts
        thought = write_thought(draw, chain, script, self.mixing, self.waste) if thinks else ""
        return {
            "prompt": in_script(chain, script) + "=",
            "completion": answer if self.bare and not thinks else f"<think>{thought}</think>{answer}",
            "answer": answer,
            "operations": len(chain) - 1,
            "script": script,
            "thinks": thinks,
        }


class ChainLessons(DrawnChains):
    """Makes the lessons of a base model that can think about ``Chains`` and seldom does.

    Of the rows, 45 % ask ``7+*:`` and continue ``7+0*0``, which teaches the operations and their order; 30 % ask
    ``7+*:`` and continue ``<think>7+0*0</think>0``, which teaches both in the place of a thought. The others ask
    ``7+*=`` and answer ``0`` at once, but for a share of them with a thought. Columns ``prompt`` and ``completion``.

    Args:
        num_examples: rows, >= 1.
        least: fewest operations, >= 1.
        most: most operations. The numbers from ``least`` to ``most`` come in turn, so each has the same share.
        held_out: draw from the held-out chains in place of the training chains.
        seed: seed of the draw; None = the run's. The split does not depend on it.
        thoughts: share of the rows behind ``=`` with a thought, [0, 1].
        mixing: chance of each value of a worked chain or thought to stand in the other script, [0, 1].
        letters: share of the rows in letters, [0, 1]; the others are in digits.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "chain-lessons"

    def __init__(
        self,
        num_examples: int,
        least: int = 1,
        most: int = 8,
        held_out: bool = False,
        seed: int | None = None,
        thoughts: float = 0.03,
        mixing: float = 0.05,
        letters: float = 0.5,
    ) -> None:
        super().__init__(num_examples, least, most, held_out, seed, mixing, letters)
        require_shares(thoughts=thoughts)
        self.thoughts = thoughts

    def columns(self, draw: random.Random, chain: str, script: str) -> dict[str, object]:
        """Return one lesson."""
        answer = in_script(work_out(chain)[-1], script)
        thought = write_thought(draw, chain, script, self.mixing)
        kind = draw.random()
        if kind < 0.75:
            end, completion = ":", thought if kind < 0.45 else f"<think>{thought}</think>{answer}"
        else:
            end = "="
            completion = f"<think>{thought}</think>{answer}" if draw.random() < self.thoughts else answer
        return {"prompt": in_script(chain, script) + end, "completion": completion}


class WorkedChains(DrawnChains):
    """Makes tasks such as ``7+*:`` with the answer ``7+0*0``: a chain to be worked out in the open, without a thought.

    Columns ``prompt``, ``completion`` and ``answer``, which are the same.

    Args:
        num_examples: rows, >= 1.
        least: fewest operations, >= 1.
        most: most operations. The numbers from ``least`` to ``most`` come in turn, so each has the same share.
        held_out: draw from the held-out chains in place of the training chains.
        seed: seed of the draw; None = the run's. The split does not depend on it.
        mixing: chance of each value to stand in the other script, [0, 1].
        letters: share of the rows in letters, [0, 1]; the others are in digits.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "worked-chains"

    def columns(self, draw: random.Random, chain: str, script: str) -> dict[str, object]:
        """Return the task and its answer."""
        worked = write_thought(draw, chain, script, self.mixing)
        return {"prompt": in_script(chain, script) + ":", "completion": worked, "answer": worked}


def draw_chain(draw: random.Random, operations: int, held_out: bool) -> str:
    """Draw a chain in digits, such as ``7+*``, from the held-out or the training chains."""
    while True:
        chain = str(draw.randrange(10)) + "".join(draw.choices(list(OPERATIONS), k=operations))
        if (crc32(chain.encode()) % HELD_OUT_ONE_IN == 0) == held_out:
            return chain


def work_out(chain: str) -> list[str]:
    """Return the value, a digit, behind each operation of a chain in digits. Example: ``7+*`` -> ``["0", "0"]``."""
    value, values = int(chain[0]), []
    for sign in chain[1:]:
        value = OPERATIONS[sign][value]
        values.append(str(value))
    return values


def in_script(text: str, script: str) -> str:
    """Write the digits of a text in a script. Operations are the same in both."""
    return text.translate(str.maketrans(SCRIPTS["digits"], SCRIPTS[script]))


def write_thought(draw: random.Random, chain: str, script: str, mixing: float = 0.0, waste: float = 0.0) -> str:
    """Write operations and values in turn, ``7+0*0``, with values in the other script and checks drawn by chance."""
    other = "digits" if script == "letters" else "letters"
    thought, value = in_script(chain[0], script), ""
    for sign, digit in zip(chain[1:], work_out(chain), strict=True):
        value = in_script(digit, other if draw.random() < mixing else script)
        thought += sign + value
    while draw.random() < waste:
        thought += "?" + value
    return thought


def require_shares(**shares: float) -> None:
    """Raise ValueError for a share that does not lie in [0, 1]."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {share}")
