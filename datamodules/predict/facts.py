"""Gives questions with short answers, each with several few-shot prompts."""

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from transformers import PreTrainedTokenizerBase

from datamodules.base import RowsDataModule, load_tokenizer
from datamodules.formats.conversation import Asked, add_context, read_prompt
from datamodules.formats.prompt_shapes import as_letter, settle_choices
from datamodules.formats.reading import Cells, Reading, make_plain, take_references
from datamodules.sources import Row, Source
from datamodules.tokens.encoding import encode_prompt
from modules.trainer.seeds import run_seed
from modules.types import PromptBatch

TEMPLATE = "Q: {question}\nA: {answer}\n\n"


@dataclass(frozen=True)
class Fact:
    """One row: a question with its right answers."""

    question: str
    answers: list[str]  # at least one; examples show the first
    relation: str | None
    row: Row


class FactsDataModule(RowsDataModule):
    """Gives ``num_prompts`` few-shot prompts for each fact to ``predict``, once and in order (``PromptBatch``).

    With several ranks, rank r takes fact r and every fact ``world_size`` further on.

    A row holds a question and its answer. The question is ``question``, ``prompt``, ``instruction`` or another known
    name, with ``input`` or without. The answer is ``answer``, ``completion`` or another known name: one line of text,
    or a list of such lines that are all right.

    The examples in a prompt are other rows with the same ``relation`` and another question, drawn by (seed, uid of the
    prompt). Rows without a relation form one relation. ``info`` of a prompt holds

    - ``fact``: the uid of the fact. ``answers``: its right answers.
    - ``row``: the index of the row. ``columns``: the row's own columns.
    - ``data``: a digest of all prompts.

    Args:
        tokenizer: a tokenizer, or a path or hub id; None = the module's.
        train: the rows: a source, or a file, a folder or a hub id.
        columns: our name of a column -> its name in the data.
        batch_size: facts per batch and rank, >= 1. A killed run loses at most one batch.
        num_prompts: prompts per fact, >= 1.
        num_shots: examples in a prompt, >= 0.
        template: text of one fact. It holds ``{question}`` and after it, at the end of a line, ``{answer}``, where the
            prompt stops.
        seed: seed of the examples; None = the run's.

    Raises:
        ValueError: a setting is out of range; in ``setup``, a row is bad, with file and line, before anything is asked.
    """

    batch_type = PromptBatch  # the batches that a module must accept
    purpose, may_drop = "facts", False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        train: str | Source | None = None,
        columns: dict[str, str] | None = None,
        batch_size: int = 16,
        num_prompts: int = 10,
        num_shots: int = 4,
        template: str = TEMPLATE,
        seed: int | None = None,
    ) -> None:
        if min(batch_size, num_prompts) < 1 or num_shots < 0:
            raise ValueError(
                f"batch_size and num_prompts must be at least 1, num_shots at least 0, got {batch_size}, {num_prompts} "
                f"and {num_shots}"
            )
        before, _, after = template.partition("{answer}")
        if (
            before.count("{question}") != 1
            or not after.startswith("\n")
            or "{question}" in after
            or "{answer}" in after
        ):
            raise ValueError(
                f"template must hold {{question}} and after it, at the end of a line, {{answer}}; got {template!r}"
            )
        super().__init__(train, columns)
        self.tokenizer, self.seed = load_tokenizer(tokenizer), run_seed(seed)
        self.batch_size, self.num_prompts, self.num_shots, self.template = batch_size, num_prompts, num_shots, template
        self.facts: list[Fact] = []
        self.prompts: list[list[tuple[str, list[int]]]] = []  # text and tokens of each fact's prompts

    def setup(self, stage: str) -> None:
        """Read and tokenise all rows. Raises ValueError when a row is bad or a relation has too few facts."""
        if self.facts:
            return
        self.take_tokenizer()
        facts = self.encode_rows(self.train, "train", lambda row: read_fact(row, self.reading), lambda _: 0, 0)
        self.prompts = self.build(facts)
        self.check_positions("predict", max(len(ids) for prompts in self.prompts for _, ids in prompts), "num_shots")
        self.facts = facts
        relations = len({fact.relation for fact in facts})
        self.report("facts", f"{relations} relations, {self.num_prompts} prompts each")

    def settle(self, rows: Sequence[Row], stage: str) -> None:
        """Settle how numbers beside options are read."""
        settle_choices(self.reading.rows_with(rows, "options"), self.reading, ("answer", "completion"))

    def build(self, facts: list[Fact]) -> list[list[tuple[str, list[int]]]]:
        """Return text and tokens of each fact's prompts."""
        relations: dict[str | None, list[Fact]] = defaultdict(list)
        for fact in facts:
            relations[fact.relation].append(fact)
        same = Counter((fact.relation, fact.question) for fact in facts)
        built = []
        for fact in facts:
            others, alike = relations[fact.relation], same[fact.relation, fact.question]
            if len(others) - alike < self.num_shots:
                raise ValueError(
                    f"{fact.row.origin}: relation {fact.relation!r} has {len(others) - alike} other questions, but a "
                    f"prompt needs {self.num_shots}: lower data.num_shots, or leave out the relation"
                )
            texts = [
                self.prompt(fact, others, alike, f"{fact.row.origin}#{number}") for number in range(self.num_prompts)
            ]
            built.append([encode_prompt(self.tokenizer, text, fact.row.origin) for text in texts])
        return built

    def prompt(self, fact: Fact, others: list[Fact], alike: int, uid: str) -> str:
        """Return a prompt that ends where the answer begins.

        ``alike`` of the facts in ``others`` ask the same question; they are not used as examples.
        """
        drawn = random.Random(f"{self.seed} {uid}").sample(others, self.num_shots + alike)
        examples = [example for example in drawn if example.question != fact.question][: self.num_shots]
        before, _, behind = self.template.partition("{answer}")
        shots = [before.replace("{question}", example.question) + example.answers[0] + behind for example in examples]
        asked = before.rstrip(" ")  # the space belongs to the first token of the answer
        return "".join(shots) + asked.replace("{question}", fact.question)

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """Return this rank's facts in batches, in order. Raises ValueError when there are fewer facts than ranks."""
        if len(self.facts) < self.world_size:
            raise ValueError(f"{len(self.facts)} facts cannot be shared by {self.world_size} ranks; use fewer ranks")
        texts = [[text for text, _ in prompts] for prompts in self.prompts]
        digest = hashlib.blake2b(
            json.dumps([texts, [fact.answers for fact in self.facts]]).encode(), digest_size=8
        ).hexdigest()
        mine = range(self.rank, len(self.facts), self.world_size)
        batches = [
            self.batch(mine[start : start + self.batch_size], digest) for start in range(0, len(mine), self.batch_size)
        ]
        return self.ready_loader(batches)

    def batch(self, places: range, digest: str) -> PromptBatch:
        """Return the prompts of the facts at these places as a batch."""
        asked = [
            (place, self.facts[place], number, *self.prompts[place][number])
            for place in places
            for number in range(self.num_prompts)
        ]
        return PromptBatch(
            uid=[f"{fact.row.origin}#{number}" for _, fact, number, _, _ in asked],
            prompt=[text for *_, text, _ in asked],
            prompt_ids=[ids for *_, ids in asked],
            answer=[fact.answers[0] for _, fact, *_ in asked],
            source=[fact.row.source for _, fact, *_ in asked],
            info=[
                {
                    "fact": fact.row.origin,
                    "answers": fact.answers,
                    "columns": make_plain(fact.row.columns),
                    "row": place,
                    "data": digest,
                }
                for place, fact, *_ in asked
            ],
        )


def read_fact(row: Row, reading: Reading) -> Fact:
    """Read question, answers and relation of a row.

    Raises ValueError with the row's origin when something is missing or of the wrong type.
    """
    cells = Cells(row, reading)
    found = read_prompt(cells, ("prompt", "instruction", "input"))
    column = next((name for name in ("answer", "completion") if cells.has(name)), None)
    if found is None or column is None:
        raise cells.not_found(
            "a question (prompt, question, instruction, ...) with its answer (answer, completion, ...)"
        )
    question = _question(add_context(cells, found, chat=False), row.origin)
    given = take_references(cells.take_unpacked(column, one_of_several=True), cells.place(column))
    answers = [as_letter(cells, one) for one in (given if isinstance(given, list) else [given])]
    if not answers or not all(isinstance(one, str) and one.strip() and "\n" not in one.strip() for one in answers):
        raise ValueError(
            f"{row.origin}: column {cells.name(column)!r} must hold the answer, one line of text, or a list of such "
            "answers"
        )
    relation = cells.take("relation")
    reading.close(cells, "a question with its answer")
    return Fact(question.strip(), [one.strip() for one in answers], None if relation is None else str(relation), row)


def _question(asked: Asked, origin: str) -> str:
    """Return the prompt as text: a text as it is, messages only if they are a single user message. Raises ValueError
    for others.
    """
    if isinstance(asked.prompt, str):
        return asked.prompt
    if len(asked.prompt) == 1 and asked.prompt[0]["role"] == "user" and not asked.tools:
        return asked.prompt[0]["content"]
    raise ValueError(
        f"{origin}: the prompt is a conversation, and one question was expected, as text or one user message"
    )
