"""Does a model know a fact? The four categories of SliCK (arXiv 2405.05904, section 3), and their exact match."""

import re
import string
from collections.abc import Sequence

from torch import Tensor

from modules.types import Knowledge

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def categorise(greedy: Tensor, sampled: Tensor) -> Knowledge:
    """Return how well a model knows a fact that it was asked for with several prompts.

    HighlyKnown: every greedy answer is right. MaybeKnown: some greedy answers are right. WeaklyKnown: no greedy answer
    is right, but a sampled one is. Unknown: no answer is right.

    Args:
        greedy: bool [N_ex], whether the greedy answer to each prompt is right; at least one prompt.
        sampled: bool [N_ex, N_sample], whether each answer sampled at a temperature above 0 is right.

    Raises:
        ValueError: the shapes differ from these.

    Example:
        3 of 10 right greedy answers give MaybeKnown. No right greedy answer and 1 of 160 sampled ones give WeaklyKnown.
    """
    if greedy.ndim != 1 or len(greedy) == 0 or sampled.ndim != 2 or len(sampled) != len(greedy):
        raise ValueError(
            f"knowledge_category: greedy must be [N_ex] and sampled [N_ex, N_sample], got {list(greedy.shape)} and "
            f"{list(sampled.shape)}"
        )
    if bool(greedy.any()):
        return "HighlyKnown" if bool(greedy.all()) else "MaybeKnown"
    return "WeaklyKnown" if bool(sampled.any()) else "Unknown"


def matches(text: str, answers: Sequence[str]) -> bool:
    """Return whether the first line of ``text`` equals one of ``answers``, all normalised.

    Example:
        "The Eiffel Tower.\\nQ: Who" matches ["eiffel tower", "la tour Eiffel"].
    """
    found = normalise(text.partition("\n")[0])
    return any(found == normalise(answer) for answer in answers)


def normalise(answer: str) -> str:
    """Normalise an answer as SQuAD does (arXiv 1606.05250): lower case, no ASCII punctuation, no articles, single
    spaces.

    An answer that consists of nothing else, such as "A" or "?", keeps them.
    """
    plain = _ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION))
    return " ".join(plain.split()) or " ".join(answer.lower().split())
