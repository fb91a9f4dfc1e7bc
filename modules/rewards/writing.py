"""Rewards for how a completion is written: after instructions, in the prompt's language, without repetitions."""

import importlib.util
import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

from modules.rewards.verifier import Verifier
from modules.types import Rollout


class InstructionConstraints(Verifier):
    """Checks whether the answer follows the constraints of its row, of the kinds of IFEval and IFBench.

    Rows have the columns ``instruction_id_list``, such as ``["punctuation:no_comma"]``, and ``kwargs``, one object per
    constraint. The text after ``</think>`` is checked, as strictly as the benchmarks' strict score. Sources: IFEval
    (arXiv 2311.07911), IFBench (arXiv 2507.02833). The checks are those of the package if-verifiable, save for kinds of
    IFBench that it reads otherwise than their wording says: ``checks/constraint_wording.py`` has them.

    A row without these columns gets None, and so does one with a constraint of an unknown kind or of the six kinds that
    no rule can check; a warning says so once. Six kinds read files of NLTK; a warning says if they are missing, and
    nothing is downloaded.

    Args:
        every: True = 1.0 if all constraints of the row are followed, else 0.0. False = the share that is followed.
        timeout: seconds per rollout.
        name: label of the metric.

    Raises:
        ImportError: if-verifiable is not installed.
        ValueError: ``timeout`` is out of range. When called: a row's ``kwargs`` are not one object per constraint.
    """

    check = "constraint_list"

    def __init__(self, every: bool = True, timeout: float = 5.0, name: str = "constraints") -> None:
        if importlib.util.find_spec("if_verifiable") is None:
            raise ImportError(
                "InstructionConstraints needs the if-verifiable package; install it with: pip install "
                "'lightning-align[constraints]'"
            )
        super().__init__(name, {"every": every}, timeout)
        self._known: set[str] = set()  # kinds that were looked up

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return the score per rollout, or None."""
        self._look_up({kind for rollout in rollouts for kind in self.describe(rollout).get("instruction_id_list", ())})
        return super().__call__(rollouts)

    def describe(self, rollout: Rollout) -> dict[str, Any]:
        """Return the two columns of the row; nothing where it lacks them. Raises ValueError, see the class."""
        info = rollout.info or {}
        kinds, settings = info.get("instruction_id_list"), info.get("kwargs")
        if kinds is None and settings is None:
            return {}
        if isinstance(settings, str):
            try:
                settings = json.loads(settings)
            except json.JSONDecodeError:
                settings = None
        wrong = (
            not isinstance(kinds, list)
            or not isinstance(settings, list)
            or len(kinds) != len(settings)
            or not all(isinstance(one, dict) for one in settings)
        )
        if wrong:
            raise ValueError(
                f"{rollout.uid}: InstructionConstraints needs a list instruction_id_list and, in kwargs, as many "
                f"objects; got {kinds!r} and {info.get('kwargs')!r}"
            )
        return {"instruction_id_list": kinds, "kwargs": settings}

    def _look_up(self, kinds: set[str]) -> None:
        """Tell of kinds that cannot be checked, each once."""
        new = sorted(kinds - self._known)
        if not new:
            return
        from modules.rewards.checks.constraint_list import NEEDS_FILES, has_files, load_kinds
        from modules.rewards.checks.constraint_wording import REFUSED

        self._known |= kinds
        unknown = [kind for kind in new if kind not in load_kinds()]
        if unknown:
            warnings.warn(
                f"reward '{self.name}': if-verifiable knows no constraint {', '.join(unknown)}; completions of rows "
                "that have it get no score",
                stacklevel=3,
            )
        for kind in new:
            if kind in REFUSED:
                warnings.warn(
                    f"reward '{self.name}': completions of rows with {kind} get no score, because {REFUSED[kind]}",
                    stacklevel=3,
                )
        lacking = [kind for kind in new if kind not in unknown and not has_files(kind)]
        if lacking:
            names = sorted({file.rpartition("/")[2] for kind in lacking for file in NEEDS_FILES[kind]})
            warnings.warn(
                f"reward '{self.name}': {', '.join(lacking)} read files of NLTK that are not here, so that completions "
                f"of such rows get no score; run: python -m nltk.downloader {' '.join(names)}",
                stacklevel=3,
            )


class LanguageConsistency(Verifier):
    """Gives the share of words that are in the language of the prompt, in [0, 1]: DeepSeek-R1's reward for language.

    Source: arXiv 2501.12948, section 2.3.2; it does not say how words are counted. Here all of the completion counts,
    its reasoning too. Code, LaTeX, addresses, tags and digits are no words. Where a script has no spaces, such as Han,
    kana and Thai, each letter is a word. If a script belongs to one language, such as Thai or Hangul, it decides. Else
    py3langid decides for each sentence of at least four words, and for the whole text where sentences are shorter; a
    sentence is only taken for another language above a probability of 0.95. Han is Japanese where a sentence has kana.
    In a sentence of another script, single Latin letters are names of variables and do not count.

    A completion without words gets 0.0. If the prompt's language cannot be told, the score is None. The system message
    of a chat is no part of the prompt here, as far as its tags are those of ChatML or Llama.

    Args:
        language: code such as ``en`` or ``zh``, if all completions should be in one language; None = the prompt's.
        name: label of the metric.

    Raises:
        ImportError: py3langid is not installed.
        ValueError: py3langid does not know ``language``.
    """

    checks_answer = False
    check = "language_share"
    reads = "text"

    def __init__(self, language: str | None = None, name: str = "language") -> None:
        if importlib.util.find_spec("py3langid") is None:
            raise ImportError(
                "LanguageConsistency needs the py3langid package; install it with: pip install "
                "'lightning-align[language]'"
            )
        if language is not None:
            from modules.rewards.checks.language_share import LEFT_OUT, load_identifier

            known = sorted(set(load_identifier().labels) - LEFT_OUT)
            if language not in known:
                raise ValueError(f"LanguageConsistency: unknown language '{language}'; known are {', '.join(known)}")
        super().__init__(name, {"language": language})

    def describe(self, rollout: Rollout) -> dict[str, Any]:
        """Return the prompt, as it was rendered."""
        return {"prompt": rollout.prompt}


class ScriptConsistency(Verifier):
    """Gives the share of a thought's signs in the prompt's alphabet, in [0, 1]: ``LanguageConsistency`` by sign.

    Source: the reward for language of DeepSeek-R1 (arXiv 2501.12948, section 2.3.2), where a language is an alphabet.
    Signs of none of the alphabets, such as ``+``, do not count. The alphabet of the first sign of the prompt that is in
    one is the prompt's, whatever follows. The thought is what stands between ``<think>`` and ``</think>``; the answer
    behind it does not count.

    A completion without a thought, or with a thought without signs, gets 0.0. If the prompt has no sign of any
    alphabet, the score is None. The system message and the roles of a chat are no part of the prompt, as in
    ``LanguageConsistency``.

    Args:
        alphabets: at least two, such as ``["0123456789", "abcdefghij"]``; no sign is in two of them.
        name: label of the metric.

    Raises:
        ValueError: there are fewer than two alphabets, one is empty, or a sign occurs twice.
    """

    checks_answer = False
    check = "alphabet_share"
    reads = "text"

    def __init__(self, alphabets: list[str], name: str = "script") -> None:
        signs = "".join(alphabets)
        if len(alphabets) < 2 or not all(alphabets) or len(set(signs)) < len(signs):
            raise ValueError(
                "ScriptConsistency needs at least two alphabets, each with a sign and no sign in two of them or twice, "
                f"got {alphabets}"
            )
        super().__init__(name, {"alphabets": alphabets})

    def describe(self, rollout: Rollout) -> dict[str, Any]:
        """Return the prompt, as it was rendered."""
        return {"prompt": rollout.prompt}


class Repetition(Verifier):
    """Takes away up to ``penalty`` for n-grams of words that occurred before in the completion.

    -penalty (1 - distinct n-grams / n-grams), over the whole completion with its reasoning, in lower case and without
    punctuation; 0 for fewer than n words. In scripts without spaces, such as Chinese and Thai, each letter is a word.
    Source: the code of arXiv 2502.03373, for a whole text (``get_repetition_penalty``).

    Args:
        size: words of an n-gram, >= 1.
        penalty: finite and >= 0.
        name: label of the metric.

    Raises:
        ValueError: a setting is out of range.
    """

    checks_answer = False
    check = "repeats"
    reads = "text"

    def __init__(self, size: int = 3, penalty: float = 1.0, name: str = "repetition") -> None:
        if size < 1 or not 0 <= penalty < math.inf:
            raise ValueError(
                f"Repetition needs a size of at least 1 and a finite penalty >= 0, got {size} and {penalty}"
            )
        super().__init__(name, {"size": size, "penalty": penalty})
