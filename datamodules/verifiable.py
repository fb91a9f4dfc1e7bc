"""Prompts with checkable answers, for methods that sample their own completions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from datamodules.base import AlignDataModule, HasEngine, HasTools
from datamodules.curriculum.difficulty import Difficulty
from datamodules.curriculum.orders import LearningOrder, PromptOrder
from datamodules.formats.lessons import HasTeacher, Lessons
from datamodules.formats.prompt_shapes import VerifiableExample, asked_columns, settle_choices, verifiable_example
from datamodules.formats.reading import make_plain
from datamodules.loaders.phase_loader import PhaseLoader, draw_from_stream
from datamodules.loaders.ptx import PtxStream
from datamodules.loaders.step_sampler import MicroBatch
from datamodules.sources import PreferencePrompts, Row, Source
from datamodules.tokens.encoding import Dialogue, Tokens, Tools, encode_prompt, is_rendered
from modules.functional.thoughts import EMPTY_BLOCK, asks_for_thought
from modules.trainer.ranks import from_all_ranks
from modules.types import AskedRow, InstructionBatch, PromptBatch, require_accuracy


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt."""

    text: str  # as rendered
    ids: list[int]
    example: VerifiableExample
    columns: dict[str, Any] = field(default_factory=dict)  # of the raw row
    thinks: bool | None = None  # see ``PromptBatch``
    completion_ids: list[int] | None = None  # the row's own completion, for a module that learns from it
    teacher_ids: list[int] | None = None  # the prompt that its conditioned teacher reads


class VerifiableDataModule(AlignDataModule):
    """Phases of prompts (``PromptBatch``) for training, and held-out prompts in order.

    Rows hold ``prompt`` or ``question`` (text or messages) with ``answer``, ``solution`` or ``ground_truth``; other
    columns travel in ``info``. A row of a prompt alone, or whose answer is null, is for rewards that need none. Prompts
    of preference rows: ``PreferencePrompts``.

    Args:
        tokenizer: a tokenizer, or a path or hub id; None = the module's.
        train: training rows: a source, or a file, a folder or a hub id.
        val: held-out rows, or a share of the training rows to hold out, in (0, 1).
        columns: our name of a column -> its name in the data.
        system: system message in front of every chat that has none.
        chat: text prompts are user messages of the chat template. None = where the tokenizer has one, unless their
            source says that they are plain (sums, for one).
        max_prompt_length: tokens.
        drop_long: drop longer prompts and count them; False makes them an error.
        on_bad_row: ``drop`` leaves out rows that cannot be read and counts them in ``bad``.
        prompts_per_phase: prompts of a phase over all ranks; a multiple of ranks x updates of a pass if there are
            several ranks.
        updates_per_phase: optimiser updates from one phase's rollouts, a multiple of ``inner_epochs``.
        inner_epochs: passes over one phase's rollouts.
        val_batch_size: held-out prompts per batch and rank.
        ptx: texts for every update, which the policy must not forget, for methods that learn from them (PPO-ptx).
        keep: train only on prompts whose measured difficulty lies in bounds; held-out prompts stay as they are.
        order: which prompts a phase draws; None = all rows, shuffled anew for each pass.
        chat_template_kwargs: variables that the chat template is given, such as ``{enable_thinking: false}``, which
            opens each answer with an empty thought (Qwen3).
        seed: of the shuffles; None = the run's.

    Raises:
        ValueError: naming file and line, in ``setup``, before the first step.
    """

    batch_type = PromptBatch  # what a module must read
    purpose = "verifiable"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        train: str | Source | None = None,
        val: float | str | Source | None = None,
        columns: dict[str, str] | None = None,
        system: str | None = None,
        chat: bool | None = None,
        max_prompt_length: int = 512,
        drop_long: bool = True,
        on_bad_row: Literal["raise", "drop"] = "raise",
        prompts_per_phase: int = 32,
        updates_per_phase: int = 1,
        inner_epochs: int = 1,
        val_batch_size: int = 64,
        ptx: PtxStream | None = None,
        keep: Difficulty | None = None,
        order: PromptOrder | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        if min(prompts_per_phase, val_batch_size, max_prompt_length) < 1:
            raise ValueError(
                "prompts_per_phase, val_batch_size and max_prompt_length must be at least 1, "
                f"got {prompts_per_phase}, {val_batch_size} and {max_prompt_length}"
            )
        super().__init__(tokenizer, train, val, columns, drop_long, on_bad_row, seed)
        self.system, self.chat, self.max_prompt_length = system, chat, max_prompt_length
        self.chat_template_kwargs = chat_template_kwargs
        self.prompts_per_phase, self.updates_per_phase, self.inner_epochs = (
            prompts_per_phase,
            updates_per_phase,
            inner_epochs,
        )
        self.val_batch_size, self.ptx, self.keep, self.order = val_batch_size, ptx, keep, order
        self.measures = dict.fromkeys([*(keep.columns if keep else ()), *(order.columns if order else ())])
        self.train_prompts: list[Prompt] = []
        self.val_prompts: list[Prompt] = []
        self._rows: dict[str, int] = {}  # origin -> row, for an order that learns
        self._loader: PhaseLoader | None = None
        self._snapshot: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Tokenise all prompts once; bad rows and a phase that the ranks cannot share fail here."""
        self._loader, self._snapshot = None, None
        self.prepare(stage)
        module = self.trainer.lightning_module if self.trainer else None
        if self.chat_template_kwargs and getattr(module, "environment", None) is not None:
            raise ValueError(
                "data.chat_template_kwargs do not reach the turns behind results of tools, which model.environment "
                "writes: leave one of them out, or set the variables in the model's chat_template.jinja"
            )
        shares = self.world_size * max(1, self.updates_per_phase // max(1, self.inner_epochs))
        if self.world_size > 1 and self.prompts_per_phase % shares:
            raise ValueError(
                f"prompts_per_phase ({self.prompts_per_phase}) must be a multiple of {shares}: {self.world_size} ranks "
                f"share each of the {shares // self.world_size} updates of a pass equally"
            )
        if not self.train_prompts:
            self.train_prompts = self._load(self.train, "train")
        if self.val is not None and not self.val_prompts:
            self.val_prompts = self._load(self.val, "val")
        if self.ptx is not None:
            self.ptx.setup(self, stage)
        if self.order is not None and stage == "fit":
            self.order.begin([prompt.example for prompt in self.train_prompts], self.seed)
            if isinstance(self.order, LearningOrder):
                self._prepare_learning(type(self.order).__name__)

    def draw(self, number: int) -> PromptBatch:
        """Draw this rank's prompts of stretch ``number`` (>= 0), which is dealt to the ranks in turn.

        Without ``order`` the rows, shuffled anew for each pass by (seed, pass), form one endless stream.
        """
        if self.order is None:
            first = number * self.prompts_per_phase
            places = range(first + self.rank, first + self.prompts_per_phase, self.world_size)
            drawn = draw_from_stream(places, len(self.train_prompts), self.seed)
        else:
            drawn = self.order.draw(number, self.prompts_per_phase)[self.rank :: self.world_size]
        return prompt_batch([(self.train_prompts[row], instance) for row, instance in drawn])

    def learn(self) -> None:
        """Tell ``order`` how often each prompt of the phase was answered right, on all ranks (collective)."""
        assert isinstance(self.order, LearningOrder) and self.trainer is not None
        right, judged = Counter[int](), Counter[int]()
        for outcome in require_accuracy(self.trainer.lightning_module, "data.order").find_outcomes():
            row = self._rows.get(outcome.uid.rpartition("#")[0])
            if row is not None and outcome.right is not None:
                right[row] += outcome.right
                judged[row] += 1
        counts: dict[int, tuple[int, int]] = {}
        for row, one, other in from_all_ranks([(row, right[row], judged[row]) for row in judged]):
            before = counts.get(row, (0, 0))
            counts[row] = before[0] + one, before[1] + other
        self.order.learn(counts)

    def prompt_rows(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the uid in ``predict`` and the columns of each training prompt, in order."""
        return [(f"{prompt.example.origin}#0", make_plain(prompt.columns)) for prompt in self.train_prompts]

    def asked_rows(self) -> list[AskedRow]:
        """Return each training row without what answered it, in order; see :func:`asked_columns`."""
        return [
            AskedRow(
                f"{prompt.example.origin}#0",
                prompt.text,
                make_plain(asked_columns(prompt.columns, self.columns, prompt.example.answer)),
                prompt.text != prompt.example.prompt,
                read_question(prompt.example.prompt),
            )
            for prompt in self.train_prompts
        ]

    def held_out_questions(self) -> list[str]:
        """Return the text of each held-out prompt, or the last message of its user."""
        return [read_question(prompt.example.prompt) for prompt in self.val_prompts]

    def every_prompt(self) -> PromptBatch:
        """Return all prompts for training and the held-out ones as one batch, the same on every rank."""
        return self.batch_of([*self.train_prompts, *self.val_prompts])

    def batch_of(self, prompts: Sequence[Prompt]) -> PromptBatch:
        """Give some prompts as a batch."""
        return prompt_batch([(prompt, 0) for prompt in prompts])

    def in_other_form(self, prompt: Prompt) -> Prompt | None:
        """Write a plain text as one user message of the chat template, and one user message as plain text.

        None where there is no other form: without a chat template, for several turns, for a text that is rendered.
        """
        asked = prompt.example.prompt
        if self.tokenizer.chat_template is None:
            return None
        chat = not isinstance(asked, str) or prompt.text != asked
        if not isinstance(asked, str):
            turns = [message for message in asked if message["role"] != "system"]
            asked = turns[0]["content"] if [turn["role"] for turn in turns] == ["user"] else ""
        if not asked or is_rendered(self.tokenizer, asked):
            return None
        origin, system = prompt.example.origin, None if chat else self.system
        return Prompt(*encode_prompt(self.tokenizer, asked, origin, not chat, system), prompt.example)

    def draw_texts(self, update: int, micro_batch: int) -> InstructionBatch:
        """Draw this rank's texts of a micro-batch of an update, counted from the start of training."""
        assert self.ptx is not None and self.trainer is not None
        return self.ptx.batch(
            update, micro_batch * self.world_size + self.rank, self.trainer.accumulate_grad_batches * self.world_size
        )

    def train_dataloader(self) -> PhaseLoader:
        """Give one rollout phase per epoch."""
        if self.trainer is None:
            raise ValueError("the training loader needs a Trainer, whose epochs are the phases; use trainer.fit")
        texts = self.draw_texts if self.ptx is not None else None
        learn = self.learn if isinstance(self.order, LearningOrder) else None
        self._loader = PhaseLoader(
            self.trainer, self.draw, self.updates_per_phase, self.inner_epochs, self.seed, texts, learn
        )
        self._restore()
        return self._loader

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Give the held-out prompts in order. Ranks take turns, and each gets as many batches."""
        return self._in_order(self.val_prompts) if self.val_prompts else []

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Give the held-out prompts."""
        return self.val_dataloader()

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """Give the training prompts once, in order, to filter them or to sample data from them."""
        return self._in_order(self.train_prompts)

    @property
    def domains(self) -> Mapping[str, list[Tokens]]:
        """The packed held-out texts of ``ptx`` by domain, ``val`` where they are one set."""
        return self.ptx.domains if self.ptx is not None else {}

    def domain_loader(self, name: str) -> DataLoader[MicroBatch]:
        """Give this rank's share of one domain's texts, in order, in as many batches on every rank."""
        assert self.ptx is not None
        return self.ptx.domain_loader(name)

    def state_dict(self) -> dict[str, Any]:
        """Return the phase loader's snapshot, what ``order`` learned, and the checksums of the rows and of the texts
        of ``ptx``.
        """
        if self._loader is None:
            return {}
        texts = {"ptx_content": self.ptx.content} if self.ptx is not None else {}
        order = {"order": self.order.state_dict()} if isinstance(self.order, LearningOrder) else {}
        return {"phase_loader": self._loader.snapshot(), "content": self.content, **texts, **order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the loader, or keep the state until there is one."""
        self._snapshot = state_dict["phase_loader"]
        self.compare_content(state_dict)
        if isinstance(self.order, LearningOrder) and "order" in state_dict:
            self.order.load_state_dict(state_dict["order"], state_dict["content"] == self.content)
        self._restore()

    def compare_content(self, state: Mapping[str, Any]) -> None:
        """Warn when the training rows or the texts of ``ptx`` are not those of a checkpoint's state."""
        texts = self.ptx.content if self.ptx is not None else 0
        if texts and state.get("ptx_content", texts) != texts:
            self.warn_of_other_rows()
        else:
            super().compare_content(state)

    def encode(self, row: Row) -> Prompt:
        """Encode one raw row. Raises ValueError with the row's origin."""
        chat, lessons = self.is_chat(row), self.find_lessons()
        example = verifiable_example(row, self.reading, chat, list(self.measures), lessons.columns)
        self.say_chat(row, isinstance(example.prompt, str))
        tools = self.find_tools(example)
        text, ids = encode_prompt(self.tokenizer, example.prompt, row.origin, chat, self.system, tools)
        prompt = Prompt(text, ids, example, row.columns, self.find_mode(example, text))
        if lessons.completions is not None:
            prompt = replace(prompt, completion_ids=lessons.encode_completion(self.tokenizer, text, ids, row))
        if lessons.condition is not None:
            asked = lessons.ask_teacher(self.tokenizer, example.prompt, row)
            _, seen = encode_prompt(self.tokenizer, asked, row.origin, chat, self.system, tools)
            prompt = replace(prompt, teacher_ids=seen)
        return prompt

    def find_mode(self, example: VerifiableExample, text: str) -> bool | None:
        """Tell whether a prompt, rendered as ``text``, asks for a thought; None = nothing is said."""
        if EMPTY_BLOCK.search(text):
            return False
        system = self.system if self.system and self.system in text else ""
        setting = (self.chat_template_kwargs or {}).get("enable_thinking")
        said = (asks_for_thought(example.prompt), asks_for_thought(system), None if setting is None else bool(setting))
        return next((mode for mode in said if mode is not None), None)

    def find_lessons(self) -> Lessons:
        """Find what a module that learns from a teacher reads of the rows beside their prompts."""
        module = self.trainer.lightning_module if self.trainer else None
        return Lessons(module.completions, module.condition) if isinstance(module, HasTeacher) else Lessons()

    def find_tools(self, example: VerifiableExample) -> Tools | None:
        """Find the tools that a prompt tells: the row's, or those of the module's environment."""
        module = self.trainer.lightning_module if self.trainer else None
        own = module.tools if isinstance(module, HasTools) else None
        if own and example.tools:
            raise ValueError(
                f"{example.origin}: the row has tools, and model.environment brings its own: leave one of them out"
            )
        return own or example.tools

    def read(self, source: str | Source) -> list[Row]:
        """Read the rows of a source, and prompts of preferences as the tokenizer reads them."""
        if isinstance(source, PreferencePrompts) and source.chat is None:
            source.chat = self.tokenizer.chat_template is not None
        return super().read(source)

    def settle(self, rows: Sequence[Row], stage: str) -> None:
        """Settle how numbers beside options are read."""
        settle_choices(self.reading.rows_with(rows, "options"), self.reading)

    def _restore(self) -> None:
        if self._loader is not None and self._snapshot is not None:
            self._loader.restore(self._snapshot)

    def _prepare_learning(self, who: str) -> None:
        """Find the row of each origin. Raises ValueError if outcomes would be unknown or belong to several rows."""
        if self.trainer is not None:
            module = self.trainer.lightning_module
            require_accuracy(module, f"data.order {who}")
            engine: Any = module.engine if isinstance(module, HasEngine) else None
            if engine is not None and engine.max_staleness > 0:
                raise ValueError(
                    f"data.order {who} learns from a phase before it draws the next, and max_staleness of the engine "
                    f"({engine.max_staleness}) has the next sampled before: set it to 0 or take another order"
                )
            if isinstance(module, HasTeacher) and module.on_policy == 0:
                raise ValueError(
                    f"data.order {who} learns from the answers that the policy samples, and with model.on_policy 0 it "
                    "samples none: use EasyToHard or HarderLater, or raise model.on_policy"
                )
        origins = Counter(prompt.example.origin for prompt in self.train_prompts)
        name, count = origins.most_common(1)[0]
        if count > 1:
            raise ValueError(
                f"data.order {who} keeps account of each row by its name, and {count} training rows are called {name}; "
                "read every file once"
            )
        self._rows = {prompt.example.origin: row for row, prompt in enumerate(self.train_prompts)}

    def _load(self, source: str | Source, stage: str) -> list[Prompt]:
        prompts = self.encode_rows(source, stage, self.encode, count_tokens_to_read, self.max_prompt_length)
        if stage == "train" and self.keep is not None:
            prompts, left_out = self.keep.split(prompts, lambda prompt: prompt.example)
            for reason, count in left_out.items():
                self.reading.drop(reason, count)
        self.check_positions(stage, max(map(count_tokens_to_read, prompts)), "max_prompt_length")
        self.report(stage, f"{sum(len(prompt.ids) for prompt in prompts) / len(prompts):.0f} tokens a prompt")
        return prompts

    def _in_order(self, prompts: list[Prompt]) -> DataLoader[PromptBatch]:
        smallest = len(prompts) // self.world_size
        if smallest == 0:
            raise ValueError(
                f"{len(prompts)} held-out prompts cannot be shared by {self.world_size} ranks; use fewer ranks or more "
                "prompts"
            )
        mine = prompts[self.rank :: self.world_size]
        largest = -(-len(prompts) // self.world_size)
        parts = min(-(-largest // self.val_batch_size), smallest)  # no batch is empty on any rank
        cuts = [part * len(mine) // parts for part in range(parts + 1)]
        batches = [prompt_batch([(prompt, 0) for prompt in mine[cuts[part] : cuts[part + 1]]]) for part in range(parts)]
        return self.ready_loader(batches)


def prompt_batch(prompts: list[tuple[Prompt, int]]) -> PromptBatch:
    """Make one batch of prompts, each with the number of the pass that draws it."""
    batch = PromptBatch(
        uid=[f"{prompt.example.origin}#{number}" for prompt, number in prompts],
        prompt=[prompt.text for prompt, _ in prompts],
        prompt_ids=[prompt.ids for prompt, _ in prompts],
        answer=[prompt.example.answer for prompt, _ in prompts],
        source=[prompt.example.source for prompt, _ in prompts],
        info=[prompt.example.info for prompt, _ in prompts],
        thinks=[prompt.thinks for prompt, _ in prompts],
    )
    completions = [prompt.completion_ids for prompt, _ in prompts if prompt.completion_ids is not None]
    seen = [prompt.teacher_ids for prompt, _ in prompts if prompt.teacher_ids is not None]
    if completions:
        batch["completion_ids"] = completions
    if seen:
        batch["teacher_prompt_ids"] = seen
    return batch


def read_question(prompt: Dialogue) -> str:
    """Return a text prompt, or the last message of the user in a conversation; "" without one."""
    if isinstance(prompt, str):
        return prompt
    return next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")


def count_tokens_to_read(prompt: Prompt) -> int:
    """Count the tokens of a prompt, or of what a conditioned teacher reads in its place if that is longer."""
    return max(len(prompt.ids), len(prompt.teacher_ids or []))
