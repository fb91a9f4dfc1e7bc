"""The table of columns: one for all DataModules, with what each name means and who reads it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import takewhile
from typing import Literal, NamedTuple

Purpose = Literal["instruction", "preference", "verifiable", "facts", "seeds"]
MODULES: dict[Purpose, str] = {
    "instruction": "InstructionDataModule",
    "preference": "PreferenceDataModule",
    "verifiable": "VerifiableDataModule",
    "facts": "FactsDataModule",
    "seeds": "SeedTasksDataModule",
}
CHATS: tuple[Purpose, ...] = ("instruction", "preference", "verifiable")
ASKED: tuple[Purpose, ...] = (*CHATS, "facts")
ALL: tuple[Purpose, ...] = (*ASKED, "seeds")
LEARNED: tuple[Purpose, ...] = ("instruction",)
COMPARED: tuple[Purpose, ...] = ("preference",)


@dataclass(frozen=True)
class Column:
    """A column that rows may have. To know one more spelling, add it to ``synonyms``."""

    name: str  # ours; a mapping may have it or a synonym on its left
    synonyms: str  # in the order in which they are looked for; capitals, spaces and hyphens make no difference
    means: str
    used_by: tuple[Purpose, ...]  # DataModules that read it; others refuse a row in which it is not empty
    side: bool = False  # it changes what the rest of the row means, so it is used or refused, never left unread


COLUMNS = (
    Column("messages", "conversations conversation dialogue dialog chat", "a conversation", CHATS),
    Column(
        "prompt",
        "question problem query inputs user user_input user_prompt user_message user_query input_text",
        "what is asked, text or messages",
        ALL,
    ),
    Column("instruction", "instructions", "the same in Alpaca's form: a chat where there is a template", ALL),
    Column("input", "", "what the prompt is about; alone, the prompt", ALL, side=True),
    Column(
        "context",
        "passage background body document article paragraph story evidence",
        "what the prompt is about; alone, the prompt",
        ASKED,
        side=True,
    ),
    Column("documents", "docs passages contexts", "the same: texts, or objects with title and text", ASKED, side=True),
    Column("options", "choices", "the answers to choose from, written below the prompt", ASKED, side=True),
    Column(
        "system",
        "system_prompt system_message sys_prompt system_instruction system_instructions systemprompt system_msg sys",
        "the system message",
        CHATS,
        side=True,
    ),
    Column(
        "history",
        "chat_history conversation_history dialogue_history dialog_history previous_turns previous_messages "
        "context_messages",
        "earlier turns: pairs or messages",
        CHATS,
        side=True,
    ),
    Column(
        "tool_turns",
        "",
        "turns that a predicted completion has behind it; with tools they are no text to learn",
        (),
        True,
    ),
    Column(
        "tools",
        "functions available_tools tool tool_list tool_definitions tool_schemas function_schemas function_definitions "
        "available_functions api_list apis",
        "JSON schemas that the chat template writes",
        CHATS,
        side=True,
    ),
    Column(
        "tool_calls",
        "tool_call function_call function_calls",
        "the calls of tools that the answer makes",
        LEARNED,
        side=True,
    ),
    Column(
        "completion",
        "response output target targets outputs assistant generation generated_solution "
        "assistant_response model_response output_text",
        "what is learned",
        ALL,
    ),
    Column(
        "reasoning",
        "reasoning_content thinking thoughts chain_of_thought cot complex_co_t",
        "what the assistant thinks before it answers",
        ALL,
    ),
    Column(
        "answer",
        "final_answer ground_truth expected_answer correct_answer gold gold_answer golden_answers reference_answer "
        "best_answer possible_answers answer_key correct solution answers reward_model reward_model.ground_truth",
        "the right answer, which rewards check; without a completion, what is learned",
        ASKED,
    ),
    Column("text", "raw_content", "a document, learned whole", LEARNED),
    Column("instances", "", "Self-Instruct's inputs and outputs, the first of which is read", ("instruction", "seeds")),
    Column(
        "chosen",
        "response_j chosen_messages chosen_response chosen_answer chosen_output chosen_completion preferred_output "
        "preferred_response winning_response",
        "the better answer",
        COMPARED,
    ),
    Column(
        "rejected",
        "response_k rejected_messages rejected_response rejected_answer rejected_output rejected_completion "
        "non_preferred_output dispreferred_response losing_response",
        "the worse answer",
        COMPARED,
    ),
    Column("output_1", "", "the first of two answers, see PAIRS", COMPARED),
    Column("output_2", "", "the second", COMPARED),
    Column("completions", "responses candidates", "answers, best first or with ranks, scores or a label", COMPARED),
    Column("ranks", "rankings", "of completions, 0 = best", COMPARED, side=True),
    Column("scores", "ratings", "of completions, high = best", COMPARED, side=True),
    Column(
        "preference",
        "better_response_id safer_response_id winner better preferred overall_preference preference_strength",
        "which of two answers is better",
        COMPARED,
        side=True,
    ),
    Column(
        "label",
        "kto_tag desirable is_desirable thumbs_up",
        "whether an answer is good, or which of two is better",
        COMPARED,
        side=True,
    ),
    Column("labels", "", "which of two answers is better", COMPARED, side=True),
    Column("annotator1", "", "which of two answers a person prefers; the majority counts", COMPARED, side=True),
    Column("annotator2", "", "the same of a second person", COMPARED, side=True),
    Column("annotator3", "", "the same of a third", COMPARED, side=True),
    Column("first_score", "", "the score of the first of two answers, high = better", COMPARED, side=True),
    Column("second_score", "", "the score of the second", COMPARED, side=True),
    Column(
        "chosen_score",
        "score_chosen chosen_rating rating_chosen",
        "the score of the better answer: equal scores are a tie",
        COMPARED,
        side=True,
    ),
    Column(
        "rejected_score",
        "score_rejected rejected_rating rating_rejected",
        "that of the worse answer",
        COMPARED,
        side=True,
    ),
    Column("compared_turn", "", "the number of the answer in a conversation that was compared", COMPARED, side=True),
    Column("margin", "", "how much better the chosen answer should score", COMPARED, side=True),
    Column("strength", "", "a label of how much better it is, which data.margins translates", COMPARED),
    Column("split", "", "which part of the data a row belongs to; rows of others beside train are refused", ALL),
    Column("knowledge", "", "whether a model knows the answer, see data.unknown", ALL),
    Column("relation", "", "facts of one relation are examples for each other", ALL),
    Column("pass_rate", "", "share of sampled answers that are right, for data.keep and data.order", ALL),
    Column("guess_rate", "", "the same without thinking, for data.keep", ALL),
    Column("pass_length", "", "mean tokens of the sampled answers, for data.keep", ALL),
    Column("pass_truncated", "", "share of the sampled answers that are cut off, for data.keep", ALL),
    Column(
        "images",
        "image img imgs picture pictures photo photos image_base64 images_base64 image_bytes videos video audios audio "
        "image_path image_paths image_url image_urls image_file image_files video_path "
        "video_url audio_path audio_url audio_file",
        "what is not text",
        (),
        side=True,
    ),
    Column(
        "weight",
        "sample_weight sample_weights loss_weight loss_weights example_weight importance",
        "how much a row counts; here all count alike",
        (),
        side=True,
    ),
    Column(
        "chat_template_kwargs",
        "chat_template enable_thinking",
        "settings of a template by row; data.chat_template_kwargs are for all rows",
        (),
        side=True,
    ),
)
STEMS = ("output", "response", "answer", "completion", "generation", "conversation", "candidate", "human_ref")
PAIRS = tuple(
    (stem + first, stem + second)
    for first, second in (("_1", "_2"), ("1", "2"), ("_0", "_1"), ("0", "1"), ("_a", "_b"))
    for stem in STEMS
)
OPTIONS = (
    ("", "ABCDEFGHIJ"),
    *(
        (stem, marks)
        for stem in ("option_", "option", "choice_", "choice", "op")
        for marks in ("abcdefghij", "123456789")
    ),
)
TOGETHER = (  # names of a data set -> ours, where it has all of them; alone, they may mean something else
    {"generations": "completions", "ratings": "scores"},  # distilabel
    {"info.post": "prompt", "summaries": "completions", "choice": "preference"},  # TL;DR
    {"question.full_text": "prompt", "score_0": "first_score", "score_1": "second_score"},  # WebGPT
    {"conversation_a": "output_1", "conversation_b": "output_2", "turn": "compared_turn"},  # MT-Bench
)
NESTED = {  # columns that hold an object -> its key that is read as a column, where the row has the others too
    "reward_model": ("ground_truth", ()),
    "info": ("post", ("summaries", "choice")),
    "question": ("full_text", ("score_0", "score_1")),
}
WRITTEN = frozenset(  # our columns in which a number is read as the text that CSV would hold
    ["prompt", "instruction", "input", "context", "system", "completion", "reasoning", "answer", "text"]
    + ["chosen", "rejected", "output_1", "output_2"]
)
NAMED = {column.name: column for column in COLUMNS}
OURS = {name: column.name for column in COLUMNS for name in (column.name, *column.synonyms.split())}
PAIRED = ("output_1", "output_2")


def normalize(name: str) -> str:
    """Spell a name like the table: ``systemPrompt``, ``System Prompt`` and ``system-prompt`` are ``system_prompt``."""
    return re.sub(r"[\s\-]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())).lower()


@cache
def our_names(names: tuple[str, ...]) -> dict[str, str]:
    """Find our name of each column that the table knows, in the order in which the table looks for them.

    Two columns may be a pair of answers, see ``PAIRS``, and some mean something only beside others, see ``TOGETHER``.

    Example: ``("id", "question", "response_a", "response_b")`` gives ``prompt``, ``output_1``, ``output_2``.
    """
    spelled = {normalize(name): name for name in names}
    order = list(OURS)
    mine = sorted((name for name in names if normalize(name) in OURS), key=lambda name: order.index(normalize(name)))
    known = {name: OURS[normalize(name)] for name in mine if OURS[normalize(name)] not in PAIRED}
    for first, second in PAIRS:
        if first in spelled and second in spelled:
            known |= {spelled[first]: PAIRED[0], spelled[second]: PAIRED[1]}
            break
    for pattern in TOGETHER:
        if pattern.keys() <= spelled.keys():
            known |= {spelled[name]: ours for name, ours in pattern.items()}
    return {
        name: ours for name, ours in known.items() if not any(f"{name}.{key}" in known for key, _ in NESTED.values())
    }


def option_columns(names: Iterable[str]) -> list[str]:
    """Find the columns that hold one option each: ``A``, ``B``, ``C``, or ``option_1``, ``option_2``, see ``OPTIONS``.

    A single letter must be a capital, since a, b and c may be coefficients.
    """
    spelled = {(name if len(name) == 1 else normalize(name)): name for name in names}
    for stem, marks in OPTIONS:
        found = [spelled[name] for name in takewhile(spelled.__contains__, (stem + mark for mark in marks))]
        if len(found) > (1 if stem else 2):
            return found
    return []


class Layout(NamedTuple):
    """What the columns of a row are, by their names alone."""

    names: dict[str, list[str]]  # our name -> the data's, in the order of the table; without what is mapped by hand
    options: list[str]  # columns that hold one option each
    left_out: dict[str, str]  # the data's name -> why a mapping leaves it out
    unknown: list[str]  # columns that the table does not know
    asked_by: str | None  # a column for earlier turns, where no column asks; a text in it is the prompt


def lay_out(names: tuple[str, ...], by_hand: Mapping[str, str]) -> Layout:
    """Find what columns with these ``names`` are, beside a mapping from our names to the data's."""
    known = our_names(names)
    mapped = set(by_hand.values())
    ours_of: dict[str, list[str]] = {}
    left_out: dict[str, str] = {}
    for name, ours in known.items():
        if ours in by_hand and name not in mapped:
            left_out[name] = f"{by_hand[ours]!r} is mapped to {ours}" if by_hand[ours] else "by data.columns"
        elif name not in mapped:
            ours_of.setdefault(ours, []).append(name)
    options = option_columns(names)
    if "options" in (*by_hand, *known.values()) or mapped & set(options):
        options = []
    asks = {"prompt", "instruction", "messages", "input", "chosen"} & (by_hand.keys() | set(known.values()))
    asked_by = None if asks else next(iter(ours_of.get("history", [])), None)
    unknown = [name for name in names if name not in (*known, *mapped, *options)]
    return Layout(ours_of, options, left_out, unknown, asked_by)


def check_mapping(columns: Mapping[str, str], purpose: Purpose) -> dict[str, str]:
    """Translate the left side of a mapping to our names.

    Raises ValueError for a name of ours that does not exist or that the DataModule does not read, and for two names
    that mean the same.
    """
    spellings = {name: ours for pair in reversed(PAIRS) for name, ours in zip(pair, PAIRED, strict=True)} | OURS
    known = [name for name, ours in spellings.items() if purpose in NAMED[ours].used_by]
    made: dict[str, str] = {}
    for name, theirs in columns.items():
        ours = spellings.get(normalize(name))
        if ours is None:
            near = get_close_matches(normalize(name), known, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            names = sorted(name for name in NAMED if purpose in NAMED[name].used_by)
            raise ValueError(
                f"columns maps unknown names {name}{meant}; the names on the left may be {', '.join(names)}, or their "
                "synonyms in datamodules/formats/table.py"
            )
        if theirs and purpose not in NAMED[ours].used_by:
            readers = [MODULES[reader] for reader in NAMED[ours].used_by]
            raise ValueError(
                f"columns maps {name} ({NAMED[ours].means}), which {MODULES[purpose]} does not read"
                + (f"; {' and '.join(readers)} would" if readers else "")
            )
        if ours in made:
            raise ValueError(f"columns maps {ours} twice, as {made[ours]!r} and {theirs!r}; keep one of them")
        made[ours] = theirs
    return made


def suggest(names: Iterable[str]) -> str:
    """Suggests, for an error about missing columns, our names that the data may misspell."""
    near = {
        name: get_close_matches(normalize(name), OURS, n=1, cutoff=0.8) for name in names if normalize(name) not in OURS
    }
    said = [f"{found[0]} for {name}" for name, found in near.items() if found]
    return f"; did you mean {', '.join(said)}?" if said else ""
