"""Chains of operations: values by hand, both scripts, thoughts and their variants, no held-out chain in training."""

import re

import pytest

from datamodules import ChainLessons, Chains, VerifiableDataModule
from datamodules.sources.toys.chains import OPERATIONS, in_script, work_out
from modules.networks.tiny import tiny_tokenizer


def columns(source: Chains | ChainLessons) -> list[dict[str, object]]:
    return [row.columns for row in source.rows()]


def test_the_operations_are_permutations_by_their_formulas() -> None:
    formulas = {
        "+": lambda v: (v + 3) % 10,
        "-": lambda v: (v - 1) % 10,
        "*": lambda v: 3 * v % 10,
        "~": lambda v: 9 - v,
        "^": lambda v: v + 1 if v % 2 == 0 else v - 1,
    }
    assert {sign: tuple(map(formula, range(10))) for sign, formula in formulas.items()} == OPERATIONS
    assert all(sorted(values) == list(range(10)) for values in OPERATIONS.values())


def test_a_chain_by_hand() -> None:
    # 7 + 3 = 10 -> 0, 3 x 0 = 0, 0 - 1 -> 9, 9 - 9 = 0, 0 and 1 exchanged = 1
    assert work_out("7+*-~^") == ["0", "0", "9", "0", "1"]
    assert in_script("7+0*0", "letters") == "h+a*a"


def test_rows_hold_the_thought_the_answer_and_what_recipes_read() -> None:
    source = Chains(2000, least=2, most=4, letters=0.5, seed=1)
    rows = columns(source)
    assert [row["operations"] for row in rows[:4]] == [2, 3, 4, 2]
    scripts = {"digits": "[0-9]", "letters": "[a-j]"}
    for row in rows:
        chain = row["prompt"].removesuffix("=")
        digits = chain if row["script"] == "digits" else chain.translate(str.maketrans("abcdefghij", "0123456789"))
        values = work_out(digits)
        steps = digits[0] + "".join(sign + value for sign, value in zip(digits[1:], values, strict=True))
        assert row["completion"] == f"<think>{in_script(steps, row['script'])}</think>{row['answer']}"
        assert row["answer"] == in_script(values[-1], row["script"]) and row["thinks"] is True
        sign = scripts[row["script"]]
        assert re.fullmatch(rf"{sign}[-+*~^]+=", row["prompt"])
    assert 0.46 < sum(row["script"] == "letters" for row in rows) / len(rows) < 0.54
    assert all(row.plain for row in source.rows())


def test_thoughts_may_be_left_out_wasteful_or_mixed() -> None:
    def completions(**settings: object) -> list[str]:
        return [row["completion"] for row in columns(Chains(1000, most=3, seed=2, **settings))]  # type: ignore[arg-type]

    assert all(re.fullmatch(r"<think></think>[0-9]", text) for text in completions(thoughts=0.0))
    assert all(re.fullmatch(r"[0-9]", text) for text in completions(thoughts=0.0, bare=True))
    rows = columns(Chains(1000, thoughts=0.3, bare=True, seed=2))
    assert all(row["thinks"] == ("<think>" in row["completion"]) for row in rows)
    assert 0.25 < sum(row["thinks"] for row in rows) / 1000 < 0.35
    checks = [text.count("?") for text in completions(waste=0.5)]
    assert 0.85 < sum(checks) / 1000 < 1.15  # 1/2 + 1/4 + 1/8 + ...
    assert all(re.search(r"(.)(?:\?\1)*</think>\1$", text) for text in completions(waste=0.5))
    thoughts = "".join(re.findall(r"<think>.(.*)</think>", "\n".join(completions(mixing=0.2))))
    foreign = len(re.findall("[a-j]", thoughts)) / len(re.findall("[0-9a-j]", thoughts))
    assert 0.17 < foreign < 0.23
    assert all(re.search(r"</think>[0-9]$", text) for text in completions(mixing=0.2))


def test_a_held_out_chain_is_in_no_training_set_in_either_script() -> None:
    def chains(**settings: object) -> set[str]:
        made = [*columns(Chains(4000, most=3, **settings)), *columns(ChainLessons(4000, most=3, **settings))]  # type: ignore[arg-type]
        return {row["prompt"][:-1].translate(str.maketrans("abcdefghij", "0123456789")) for row in made}

    training = chains(letters=0.5) | chains(letters=0.5, seed=7)
    held_out = chains(held_out=True) | chains(held_out=True, letters=1.0, seed=9)
    # 50 + 250 + 1250 chains, of which the hash takes about one in ten
    assert training.isdisjoint(held_out) and 1350 < len(training) < 1440 and 120 < len(held_out) < 190


def test_lessons_teach_to_think_behind_another_sign() -> None:
    rows = columns(ChainLessons(8000, thoughts=0.1, mixing=0.0))
    kinds = {
        r":(?!<)": 0.45,  # a worked chain
        r":<think>": 0.30,
        r"=<think>": 0.25 * 0.1,
        r"=(?!<)": 0.25 * 0.9,
    }
    texts = [row["prompt"][-1] + row["completion"] for row in rows]
    for kind, share in kinds.items():
        assert abs(sum(bool(re.match(kind, text)) for text in texts) / 8000 - share) < 0.02
    by_prompt = {row["prompt"][:-1]: row["completion"] for row in rows if row["prompt"].endswith("+:")}
    for prompt, completion in by_prompt.items():
        digits = prompt.translate(str.maketrans("abcdefghij", "0123456789"))
        script = "digits" if digits == prompt else "letters"
        assert in_script(work_out(digits)[-1], script) == completion[-1]


def test_rows_depend_on_the_seed_alone() -> None:
    assert Chains(50, seed=1, waste=0.4).rows() == Chains(50, seed=1, waste=0.4).rows() != Chains(50, seed=2).rows()
    assert ChainLessons(50, seed=1).rows() == ChainLessons(50, seed=1).rows() != ChainLessons(50, seed=2).rows()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_examples": 0}, "num_examples must be at least 1, got 0"),
        ({"least": 3, "most": 2}, "least must be at least 1 and at most most, got least 3 and most 2"),
        ({"thoughts": 1.1}, r"thoughts must lie in \[0, 1\], got 1.1"),
        ({"waste": 1.0}, r"waste must lie in \[0, 1\), got 1.0"),
        ({"mixing": -0.1}, r"mixing must lie in \[0, 1\], got -0.1"),
        ({"letters": 2.0}, r"letters must lie in \[0, 1\], got 2.0"),
    ],
)
def test_arguments_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chains(**({"num_examples": 1} | settings))  # type: ignore[arg-type]


def test_the_columns_reach_rewards() -> None:
    source = Chains(16, letters=0.5)
    data = VerifiableDataModule(tiny_tokenizer(), source, val=source, val_batch_size=16)
    data.setup("validate")
    infos = next(iter(data.val_dataloader()))["info"]
    assert {info["script"] for info in infos} == {"digits", "letters"} and infos[7]["operations"] == 8
