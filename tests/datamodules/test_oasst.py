"""Conversation trees: which replies are compared, what is left out, and that the split never cuts a thread in two."""

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.formats.preference_shapes import preference_example
from datamodules.formats.reading import Reading
from datamodules.sources.oasst import OasstTrees, is_held_out

OASST = Path(__file__).parents[2].parent / "shared" / "data" / "oasst"
TREES = [name for number in range(40) if not is_held_out(name := f"tree{number}")]
HELD_OUT = next(name for number in range(40) if is_held_out(name := f"tree{number}"))


def message(name: str, role: Any = "assistant", replies: tuple[Any, ...] = (), **columns: Any) -> dict[str, Any]:
    return {
        "message_id": name,
        "text": f"text of {name}",
        "role": role,
        "lang": "en",
        "replies": list(replies),
        **columns,
    }


def write(path: Path, *roots: dict[str, Any], state: str = "ready_for_export", names: list[str] = TREES) -> str:
    trees = [
        {"message_tree_id": name, "tree_state": state, "prompt": root} for name, root in zip(names, roots, strict=False)
    ]
    path.write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    return str(path)


def group(*ranks: Any, **columns: Any) -> dict[str, Any]:
    """Make a root with replies a, b, c, ... of these ranks; "-" = the reply has no rank."""
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
    assert dict(zip(row.columns["completions"], row.columns["ranks"], strict=True)) == {
        f"text of {k}": v for k, v in completions.items()
    }
    rows = OasstTrees(path, give="pairs").rows()
    assert [row.columns["chosen"][-1] + row.columns["rejected"][-1] for row in rows] == pairs
    assert all(row.origin == f"{path}:1 replies to root" for row in rows)


@pytest.mark.parametrize("ranks", [(0,), (None, None), ("-", "-", 0), (1, 1)])
def test_nothing_to_compare(tmp_path: Path, ranks: tuple[Any, ...]) -> None:
    for give in ("groups", "pairs"):
        with pytest.raises(ValueError, match=r"a\.jsonl: no group of ranked replies in the 1 train trees"):
            OasstTrees(write(tmp_path / "a.jsonl", group(*ranks)), give=give).rows()  # type: ignore[arg-type]


def thread(**later: Any) -> dict[str, Any]:
    """Make the tree root -> a (rank 1), b (rank 0) -> question -> c (rank 0), d (rank 1); ``later`` changes the
    question.
    """
    question = message("question", "prompter", (message("c", rank=0), message("d", rank=1)), **later)
    return message("root", "prompter", (message("a", rank=1), message("b", replies=(question,), rank=0)))


def names(path: str, give: str, **arguments: Any) -> list[str]:
    """Return the messages of each row, each as one word."""
    rows = OasstTrees(path, give=give, **arguments).rows()  # type: ignore[arg-type]
    return [" ".join(turn["content"].removeprefix("text of ") for turn in row.columns[COLUMN[give]]) for row in rows]


COLUMN = {"threads": "messages", "prompts": "prompt"}


def test_threads_and_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", thread())
    assert names(path, "threads") == ["root a", "root b question c", "root b question d"]
    assert names(path, "prompts") == ["root", "root b question"]
    (row, *_) = OasstTrees(path, give="threads").rows()
    assert row.columns == {
        "messages": [{"role": "user", "content": "text of root"}, {"role": "assistant", "content": "text of a"}]
    }
    assert row.origin == f"{path}:1 thread to a" and row.source == OasstTrees(path).rows()[0].source


def asked(name: str, *replies: dict[str, Any]) -> dict[str, Any]:
    return message(name, "prompter", replies)


@pytest.mark.parametrize(
    ("replies", "threads"),
    [
        ((), ["root a"]),
        ((asked("p"),), ["root a"]),
        ((asked("p"), asked("q")), ["root a"]),  # once, not once for each question that nobody answered
        ((asked("p"), asked("q", message("x"))), ["root a", "root a q x"]),
        ((asked("q", message("x")), asked("p")), ["root a q x"]),  # the thread to a is the first part of the other one
        ((asked("p", message("x"), message("y")),), ["root a p x", "root a p y"]),
        ((message("p", "prompter", deleted=True), asked("q", message("x"))), ["root a q x"]),
        ((message("p", "prompter", deleted=True),), ["root a"]),
        ((asked("p", message("x", synthetic=True)),), ["root a"]),  # what is left of p is a question without an answer
    ],
)
def test_threads_end_in_an_answer(tmp_path: Path, replies: tuple[Any, ...], threads: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", message("root", "prompter", (message("a", replies=replies),)))
    assert names(path, "threads") == threads


def test_no_thread_without_an_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", asked("root"))
    assert names(path, "prompts") == ["root"]
    with pytest.raises(
        ValueError, match=r"no thread that ends in an answer in the 1 train trees, with languages \('en',\)"
    ):
        names(path, "threads")
    with pytest.raises(ValueError, match="no prompt in the 1 train trees"):
        names(path, "prompts", languages=["de"])


def test_threads_go_through_the_best_replies(tmp_path: Path) -> None:
    question = asked("question", message("c"))  # c has no rank and no siblings: there was nothing to rank
    root = asked("root", message("a", rank=1), message("b", replies=(question,), rank=0), message("d", rank=None))
    path = write(tmp_path / "a.jsonl", root)
    assert names(path, "threads") == ["root a", "root b question c", "root d"]
    assert names(path, "threads", top_k=1) == ["root b question c"]
    assert names(path, "threads", top_k=2) == ["root a", "root b question c"]
    assert names(path, "prompts", top_k=1) == ["root", "root b question"]
    (row,) = OasstTrees(path, top_k=1).rows()
    assert row.columns["completions"] == ["text of b", "text of a"]  # what is compared is not affected


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
    example = preference_example(second, Reading("preference"))
    assert example is not None and example.ranks == [0, 1] and len(example.prompt) == 3


@pytest.mark.parametrize(
    "flaw",
    [{"deleted": True}, {"review_result": False}, {"synthetic": True}, {"lang": "de"}, {"deleted": True, "text": ""}],
)
def test_what_follows_a_flawed_message_is_left_out(tmp_path: Path, flaw: dict[str, Any]) -> None:
    (row,) = OasstTrees(write(tmp_path / "a.jsonl", thread(**flaw))).rows()
    assert row.columns["completions"] == ["text of b", "text of a"]
    kept = OasstTrees(
        write(tmp_path / "a.jsonl", thread(**flaw)), languages=["en", "de"], include_synthetic=True
    ).rows()
    assert len(kept) == (1 if {"deleted", "review_result"} & set(flaw) else 2)


def test_a_flawed_reply_leaves_its_group_alone(tmp_path: Path) -> None:
    root = message(
        "root", "prompter", (message("a", rank=0, synthetic=True), message("b", rank=1), message("c", rank=2))
    )
    (row,) = OasstTrees(write(tmp_path / "a.jsonl", root)).rows()
    assert row.columns["completions"] == ["text of b", "text of c"]


def test_unfinished_trees_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no group of ranked replies"):
        OasstTrees(write(tmp_path / "a.jsonl", group(0, 1), state="growing")).rows()


def test_trees_and_flat_messages_are_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", thread())
    flat: list[dict[str, Any]] = []

    def flatten(node: dict[str, Any], parent: str | None) -> None:
        flat.append(
            {**{k: v for k, v in node.items() if k != "replies"}, "parent_id": parent, "message_tree_id": TREES[0]}
        )
        for reply in node["replies"]:
            flatten(reply, node["message_id"])

    flatten(thread(), None)
    (tmp_path / "flat.jsonl").write_text("".join(json.dumps(node) + "\n" for node in flat))
    nested, rows = OasstTrees(path).rows(), OasstTrees(str(tmp_path / "flat.jsonl")).rows()
    assert [row.columns for row in rows] == [row.columns for row in nested]
    assert rows[1].origin == f"{tmp_path / 'flat.jsonl'}:4 replies to question"


def flat(*messages: tuple[str, Any]) -> list[dict[str, Any]]:
    return [
        {"message_id": name, "parent_id": parent, "text": "t", "role": "prompter" if parent is None else "assistant"}
        for name, parent in messages
    ]


BROKEN: list[tuple[list[dict[str, Any]], str]] = [
    (
        flat(("r", None), ("a", "b"), ("b", "a")),
        "a.jsonl:2: message a is its own ancestor; the parents of a tree must not form a circle",
    ),
    (flat(("r", None), ("a", "a")), "a.jsonl:2: message a is its own ancestor"),
    (flat(("r", None), ("a", "x")), "a.jsonl:2: message a replies to x, which is not in the file"),
    (flat(("r", None), ("r", None)), "a.jsonl:2: message r is there twice, first in .*a.jsonl:1"),
    ([message("r", "prompter", (message("a", replies=(message("r"),)),))], "a.jsonl:1: message r is there twice"),
    (
        [message("r", "prompter", (message("a", parent_id="b"),))],
        "a.jsonl:1: message a stands below r and says that its parent is b",
    ),
    (
        [message("r", "prompter", (message("a", "system"),))],
        "a.jsonl:1: message a has the role 'system', known are prompter, assistant",
    ),
    ([message("r", "prompter", (message("a", text=" "),))], "a.jsonl:1: message a has no text"),
    ([message("r", "prompter", (message("a", text=None),))], "a.jsonl:1: message a has no text"),
    (
        [message("r", "prompter", (message("a", rank=0.5),))],
        "a.jsonl:1: message a has the rank 0.5, a whole number or null was expected",
    ),
    ([message("r", "prompter", (message("a", rank=True),))], "a.jsonl:1: message a has the rank True"),
    ([message("r", "prompter", (message("a", rank=float("nan")),))], "a.jsonl:1: message a has the rank nan"),
    ([message("r", "prompter", (message("a", rank=float("inf")),))], "a.jsonl:1: message a has the rank inf"),
    (
        [message("r", "prompter", (message("a", ["assistant"]),))],
        "a.jsonl:1: message a has the role .'assistant'., known",
    ),
    (flat(("r", None), ("a", ["r"])), "a.jsonl:2: not a conversation tree: .* parent_id is text or null"),
    ([message("r", "prompter", (message("a", parent_id=["r"]),))], "a.jsonl:1: not a conversation tree: .* parent_id"),
    ([message("r", "prompter", ("text",))], "a.jsonl:1: not a conversation tree"),
    ([{**message("r"), "replies": {"a": 1}}], "a.jsonl:1: not a conversation tree: .* and replies are a list"),
    (
        [{**message("r", "prompter", ({"message_id": "a", "text": "t"},))}],
        "a.jsonl:1: message a has the role None, known are",
    ),
    (
        [{"prompt": "x", "completion": "y"}],
        "a.jsonl:1: not a conversation tree: a message needs a message_id, a text and a role",
    ),
]


@pytest.mark.parametrize(("records", "said"), BROKEN)
def test_broken_trees_say_where_in_one_sentence(tmp_path: Path, records: list[dict[str, Any]], said: str) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"message_tree_id": TREES[0], **record}) + "\n" for record in records)
    )
    for give in ("groups", "threads"):
        if give == "threads" and "has the rank" in said:
            continue  # threads without top_k do not read ranks
        with pytest.raises(ValueError, match=said) as raised:
            OasstTrees(str(tmp_path / "a.jsonl"), give=give).rows()  # type: ignore[arg-type]
        assert "\n" not in str(raised.value)


def test_arguments_and_missing_files() -> None:
    with pytest.raises(ValueError, match="split must be train or val, got 'test'"):
        OasstTrees("a.jsonl", split="test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give must be one of groups, pairs, threads, prompts, got 'rows'"):
        OasstTrees("a.jsonl", give="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        OasstTrees("a.jsonl", top_k=0)
    with pytest.raises(ValueError, match="^missing.jsonl: no such file$"):
        OasstTrees("missing.jsonl").rows()


def test_a_tree_is_on_one_side(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", group(0, 1), names=[HELD_OUT])
    assert len(OasstTrees(path, split="val").rows()) == 1
    with pytest.raises(ValueError, match="in the 0 train trees"):
        OasstTrees(path).rows()


def siblings(node: dict[str, Any]) -> list[list[tuple[int, str]]]:
    """Walk naively: for each message, its ranked assistant replies, best first."""
    ranked = sorted(
        (r["rank"], r["text"]) for r in node["replies"] if r["role"] == "assistant" and r.get("rank") is not None
    )
    return [ranked] * (len(ranked) > 1) + [found for reply in node["replies"] for found in siblings(reply)]


@pytest.mark.parametrize("name", ["en_100_tree.jsonl", "en_100_message.jsonl"])
def test_public_trees(name: str) -> None:
    if not OASST.is_dir():
        pytest.skip("the public OpenAssistant files are not here")
    path = str(OASST / name)
    train, val = (OasstTrees(path, split, include_synthetic=True).rows() for split in ("train", "val"))  # type: ignore[arg-type]
    records = [json.loads(line) for line in (OASST / name).read_text(encoding="utf-8").split("\n") if line]
    groups = [found for record in records for found in siblings(record.get("prompt", record))]
    assert (len(train), len(val), len(groups)) == (
        131,
        15,
        146,
    )  # 145 wholly ranked groups, and one where three of four are
    found = [list(zip(row.columns["ranks"], row.columns["completions"], strict=True)) for row in [*train, *val]]
    assert sorted(found) == sorted(groups)
    human = [OasstTrees(path, split).rows() for split in ("train", "val")]  # type: ignore[arg-type]
    assert [len(rows) for rows in human] == [127, 15]  # four groups were written by a model
    pairs = sum(len(OasstTrees(path, split, give="pairs").rows()) for split in ("train", "val"))  # type: ignore[arg-type]
    assert pairs == sum(
        len(r) * (len(r) - 1) // 2 for rows in human for r in [row.columns["ranks"] for row in rows]
    )  # no two are tied
    roots = [{row.columns["prompt"][0]["content"] for row in rows} for rows in human]
    assert not roots[0] & roots[1]
    for row in [*train, *val]:
        example = preference_example(row, Reading("preference"))
        assert example is not None and [turn["role"] for turn in example.prompt][::2] == ["user"] * (
            len(example.prompt) // 2 + 1
        )  # type: ignore[index]


def public_threads(node: dict[str, Any], before: tuple[str, ...], top_k: int | None) -> list[tuple[str, ...]]:
    """Walk naively by the rules: leaves, and before a leaf that is a prompter's first reply the thread up to it."""
    here = (*before, node["text"])
    if not node["replies"]:
        return [here] if node["role"] == "assistant" else []
    found = [here] if node["replies"][0]["role"] == "prompter" and not node["replies"][0]["replies"] else []
    for reply in node["replies"]:
        rank = reply.get("rank")
        good = top_k is None or (len(node["replies"]) == 1 if rank is None else rank < top_k)
        found += public_threads(reply, here, top_k) if reply["role"] == "prompter" or good else []
    return found


@pytest.mark.parametrize(("top_k", "count"), [(None, 380), (1, 70), (2, 199)])
def test_public_threads(top_k: int | None, count: int) -> None:
    if not OASST.is_dir():
        pytest.skip("the public OpenAssistant files are not here")
    path = OASST / "en_100_tree.jsonl"
    train, val = (
        OasstTrees(str(path), split, include_synthetic=True, give="threads", top_k=top_k).rows()
        for split in ("train", "val")
    )  # type: ignore[arg-type]
    found = [tuple(turn["content"] for turn in row.columns["messages"]) for row in [*train, *val]]
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert sorted(found) == sorted(
        thread for record in records for thread in public_threads(record["prompt"], (), top_k)
    )
    assert len(found) == len(set(found)) == count
    assert not {thread[0] for thread in found[: len(train)]} & {thread[0] for thread in found[len(train) :]}
    for row in train:
        roles = [turn["role"] for turn in row.columns["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_public_prompts() -> None:
    if not OASST.is_dir():
        pytest.skip("the public OpenAssistant files are not here")
    path = str(OASST / "en_100_tree.jsonl")
    rows = [
        row
        for split in ("train", "val")
        for row in OasstTrees(path, split, include_synthetic=True, give="prompts").rows()
    ]  # type: ignore[arg-type]
    assert len(rows) == 322  # every message of a prompter: 797 messages, 475 of them from assistants
    assert all(row.columns["prompt"][-1]["role"] == "user" for row in rows)


def test_public_seed_data() -> None:
    """The file is flat, names its columns in its own way and has no ranks. Five of its 52 roots are marked as not
    ready.
    """
    if not OASST.is_dir():
        pytest.skip("the public OpenAssistant files are not here")
    path = str(OASST / "realistic_seed_data.json")
    counts = [
        sum(len(OasstTrees(path, split, give=give).rows()) for split in ("train", "val"))
        for give in ("prompts", "threads")
    ]  # type: ignore[arg-type]
    assert counts == [103, 98]  # of 127 prompts; counted with a dictionary of replies by parent_message_id
    with pytest.raises(ValueError, match=r"no group of ranked replies in the 50 train trees"):
        OasstTrees(path).rows()


@pytest.mark.parametrize("name", ["en_100_text.jsonl", "prompt_lottery_en_250_text.jsonl"])
def test_files_of_prompts_alone_are_refused(name: str) -> None:
    if not OASST.is_dir():
        pytest.skip("the public OpenAssistant files are not here")
    with pytest.raises(ValueError, match=r":1: not a conversation tree: a message needs a message_id"):
        OasstTrees(str(OASST / name)).rows()
