"""Templates, few-shot prompts, answer options, inverted tasks, and how often each task is drawn."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from datamodules import Files, FlanTemplates
from datamodules.sources import FlanTask, FlanTemplate, Row, Source
from datamodules.sources.flan import mixing_rates

FLAN = Path(__file__).parents[3] / "shared" / "data" / "flan-cot"
ASK = FlanTemplate("Q: {question}", "{answer}")


def write(path: Path, count: int, **columns: Any) -> str:
    rows = [{"question": f"{path.stem}{index}?", "answer": f"a{index}", **columns} for index in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("sizes", "cap", "rates"),
    [
        ([1000, 30000], 3000, [0.25, 0.75]),  # 1000 / (1000 + 3000)
        ([1000, 30000], 10**9, [1 / 31, 30 / 31]),  # proportional
        ([1000, 30000], 1000, [0.5, 0.5]),  # uniform from the smallest size down
        ([1000, 30000, 7000], 1, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_mixing_rates(sizes: list[int], cap: int, rates: list[float]) -> None:
    assert mixing_rates(sizes, cap) == pytest.approx(rates, abs=1e-15)
    square_roots = [math.sqrt(size) / sum(map(math.sqrt, sizes)) for size in sizes]  # temperature 2 is another scheme
    assert mixing_rates(sizes, cap) != pytest.approx(square_roots, abs=1e-3)


def test_tasks_are_drawn_at_their_rates(tmp_path: Path) -> None:
    tasks = {
        name: FlanTask(write(tmp_path / f"{name}.jsonl", size), [ASK])
        for name, size in (("small", 1000), ("large", 5000))
    }
    rows = FlanTemplates(tasks, num_examples=100_000, few_shot=0.0).rows()
    share = Counter(row.source for row in rows)["small"] / 100_000
    assert abs(share - 0.25) < 3 * math.sqrt(
        0.25 * 0.75 / 100_000
    )  # 1000 / (1000 + 3000), three standard errors: 0.0041
    assert abs(share - 1000 / 6000) > 0.05  # what it would be without the cap
    used = Counter(row.origin for row in rows if row.source == "small")
    assert (
        len(used) == 1000 and max(used.values()) - min(used.values()) <= 1
    )  # every example once before any comes again


def test_the_limit_per_task_comes_before_the_cap(tmp_path: Path) -> None:
    tasks = {name: FlanTask(write(tmp_path / f"{name}.jsonl", 50), [ASK]) for name in ("a", "b")}
    tasks["b"].source = write(tmp_path / "b.jsonl", 10)
    rows = FlanTemplates(tasks, num_examples=4000, max_per_task=10, few_shot=0.0).rows()
    assert {row.columns["prompt"] for row in rows if row.source == "a"} == {f"Q: a{index}?" for index in range(10)}
    assert abs(Counter(row.source for row in rows)["a"] / 4000 - 0.5) < 3 * math.sqrt(
        0.25 / 4000
    )  # 10 and 10, not 50 and 10


def test_templates_are_equally_likely(tmp_path: Path) -> None:
    table = [FlanTemplate(f"{{{{{index}}}}} {{question}}", "{answer}!") for index in range(4)]
    task = FlanTask(write(tmp_path / "a.jsonl", 100), table)
    rows = FlanTemplates({"a": task}, num_examples=4000, few_shot=0.0).rows()
    counts = Counter(row.columns["prompt"].partition(" ")[0] for row in rows)
    assert set(counts) == {"{0}", "{1}", "{2}", "{3}"}
    assert all(abs(count / 4000 - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 4000) for count in counts.values())
    for row in rows:
        index = int(row.origin.rpartition(":")[2]) - 1
        assert (
            row.columns == {"prompt": f"{row.columns['prompt'][:3]} a{index}?", "completion": f"a{index}!"}
            and row.source == "a"
        )


def test_few_shot_prompts(tmp_path: Path) -> None:
    task = FlanTask(write(tmp_path / "a.jsonl", 3), [ASK, FlanTemplate("Answer {question}", "It is {answer}")])
    (row,) = FlanTemplates({"a": task}, num_examples=1, shots=2, few_shot=1.0).rows()
    index = int(row.origin.rpartition(":")[2]) - 1
    first, second = (
        "Q: {}" if row.columns["prompt"].startswith("Q") else "Answer {}",
        "{}" if row.columns["prompt"].startswith("Q") else "It is {}",
    )
    possible = [
        "\n\n\n".join(
            [f"{first.format(f'a{other}?')}\n\n{second.format(f'a{other}')}" for other in others]
            + [f"{first.format(f'a{index}?')}\n\n"]
        )
        for others in ([(index + 1) % 3, (index + 2) % 3], [(index + 2) % 3, (index + 1) % 3])
    ]
    assert row.columns["prompt"] in possible
    assert row.columns["completion"] == second.format(f"a{index}")


def is_few_shot(row: Row) -> bool:
    return "\n\n\n" in row.columns["prompt"]


def test_shares_of_few_shot_options_and_inverted(tmp_path: Path) -> None:
    table = [
        ASK,
        FlanTemplate("Ask for {answer}", "{question}", inverted=True),
        FlanTemplate("A question for {answer}", "{question}", inverted=True),
    ]
    options = "\n\nOptions:\n{choices}"
    task = FlanTask(write(tmp_path / "a.jsonl", 200, choices=["yes", "no"]), table, options)
    rows = FlanTemplates({"a": task}, num_examples=10_000, few_shot=0.2, show_options=0.6, invert=0.3, shots=1).rows()
    few = [row for row in rows if is_few_shot(row)]
    inverted = [row for row in rows if row.columns["completion"].endswith("?")]
    straight = [row for row in rows if not row.columns["completion"].endswith("?")]
    shown = [row for row in straight if "\n\nOptions:\n- yes\n- no" in row.columns["prompt"]]
    for count, rate, among in ((len(few), 0.2, rows), (len(inverted), 0.3, rows), (len(shown), 0.6, straight)):
        assert abs(count / len(among) - rate) < 3 * math.sqrt(
            rate * (1 - rate) / len(among)
        )  # 2 of 3 templates are inverted, 0.3 are drawn
    assert not any("Options" in row.columns["prompt"] for row in inverted)
    assert {row.columns["prompt"].count("Options:") for row in shown} == {1, 2}  # with its example or alone
    assert all(row.columns["prompt"].count("Options:") == 2 for row in shown if is_few_shot(row))
    asked = [row.columns["prompt"] for row in inverted if not is_few_shot(row)]
    assert 0.4 < sum(prompt.startswith("Ask") for prompt in asked) / len(asked) < 0.6


def test_a_table_of_one_kind_needs_no_rate(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", 5)
    backwards = FlanTask(data, [FlanTemplate("Ask for {answer}", "{question}", inverted=True)])
    rows = FlanTemplates(
        {"straight": FlanTask(data, [ASK]), "backwards": backwards}, num_examples=200, few_shot=0.0
    ).rows()
    assert {(row.source, row.columns["completion"][-1] == "?") for row in rows} == {
        ("straight", False),
        ("backwards", True),
    }


def test_the_seed_decides(tmp_path: Path) -> None:
    tasks = {name: FlanTask(write(tmp_path / f"{name}.jsonl", 20), [ASK]) for name in "ab"}
    first = FlanTemplates(tasks, num_examples=50)
    assert first.rows() == first.rows() == FlanTemplates(tasks, num_examples=50).rows()
    assert first.rows() != FlanTemplates(tasks, num_examples=50, seed=1).rows()


def test_templates_in_files_and_tasks_in_a_configuration(tmp_path: Path) -> None:
    entries = [
        {"input": "Q: {question}", "target": "{answer}"},
        {"input": "Ask for {answer}", "target": "{question}", "inverted": True},
    ]
    (tmp_path / "t.json").write_text(json.dumps(entries, indent="\t"))
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(entries))
    data = write(tmp_path / "a.jsonl", 5)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Source, "source")
    expected = FlanTemplates(
        {"a": FlanTask(data, [FlanTemplate(**entry) for entry in entries])}, num_examples=20
    ).rows()  # type: ignore[arg-type]
    files = {"class_path": "Files", "init_args": {"path": data}}
    for templates in (entries, str(tmp_path / "t.json"), str(tmp_path / "t.yaml")):
        settings = {"num_examples": 20, "tasks": {"a": {"source": files, "templates": templates}}}
        parsed = parser.parse_object({"source": {"class_path": "FlanTemplates", "init_args": settings}})
        assert parser.instantiate(parsed).source.rows() == expected


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            ("{prompt}", "{answer}"),
            r"a\.jsonl:\d: the row has no column 'prompt', found question, answer, hint; template 0 of task 'a' needs "
            r"it$",
        ),
        (("{hint}", "{answer}"), r"a\.jsonl:\d: the row is empty in column 'hint'; template 0 of task 'a' needs it$"),
        (
            ("{question", "{answer}"),
            r"template 0 of task 'a': expected '}' before end of string in '{question'; write a brace",
        ),
        (("{question}", "}"), r"template 0 of task 'a': Single '}' encountered"),
        (
            ("{}", "{answer}"),
            "template 0 of task 'a': a placeholder is the name of a column in braces and nothing else",
        ),
        (("{question!r}", "{answer}"), "a placeholder is the name of a column"),
        (("{question.__class__}", "{answer}"), "no column 'question.__class__'"),
    ],
)
def test_templates_that_do_not_fit(tmp_path: Path, template: tuple[str, str], said: str) -> None:
    task = FlanTask(write(tmp_path / "a.jsonl", 5, hint=None), [FlanTemplate(*template)])
    with pytest.raises(ValueError, match=said) as raised:
        FlanTemplates({"a": task}, num_examples=3).rows()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.json", "[{]", r"t\.json: not a readable JSON or YAML file of templates: Expecting"),
        ("t.yaml", "a: [", r"t\.yaml: not a readable JSON or YAML file of templates: while parsing"),
        ("t.yaml", "a: b", r"t\.yaml: expected a list of templates, found a dict"),
        ("t.json", "[]", "task 'a' has no templates"),
        (
            "t.json",
            '[{"input": "a", "target": "b"}, {"input": "a"}]',
            r"t\.json#1: a template has the texts input and target",
        ),
        ("t.json", '[{"input": "a", "target": 1}]', r"t\.json#0: a template has the texts"),
        ("t.json", '[{"input": "a", "target": "b", "invert": true}]', r"t\.json#0: .* and nothing else$"),
        ("t.json", '["text"]', r"t\.json#0: "),
    ],
)
def test_broken_tables_of_templates(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said) as raised:
        FlanTemplates({"a": FlanTask(write(tmp_path / "a.jsonl", 5), str(tmp_path / name))}, num_examples=1).rows()
    assert "\n" not in str(raised.value)


def test_arguments(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", 3)
    with pytest.raises(ValueError, match="num_examples, cap, max_per_task and shots must be at least 1"):
        FlanTemplates({"a": FlanTask(data, [ASK])}, num_examples=1, cap=0)
    with pytest.raises(ValueError, match="tasks must name at least one task"):
        FlanTemplates({}, num_examples=1)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 0.5, 0.5 and 2"):
        FlanTemplates({"a": FlanTask(data, [ASK])}, num_examples=1, invert=2)
    with pytest.raises(
        ValueError, match="task 'a' has 3 rows, a few-shot row needs 3 beside its own; lower shots or few_shot"
    ):
        FlanTemplates({"a": FlanTask(data, [ASK])}, num_examples=1).rows()
    assert len(FlanTemplates({"a": FlanTask(data, [ASK])}, num_examples=4, shots=2).rows()) == 4


def test_public_chain_of_thought_tasks() -> None:
    if not FLAN.is_dir():
        pytest.skip("the public FLAN files are not here")
    reasons = [
        FlanTemplate("{question}\nThink first.", "{rationale} The answer is {answer}."),
        FlanTemplate("Which question has this answer?\n{rationale} {answer}", "{question}", inverted=True),
    ]
    names = ("aqua", "creak", "ecqa", "qasc", "sensemaking", "strategyqa")
    sources = {
        name: Files(str(FLAN / f"{name}_train.tsv"), header=["question", "answer", "rationale"]) for name in names
    }
    rows = FlanTemplates(
        {name: FlanTask(source, reasons) for name, source in sources.items()}, num_examples=20_000, cap=400
    ).rows()
    counts = Counter(
        row.source for row in rows
    )  # rows: 560, 560, 420, 350, 420, 420; only QASC is below the cap: 350 / (5 * 400 + 350)
    for name in names:
        rate = 350 / 2350 if name == "qasc" else 400 / 2350
        assert abs(counts[name] / 20_000 - rate) < 3 * math.sqrt(rate * (1 - rate) / 20_000)
    raw = {(name, row.columns["question"]): row.columns for name, source in sources.items() for row in source.rows()}
    zero_shot = [
        row
        for row in rows
        if not row.columns["prompt"].endswith("\n\n") and row.columns["prompt"].endswith("Think first.")
    ]
    assert len(zero_shot) > 5000  # 0.5 * 0.7 of 20000
    for row in zero_shot[:500]:
        cells = raw[row.source, row.columns["prompt"].removesuffix("\nThink first.")]
        assert (
            row.columns["completion"].endswith(f"The answer is {cells['answer']}.") or row.source == "aqua"
        )  # AQuA asks some questions twice
    assert any("\nOptions:\n(A) " in row.columns["prompt"] for row in zero_shot) and not any(
        r"\n" in row.columns["prompt"] for row in zero_shot
    )
