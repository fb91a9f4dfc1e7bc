"""Constraints, the prompt's language and repetitions, by hand."""

import warnings
from typing import Any

import pytest

from modules.rewards import InstructionConstraints, LanguageConsistency, Repetition, ScriptConsistency
from modules.rewards.verifier import Verifier
from modules.types import Completion, Rollout


def rollout(text: str, prompt: str = "q", **info: Any) -> Rollout:
    return Rollout("row 7", prompt, [1], None, Completion([2], [0.0], text, "stop"), 0, {}, None, info)


BOTH = {
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{"num_words": None}, {"num_words": 3, "relation": "at least"}],
}


def test_all_constraints_or_their_share():
    rollouts = [rollout(text, **BOTH) for text in ("one two three", "one, two, three", "one", "one, two", "")]
    assert InstructionConstraints()(rollouts) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert InstructionConstraints(every=False)(rollouts) == [1.0, 0.5, 0.5, 0.0, 0.0]


def test_the_thinking_may_have_commas():
    assert InstructionConstraints()([rollout("<think>a, b</think>one two three", **BOTH)]) == [1.0]


def test_what_cannot_be_checked_is_told_once():
    reward = InstructionConstraints()
    unknown = rollout("a", instruction_id_list=["no:such"], kwargs=[{}])
    with pytest.warns(UserWarning, match="if-verifiable knows no constraint no:such; completions of rows that have it"):
        assert reward([unknown, rollout("a")]) == [None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reward([unknown]) == [None]
    # without its number the library would draw one
    lacking = {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"relation": "at least"}]}
    assert reward([rollout("a b c", **lacking)]) == [None]


BOMB = """
from checks.constraint_list import judge as follow, load_kinds

class Bomb:
    def __init__(self, kind):
        self.kind = kind
    def build_description(self, **settings):
        return ""
    def check_following(self, text):
        return bytearray(2**40) if text == "bomb" else text / 2

def judge(text, answer, info):
    load_kinds()["own:bomb"] = Bomb
    return follow(text, answer, {"instruction_id_list": ["own:bomb"], "kwargs": [{}]}, every=True)
"""


class Bombed(Verifier):
    """The check of constraints with one more kind."""

    reads = "text"


def test_a_constraint_that_takes_all_memory_counts_as_a_memory_bomb(tmp_path):
    (tmp_path / "bomb.py").write_text(BOMB)
    reward = Bombed("bombed", timeout=30.0)
    reward.check = str(tmp_path / "bomb.py")
    with pytest.warns(UserWarning, match="memory 1"):
        assert reward([rollout("bomb"), rollout("an error")]) == [None, None]
    assert reward.failures == {"memory": 1}  # what cannot be checked is no failure


def test_kinds_that_no_rule_can_check_are_told():
    span = {"prompt_to_repeat": "Name a prime number.", "n_start": 1, "n_end": 3}
    row = rollout("a prime", instruction_id_list=["repeat:repeat_span"], kwargs=[span])
    with pytest.warns(
        UserWarning, match="rows with repeat:repeat_span get no score, because it asks for indices of char"
    ):
        assert InstructionConstraints()([row]) == [None]


@pytest.mark.parametrize(
    ("kind", "settings", "follows", "fails"),
    [
        ("count:conjunctions", {"small_n": 2}, "He ran and fell, but rose.", "And he ran and fell and, and rose."),
        ("count:person_names", {"N": 2}, "Mia met Leo.", "Miami has a Leopard."),
        ("format:quotes", {}, '"He: \'she: "no"\' then"', 'He said "don\'t" and "won\'t".'),
        ("ratio:sentence_words", {}, "Cat sat. Dog ran. Owl fly.", "Cat sat. Cat ran. Cat fly."),
        ("words:last_first", {}, "I like tea. Tea, he said, is hot.", "I like tea. It is hot."),
        ("words:keywords_specific_position", {"keyword": "tea", "n": 1, "m": 3}, "Yes, hot tea.", "Yes, tea."),
        ("format:no_whitespace", {}, "<think>a b</think>\n\nriver", "<think>river</think>\n\na b"),
    ],
)
def test_kinds_are_read_by_their_wording(kind, settings, follows, fails):
    rows = [rollout(text, instruction_id_list=[kind], kwargs=[settings]) for text in (follows, fails)]
    assert InstructionConstraints()(rows) == [1.0, 0.0]


def test_capitals_are_english_too():
    info = {"instruction_id_list": ["change_case:english_capital"], "kwargs": [{}]}
    texts = ["THIS IS THE ANSWER TO THE QUESTION THAT YOU HAVE ASKED ME TODAY.", "This is the answer to the question."]
    assert InstructionConstraints()([rollout(text, **info) for text in texts]) == [1.0, 0.0]


def test_columns_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match="row 7: InstructionConstraints needs a list instruction_id_list and, in kwargs"
    ):
        InstructionConstraints()([rollout("a", instruction_id_list=["punctuation:no_comma"], kwargs=[{}, {}])])


def test_shares_of_words_by_hand():
    english = LanguageConsistency(language="en")
    assert english([rollout("the cat \u732b sat")]) == [0.75]  # three of four
    assert english([rollout(text) for text in ("", "$x + y$ 42", "```\nimport os\n```")]) == [0.0, 0.0, 0.0]
    thai = LanguageConsistency(language="th")
    # three letters, whose vowel sign is none, and one English word; x is a variable
    assert thai([rollout("\u0e19\u0e49\u0e33"), rollout("\u0e01\u0e34\u0e19 rice"), rollout("x = \u0e01")]) == [
        1.0,
        2 / 3,
        1.0,
    ]


def test_the_prompt_decides_without_its_system_message():
    german = "Wie viele \u00c4pfel bekommt jedes der f\u00fcnf Kinder, wenn es zehn sind?"
    system = "You are a helpful assistant who thinks step by step and then gives a short answer. " * 3
    prompt = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{german}<|im_end|>\n"
    texts = [
        "<think>Zehn \u00c4pfel teilen wir durch f\u00fcnf Kinder.</think>Also bekommt jedes Kind zwei \u00c4pfel.",
        "<think>We divide ten apples by five children.</think>Also bekommt jedes Kind zwei \u00c4pfel.",
        "So each child gets two of the apples.",
    ]
    # 7 words of 13 are English: the reasoning counts
    assert LanguageConsistency()([rollout(text, prompt) for text in texts]) == [1.0, pytest.approx(6 / 13), 0.0]
    assert LanguageConsistency()([rollout("Five", "2 + 3 =")]) == [None]


def test_unknown_languages_are_refused():
    with pytest.raises(ValueError, match="LanguageConsistency: unknown language 'english'; known are ace, af, am"):
        LanguageConsistency(language="english")


ALPHABETS = ["0123456789", "abcdefghij"]


def test_shares_of_signs_by_hand():
    reward = ScriptConsistency(ALPHABETS)
    texts = {
        "<think>7+0*0</think>0": 1.0,
        "<think>7+a*0</think>a": 2 / 3,  # a is foreign; + and * count nowhere, and neither does the answer
        "<think>h+a*a</think>0": 0.0,
        "<think>7+a*0": 0.0,  # never closed
        "<think></think>0": 0.0,
        "<think>+*</think>0": 0.0,
        "0": 0.0,
    }
    assert reward([rollout(text, "7+*=") for text in texts]) == pytest.approx(list(texts.values()))
    # in letters the other sign is foreign, and so is everything but "a" in the thought of digits
    texts = ["<think>7+a*0</think>a", "<think>h+a*a</think>0"]
    assert reward([rollout(text, "h+*=") for text in texts]) == pytest.approx([1 / 3, 1.0])


def test_the_first_sign_of_the_prompt_decides():
    chat = "<|im_start|>system\nbad<|im_end|>\n<|im_start|>user\n7+*= /no_think<|im_end|>\n<|im_start|>assistant\n"
    reward, text = ScriptConsistency(ALPHABETS, name="own"), "<think>7+0*a</think>a"
    assert reward.name == "own"
    assert reward([rollout(text, prompt) for prompt in (chat, "7+*=/think", "+*=")]) == [2 / 3, 2 / 3, None]
    assert reward([rollout("7+0</think>0", "7+=<think>")]) == [1.0]  # the prompt opens the thought


@pytest.mark.parametrize("alphabets", [["01"], ["01", ""], ["01", "12"], ["00", "1"]])
def test_alphabets_must_tell_signs_apart(alphabets):
    with pytest.raises(ValueError, match="ScriptConsistency needs at least two alphabets"):
        ScriptConsistency(alphabets)


def test_repeated_ngrams_by_hand():
    # pairs of "a b a b a b": ab ba ab ba ab, of which three of five are repeated
    texts = ["a b a b a b", "A, b. a b! a b", "a b c d", "a", "", "<think>a b</think> a b", "\u5317\u4eac\u5317\u4eac"]
    # the tags are no words: ab ba ab; letters of Han are: two of three distinct
    expected = [-0.6, -0.6, 0.0, 0.0, 0.0, -1 / 3, -1 / 3]
    assert Repetition(size=2)([rollout(text) for text in texts]) == pytest.approx(expected)
    assert Repetition(size=2, penalty=0.5)([rollout(texts[0])]) == pytest.approx([-0.3])


@pytest.mark.parametrize(("size", "penalty"), [(0, 1.0), (2, -1.0), (2, float("inf"))])
def test_settings_of_repetition_are_checked(size, penalty):
    with pytest.raises(ValueError, match="Repetition needs a size of at least 1 and a finite penalty >= 0"):
        Repetition(size, penalty)
