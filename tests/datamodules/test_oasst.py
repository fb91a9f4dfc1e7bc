"""Conversation trees: which replies are compared, what is left out, and that no thread is on both sides of the split."""

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.preference_columns import preference_example
from datamodules.sources.oasst import OasstTrees, is_held_out

OASST = Path(__file__).parents[2].parent / "shared" / "data" / "oasst"
TREES = [name for number in range(40) if not is_held_out(name := f"tree{number}")]
HELD_OUT = next(name for number in range(40) if is_held_out(name := f"tree{number}"))


def message(name: str, role: str = "assistant", replies: tuple[Any, ...] = (), **columns: Any) -> dict[str, Any]:
    return {"message_id": name, "text": f"text of {name}", "role": role, "lang": "en", "replies": list(replies), **columns}


def write(path: Path, *roots: dict[str, Any], state: str = "ready_for_export", names: list[str] = TREES) -> str:
    trees = [{"message_tree_id": name, "tree_state": state, "prompt": root} for name, root in zip(names, roots, strict=False)]
    path.write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    return str(path)


def group(*ranks: Any, **columns: Any) -> dict[str, Any]:
    """A root with replies a, b, c, ... of these ranks; "-" = no such key."""
    replies = [message("abcd"[i], **({} if rank == "-" else {"rank": rank})) for i, rank in enumerate(ranks)]
    return message("root", "prompter", tuple(replies), **columns)


@pytest.mark.parametrize(
    ("ranks", "completions", "pairs"),
    [
        ((1, 0, None), {"b": 0, "a": 1}, ["ba"]),  # the tree of the specification: B before A, C has no rank
        ((0, 1, "-"), {"a": 0, "b": 1}, ["ab"]),
        ((2, 0, 1), {"b": 0, "c": 1, "a": 2}, ["bc", "ba", "ca"]),
        ((0, 0, 1), {"a": 0, "b": 0, "c": 1}, ["ac", "bc"]),  # a and b are tied
    ],
)
def test_ranked_siblings(tmp_path: Path, ranks: tuple[Any, ...], completions: dict[str, int], pairs: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", group(*ranks))
    (row,) = OasstTrees(path).rows()
    assert row.columns["prompt"] == [{"role": "user", "content": "text of root"}]
    assert dict(zip(row.columns["completions"], row.columns["ranks"], strict=True)) == {f"text of {k}": v for k, v in completions.items()}
    rows = OasstTrees(path, pairs=True).rows()
    assert [row.columns["chosen"][-1] + row.columns["rejected"][-1] for row in rows] == pairs
    assert all(row.origin == f"{path}:1 replies to root" for row in rows)


@pytest.mark.parametrize("ranks", [(0,), (None, None), ("-", "-", 0), (1, 1)])
def test_nothing_to_compare(tmp_path: Path, ranks: tuple[Any, ...]) -> None:
    for pairs in (False, True):
        with pytest.raises(ValueError, match=r"a\.jsonl: no group of ranked replies in the 1 train trees"):
            OasstTrees(write(tmp_path / "a.jsonl", group(*ranks)), pairs=pairs).rows()


def thread(**later: Any) -> dict[str, Any]:
    """root -> a (rank 1), b (rank 0) -> question -> c (rank 0), d (rank 1); ``later`` changes the question."""
    question = message("question", "prompter", (message("c", rank=0), message("d", rank=1)), **later)
    return message("root", "prompter", (message("a", rank=1), message("b", replies=(question,), rank=0)))


def test_a_thread_is_the_prompt_of_later_replies(tmp_path: Path) -> None:
    first, second = OasstTrees(write(tmp_path / "a.jsonl", thread())).rows()
    assert first.columns["completions"] == ["text of b", "text of a"]
    assert second.columns == {
        "prompt": [
            {"role": "user", "content": "text of root"},
            {"role": "assistant", "content": "text of b"},
            {"role": "user", "content": "text of question"},
        ],
        "completions": ["text of c", "text of d"],
        "ranks": [0, 1],
    }
    example = preference_example(second, {})
    assert example is not None and example.ranks == [0, 1] and len(example.prompt) == 3


@pytest.mark.parametrize("flaw", [{"deleted": True}, {"review_result": False}, {"synthetic": True}, {"lang": "de"}, {"deleted": True, "text": ""}])
def test_what_follows_a_flawed_message_is_left_out(tmp_path: Path, flaw: dict[str, Any]) -> None:
    (row,) = OasstTrees(write(tmp_path / "a.jsonl", thread(**flaw))).rows()
    assert row.columns["completions"] == ["text of b", "text of a"]
    kept = OasstTrees(write(tmp_path / "a.jsonl", thread(**flaw)), languages=["en", "de"], include_synthetic=True).rows()
    assert len(kept) == (1 if {"deleted", "review_result"} & set(flaw) else 2)


def test_a_flawed_reply_leaves_its_group_alone(tmp_path: Path) -> None:
    root = message("root", "prompter", (message("a", rank=0, synthetic=True), message("b", rank=1), message("c", rank=2)))
    (row,) = OasstTrees(write(tmp_path / "a.jsonl", root)).rows()
    assert row.columns["completions"] == ["text of b", "text of c"]


def test_unfinished_trees_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no group of ranked replies"):
        OasstTrees(write(tmp_path / "a.jsonl", group(0, 1), state="growing")).rows()


def test_trees_and_flat_messages_are_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", thread())
    flat: list[dict[str, Any]] = []

    def flatten(node: dict[str, Any], parent: str | None) -> None:
        flat.append({**{k: v for k, v in node.items() if k != "replies"}, "parent_id": parent, "message_tree_id": TREES[0]})
        for reply in node["replies"]:
            flatten(reply, node["message_id"])

    flatten(thread(), None)
    (tmp_path / "flat.jsonl").write_text("".join(json.dumps(node) + "\n" for node in flat))
    nested, rows = OasstTrees(path).rows(), OasstTrees(str(tmp_path / "flat.jsonl")).rows()
    assert [row.columns for row in rows] == [row.columns for row in nested]
    assert rows[1].origin == f"{tmp_path / 'flat.jsonl'}:4 replies to question"


def flat(*messages: tuple[str, str | None]) -> list[dict[str, Any]]:
    return [
        {"message_id": name, "parent_id": parent, "text": "t", "role": "prompter" if parent is None else "assistant"} for name, parent in messages
    ]


BROKEN: list[tuple[list[dict[str, Any]], str]] = [
    (flat(("r", None), ("a", "b"), ("b", "a")), "a.jsonl:2: message a is its own ancestor; the parents of a tree must not form a circle"),
    (flat(("r", None), ("a", "a")), "a.jsonl:2: message a is its own ancestor"),
    (flat(("r", None), ("a", "x")), "a.jsonl:2: message a answers x, which is not in the file"),
    (flat(("r", None), ("r", None)), "a.jsonl:2: message r is there twice, first in .*a.jsonl:1"),
    ([message("r", "prompter", (message("a", replies=(message("r"),)),))], "a.jsonl:1: message r is there twice"),
    ([message("r", "prompter", (message("a", parent_id="b"),))], "a.jsonl:1: message a stands below r and says that its parent is b"),
    ([message("r", "prompter", (message("a", "system"),))], "a.jsonl:1: message a has the role 'system', known are prompter, assistant"),
    ([message("r", "prompter", (message("a", text=" "),))], "a.jsonl:1: message a has no text"),
    ([message("r", "prompter", (message("a", text=None),))], "a.jsonl:1: message a has no text"),
    ([message("r", "prompter", (message("a", rank=0.5),))], "a.jsonl:1: message a has the rank 0.5, a whole number or null was expected"),
    ([message("r", "prompter", (message("a", rank=True),))], "a.jsonl:1: message a has the rank True"),
    ([message("r", "prompter", ("text",))], "a.jsonl:1: not a conversation tree"),
    ([{**message("r"), "replies": {"a": 1}}], "a.jsonl:1: not a conversation tree: .* and replies are a list"),
    ([{"prompt": "x", "completion": "y"}], "a.jsonl:1: not a conversation tree: a message needs a message_id, a text and a role"),
]


@pytest.mark.parametrize(("records", "said"), BROKEN)
def test_broken_trees_say_where_in_one_sentence(tmp_path: Path, records: list[dict[str, Any]], said: str) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"message_tree_id": TREES[0], **record}) + "\n" for record in records))
    with pytest.raises(ValueError, match=said) as raised:
        OasstTrees(str(tmp_path / "a.jsonl")).rows()
    assert "\n" not in str(raised.value)


def test_arguments_and_missing_files() -> None:
    with pytest.raises(ValueError, match="split must be train or val, got 'test'"):
        OasstTrees("a.jsonl", split="test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^missing.jsonl: no such file$"):
        OasstTrees("missing.jsonl").rows()


def test_a_tree_is_on_one_side(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", group(0, 1), names=[HELD_OUT])
    assert len(OasstTrees(path, split="val").rows()) == 1
    with pytest.raises(ValueError, match="in the 0 train trees"):
        OasstTrees(path).rows()


def siblings(node: dict[str, Any]) -> list[list[tuple[int, str]]]:
    """A naive walk: of each message the ranked assistant replies, best first."""
    ranked = sorted((r["rank"], r["text"]) for r in node["replies"] if r["role"] == "assistant" and r.get("rank") is not None)
    return [ranked] * (len(ranked) > 1) + [found for reply in node["replies"] for found in siblings(reply)]


@pytest.mark.parametrize("name", ["en_100_tree.jsonl", "en_100_message.jsonl"])
def test_public_trees(name: str) -> None:
    if not OASST.is_dir():
        pytest.skip("the public OpenAssistant files are not here")
    path = str(OASST / name)
    train, val = (OasstTrees(path, split, include_synthetic=True).rows() for split in ("train", "val"))  # type: ignore[arg-type]
    records = [json.loads(line) for line in (OASST / name).read_text(encoding="utf-8").split("\n") if line]
    groups = [found for record in records for found in siblings(record.get("prompt", record))]
    assert (len(train), len(val), len(groups)) == (131, 15, 146)  # 145 wholly ranked groups, and one where three of four are
    found = [list(zip(row.columns["ranks"], row.columns["completions"], strict=True)) for row in [*train, *val]]
    assert sorted(found) == sorted(groups)
    human = [OasstTrees(path, split).rows() for split in ("train", "val")]  # type: ignore[arg-type]
    assert [len(rows) for rows in human] == [127, 15]  # four groups were written by a model
    pairs = sum(len(OasstTrees(path, split, pairs=True).rows()) for split in ("train", "val"))  # type: ignore[arg-type]
    assert pairs == sum(len(r) * (len(r) - 1) // 2 for rows in human for r in [row.columns["ranks"] for row in rows])  # no two are tied
    roots = [{row.columns["prompt"][0]["content"] for row in rows} for rows in human]
    assert not roots[0] & roots[1]
    for row in [*train, *val]:
        example = preference_example(row, {})
        assert example is not None and [turn["role"] for turn in example.prompt][::2] == ["user"] * (len(example.prompt) // 2 + 1)  # type: ignore[index]


@pytest.mark.parametrize("name", ["en_100_text.jsonl", "prompt_lottery_en_250_text.jsonl", "realistic_seed_data.json"])
def test_files_of_prompts_alone_are_refused(name: str) -> None:
    if not OASST.is_dir():
        pytest.skip("the public OpenAssistant files are not here")
    with pytest.raises(ValueError, match=r"(:1: a row must be an object|#0: not a conversation tree)"):
        OasstTrees(str(OASST / name)).rows()
