"""Self-Instruct (arXiv 2212.10560): a model writes tasks like a few human ones, and a filter keeps the new ones.

As in Alpaca (tatsu-lab/stanford_alpaca, generate_instruction.py), one request brings tasks with input and output, and
shows human examples only.
"""

import re
from collections import Counter
from random import Random
from typing import TypedDict

from modules.predict.instruction_filter import REASONS, InstructionPool
from modules.predict.predict_module import PredictModule
from modules.rewards.chat.protocol import ChatClient, Conversation
from modules.trainer.seeds import run_seed
from modules.types import PromptBatch

LIST_LENGTH = 20  # tasks in a whole list, the examples included
PROMPT = """You are writing exercises for an assistant that reads and writes text and can do nothing else. Make a list of {length} different tasks.

What makes a good list:
- Every task begins with another verb, and the tasks ask for different kinds of work: explaining, rewriting, classifying, planning, inventing.
- Some tasks are questions and some are requests. Each is stated in English, in one or two sentences.
- The assistant can neither look at anything nor make anything but text; it cannot set an alarm or call anyone.
- The input gives what the task needs, with real details instead of placeholders, in at most 100 words. A task that needs none has <noinput> there.
- The output is a right and complete answer to the task with that input, in at most 100 words.

The list so far:

{examples}

Go on with the tasks {first} to {length} in exactly this form, and write a line with nothing but ### behind every task, behind the last one too."""
SEPARATOR = re.compile(r"^[ \t]*###[ \t]*$", re.MULTILINE)
LABEL = re.compile(r"^[ \t]*\d+\.[ \t]*(Instruction|Input|Output):", re.MULTILINE)


class Task(TypedDict):
    """An instruction that was kept."""

    instruction: str
    input: str  # "" = none
    output: str
    most_similar: str  # the most similar instruction among the seeds and those kept before
    similarity: float  # ROUGE-L F1 with that instruction, [0, 1]


class Round(TypedDict):
    """The result of one batch of requests."""

    requests: int
    accepted: list[Task]
    rejected: dict[str, int]  # number of tasks by reason: those of the filter, ``malformed`` and ``unfinished``
    usage: dict[str, float]  # what the client used: tries, tokens, cost


class SelfInstructModule(PredictModule):
    """Asks for lists of new tasks until enough are kept. For ``predict`` alone, and in one process.

    One process is needed because the filter compares each task with all before it. Each request shows
    ``num_in_context`` seeds, drawn by ``seed`` and the number of the request. The reply is cut at lines ``###``. The
    text after the last of them is unfinished and dropped, because a client does not say why an answer ended.

    Which tasks are kept depends only on the answers and their order, not on ``requests_per_round``, except at the end:
    the last round is used whole. A client with a cache answers a repeated request as before, so with few seeds use
    none.

    Args:
        client: the chat model to ask. It needs room for about 3000 tokens and a temperature above 0.
        num_instructions: >= 1, how many instructions are enough.
        num_in_context: seeds shown in a request, 1 to 19; Alpaca: 3.
        max_similarity: [0, 1]; a new instruction is refused if its ROUGE-L F1 to a seed or a kept one is greater.
        requests_per_round: >= 1, requests sent together; a run that is killed loses at most one round.
        patience: >= 1; the run stops after this many requests in a row (whole rounds) without a new instruction.
        seed: draws the examples; None = the run's seed.

    Attributes:
        rounds: the result of each round, from the first on. A writer that resumes fills it.
        fruitless: requests of this run since the last round that brought an instruction.

    Raises:
        ImportError: rapidfuzz is not installed.
        ValueError: a setting is impossible. In ``setup``: there are several processes. At the first batch: there are
            fewer seeds than a request shows, or the client fails (see the client).
    """

    reads = "SeedTasksDataModule"

    def __init__(
        self,
        client: ChatClient,
        num_instructions: int,
        num_in_context: int = 3,
        max_similarity: float = 0.7,
        requests_per_round: int = 8,
        patience: int = 40,
        seed: int | None = None,
    ) -> None:
        if min(num_instructions, requests_per_round, patience) < 1:
            raise ValueError(
                f"num_instructions, requests_per_round and patience must be at least 1, got {num_instructions}, "
                f"{requests_per_round} and {patience}"
            )
        if not 1 <= num_in_context < LIST_LENGTH:
            raise ValueError(
                f"num_in_context must lie in 1..{LIST_LENGTH - 1}, so that a list of {LIST_LENGTH} has new tasks; got "
                f"{num_in_context}"
            )
        InstructionPool([], max_similarity)  # refuses a wrong threshold or a missing package
        super().__init__()
        self.client, self.num_instructions, self.num_in_context, self.max_similarity = (
            client,
            num_instructions,
            num_in_context,
            max_similarity,
        )
        self.requests_per_round, self.patience, self.seed = requests_per_round, patience, run_seed(seed)
        self.rounds: list[Round] = []
        self.fruitless = 0
        self._pool: InstructionPool | None = None  # seeds and the instructions of ``rounds``

    @property
    def num_accepted(self) -> int:
        """How many instructions were kept so far."""
        return sum(len(one["accepted"]) for one in self.rounds)

    @property
    def finished(self) -> bool:
        """Whether enough instructions were kept, or no more are to be expected."""
        return self.num_accepted >= self.num_instructions or self.fruitless >= self.patience

    def setup(self, stage: str) -> None:
        """Refuse several processes before anything is asked."""
        super().setup(stage)
        if self.trainer.world_size > 1:
            ranks = self.trainer.world_size
            raise ValueError(
                f"SelfInstructModule compares each task with all before it, which {ranks} processes cannot; set "
                "trainer.devices to 1"
            )

    def predict_step(self, seeds: PromptBatch, batch_idx: int) -> None:
        """Run one round and add it to ``rounds``, unless the run is finished."""
        if not all("input" in info for info in seeds["info"]):
            raise ValueError(f"{seeds['uid'][0]}: this prompt is no seed task; set data to SeedTasksDataModule")
        if len(seeds["prompt"]) < self.num_in_context:
            raise ValueError(
                f"a request shows {self.num_in_context} seeds and the data hold {len(seeds['prompt'])}; add seeds or "
                "lower num_in_context"
            )
        if self.finished:
            return
        if self._pool is None:
            kept = [task["instruction"] for one in self.rounds for task in one["accepted"]]
            self._pool = InstructionPool([*seeds["prompt"], *kept], self.max_similarity)
        before, asked = self.client.report(), sum(one["requests"] for one in self.rounds)
        answers = self.client.complete(
            [self.conversation(seeds, asked + place) for place in range(self.requests_per_round)]
        )
        accepted, rejected = keep_new_tasks([answer for answer in answers if answer is not None], self._pool)
        usage = {name: value - before.get(name, 0.0) for name, value in self.client.report().items()}
        self.fruitless = 0 if accepted else self.fruitless + len(answers)
        self.rounds.append(Round(requests=len(answers), accepted=accepted, rejected=dict(rejected), usage=usage))

    def conversation(self, seeds: PromptBatch, number: int) -> Conversation:
        """Return the request with this number."""
        drawn = Random(f"{self.seed} {number}").sample(range(len(seeds["prompt"])), self.num_in_context)
        shown = [
            write_task(place, seeds["prompt"][row], seeds["info"][row]["input"], seeds["answer"][row] or "")
            for place, row in enumerate(drawn, start=1)
        ]
        examples = "\n".join(["###", *shown])
        return [
            {
                "role": "user",
                "content": PROMPT.format(length=LIST_LENGTH, examples=examples, first=self.num_in_context + 1),
            }
        ]

    def identity(self) -> dict[str, str | int]:
        """Return what determines the tasks, except their number.

        A writer does not continue a file that was begun with another identity.
        """
        settings = f"{self.num_in_context} in context, similarity {self.max_similarity}, seed {self.seed}"
        return {"client": self.client.identity, "prompt": PROMPT, "settings": settings}

    def summary(self) -> dict[str, float]:
        """Return metrics of all rounds.

        Returns:
            ``instructions`` (kept), ``tasks`` (all that were written, whole or not), ``requests``,
            ``rejected/<reason>``, and what the client used: ``client/requests`` (tries), ``client/failed``, tokens, and
            ``client/cost`` if prices are set.
        """
        rejected = sum((Counter(one["rejected"]) for one in self.rounds), Counter())
        usage: dict[str, float] = {}
        for one in self.rounds:
            for name, value in one["usage"].items():
                usage[name] = usage.get(name, 0.0) + value
        return {
            "instructions": float(self.num_accepted),
            "tasks": float(self.num_accepted + rejected.total()),
            "requests": float(sum(one["requests"] for one in self.rounds)),
            **{f"rejected/{reason}": float(rejected[reason]) for reason in ("unfinished", "malformed", *REASONS)},
            **{f"client/{name}": value for name, value in usage.items()},
        }


def keep_new_tasks(answers: list[str], pool: InstructionPool) -> tuple[list[Task], Counter[str]]:
    """Add the tasks that the filter keeps to the pool.

    Returns:
        the kept tasks, and how many others there were by reason.
    """
    accepted: list[Task] = []
    rejected: Counter[str] = Counter()
    for answer in answers:
        tasks, unusable = read_list(answer)
        rejected += unusable
        for instruction, given, output in tasks:
            reason, similar, score = pool.judge(instruction, output)
            if reason is not None:
                rejected[reason] += 1
                continue
            pool.add(instruction)
            accepted.append(
                Task(instruction=instruction, input=given, output=output, most_similar=similar, similarity=score)
            )
    return accepted, rejected


def read_list(answer: str) -> tuple[list[tuple[str, str, str]], Counter[str]]:
    """Read the whole tasks of a list.

    A task needs one label of each kind, in order. Text before the first label, such as a greeting or a thought, is
    skipped.

    Returns:
        instruction, input ("" = none) and output of each task, and the number of ``malformed`` and ``unfinished``
        pieces.
    """
    text = answer.encode(errors="replace").decode()  # half a character cannot be written to a file, so it becomes "?"
    *whole, last = SEPARATOR.split(text.rpartition("</think>")[2])
    tasks, unusable = [], Counter({"unfinished": 1} if last.strip() else {})
    for piece in whole:
        _, *parts = LABEL.split(piece)
        if parts[0::2] == ["Instruction", "Input", "Output"]:
            instruction, given, output = (part.strip() for part in parts[1::2])
            tasks.append((instruction, "" if given.lower() == "<noinput>" else given, output))
        elif piece.strip():
            unusable["malformed"] += 1
    return tasks, unusable


def write_task(number: int, instruction: str, given: str, output: str) -> str:
    """Write a task in the format of the list."""
    lines = (
        f"{number}. Instruction: {' '.join(instruction.split())}",
        f"{number}. Input:\n{given or '<noinput>'}",
        f"{number}. Output:\n{output}",
        "###",
    )
    return "\n".join(lines)
