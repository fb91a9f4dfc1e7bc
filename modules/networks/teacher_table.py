"""A teacher's probabilities for given completions, written to a folder once, so that training needs no teacher in
memory.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modules.functional.masked import pad_rows
from modules.losses.distillation import Buckets
from modules.trainer.ranks import from_all_ranks
from modules.trainer.saving import naming, replacing
from modules.types import PolicyBatch

LESSONS = 64  # lessons in a file
BLOCKS, BLOCK = 16, 4096  # blocks of a weight file that its digest reads, and their bytes

Lesson = tuple[tuple[int, ...], tuple[int, ...]]  # the tokens of a prompt, as the teacher reads it, and of a completion


class TeacherTable:
    """The teacher's k most likely tokens at every token of given completions, looked up by lesson.

    Args:
        found: the buckets of all lessons' tokens, one lesson after the other.
        lessons: distinct, in the same order.
    """

    def __init__(self, found: Buckets, lessons: Sequence[Lesson]) -> None:
        self.found, self.rows = found, {lesson: row for row, lesson in enumerate(lessons)}
        lengths = torch.tensor([len(completion) for _, completion in lessons])
        self.starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))

    def of(self, batch: PolicyBatch) -> Buckets:
        """Return the buckets of the K tokens that ``completion_mask`` keeps; ``lesson`` names the rows."""
        mask = batch["completion_mask"]
        places = (self.starts[batch["lesson"].cpu()][:, None] + torch.arange(mask.shape[1]))[mask.cpu()]
        return Buckets(self.found.ids[places].long().to(mask.device), self.found.logprobs[places].to(mask.device))


def read_or_write_table(
    lessons: Sequence[Lesson],
    say: Callable[[], Callable[[PolicyBatch], Buckets]],
    folder: Path,
    identity: str,
    weights: str,
) -> TeacherTable:
    """Return the table of the lessons: read from ``folder``, after what is missing there is computed (collective).

    A file holds 64 lessons and is named by their tokens and ``identity``. It is written beside its name and renamed, so
    an interrupted run goes on where it was. Ranks share the work, and must share the folder.

    Args:
        lessons: all that are needed, equal on all ranks; several may be equal.
        say: loads the teacher, which is called only if a file is missing; the result computes a batch's buckets.
        folder: the cache.
        identity: what else determines the numbers.
        weights: digest of the teacher's weights, see ``describe_weights``; empty = not known here.

    Raises:
        ValueError: the folder was written with other weights, or another rank's file is not in it.
    """
    distinct, identity = list(dict.fromkeys(lessons)), hashlib.blake2b(identity.encode()).hexdigest()
    parts = [distinct[start : start + LESSONS] for start in range(0, len(distinct), LESSONS)]
    files = [folder / f"{_digest(identity, part)}.safetensors" for part in parts]
    missing = sorted({number for number in from_all_ranks(_missing(files))})
    if missing:
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        rank = torch.distributed.get_rank() if world > 1 else 0
        buckets_of = say()
        folder.mkdir(parents=True, exist_ok=True)
        for number in missing[rank::world]:
            found = buckets_of(make_lesson_batch(parts[number]))
            tensors = {"ids": found.ids.int().cpu(), "logprobs": found.logprobs.float().cpu()}
            with naming(files[number]), replacing(files[number]) as part:
                save_file(tensors, part, {"weights": weights})
        from_all_ranks([None])  # all have written
    lost = _missing(files)
    if lost:
        raise ValueError(
            f"teacher_cache: {files[lost[0]]} was written by another rank: name a folder that all ranks share"
        )
    for file in files if weights else []:
        with safe_open(file, "pt") as opened:
            noted = (opened.metadata() or {}).get("weights", "")
        if noted and noted != weights:
            raise ValueError(
                f"teacher_cache: {folder} holds what the teacher said before its weights changed; remove the folder, "
                "or name another one"
            )
    read = [load_file(file) for file in files]
    found = Buckets(*(torch.cat([each[name] for each in read]) for name in Buckets._fields))
    return TeacherTable(found, distinct)


def make_lesson_batch(lessons: Sequence[Lesson]) -> PolicyBatch:
    """Make a batch of completions with a prompt each."""
    prompt_ids, prompt_mask = pad_rows([prompt for prompt, _ in lessons])
    completion_ids, completion_mask = pad_rows([completion for _, completion in lessons])
    batch = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "prompt_index": torch.arange(len(lessons)),
    }
    return cast(PolicyBatch, batch)


def describe_weights(path: str) -> str:
    """Return a digest of a sample of the weight files of a model's folder or file; empty if there is none here.

    A few blocks of each file are read, so that a model that was trained further gets another digest without being
    loaded.
    """
    place = Path(path).expanduser()
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors")) + sorted(place.glob("*.bin"))
    found = hashlib.blake2b(digest_size=8)
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for block in range(BLOCKS):
                opened.seek(block * max(0, size - BLOCK) // (BLOCKS - 1))
                found.update(opened.read(BLOCK))
    return found.hexdigest() if files else ""


def _missing(files: Sequence[Path]) -> list[int]:
    return [number for number, file in enumerate(files) if not file.is_file()]


def _digest(identity: str, lessons: Sequence[Lesson]) -> str:
    return hashlib.blake2b(repr((identity, lessons)).encode(), digest_size=16).hexdigest()
