"""OpenAssistant conversation trees (arXiv 2304.07327): threads for SFT, prompts, and ranked replies to one message."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

from datamodules.formats.reading import as_number
from datamodules.sources.files import read_file
from datamodules.sources.source import Row, Source

HELD_OUT_ONE_IN = 10
ROLES = {"prompter": "user", "assistant": "assistant"}
GIVES = {
    "groups": "group of ranked replies",
    "pairs": "group of ranked replies",
    "threads": "thread that ends in an answer",
    "prompts": "prompt",
}


@dataclass
class Node:
    """A message of a tree."""

    message: dict[str, Any]
    parent: str | None  # message_id
    origin: str
    replies: list["Node"] = field(default_factory=list)


class OasstTrees(Source):
    """Makes rows of conversation trees. ``give`` says what a row is:

    - ``groups``: ranked assistant replies to one message, as ``prompt`` (the thread as messages), ``completions`` and
      ``ranks`` (0 = best).
    - ``pairs``: each pair of a group, as ``prompt``, ``chosen`` and ``rejected``.
    - ``threads``: ``messages`` from the root to each last assistant message, for SFT. A thread that ends in a
      prompter's message is kept without it, if that message is the first reply. So no thread occurs twice.
    - ``prompts``: ``prompt``, the messages from the root to each prompter's message, for RL.

    A line of the file is a tree, with messages nested in ``replies``, or one message with its ``parent_id``. About one
    tree in ten is held out by a fixed hash of its id, so no thread is partly on both sides.

    A message is left out, with all that follows it, when it is deleted, failed its review, is synthetic or is in
    another language. So is a tree that is not ready for export. Only replies of different ranks are compared; replies
    without a rank never are.

    Args:
        path: the file.
        split: ``train``, or ``val`` for the held-out trees.
        languages: languages that all messages of a thread must have.
        include_synthetic: keep messages that a model wrote.
        give: ``groups``, ``pairs``, ``threads`` or ``prompts``.
        top_k: threads follow only assistant messages with a rank below this, >= 1, or without a rank if they have no
            siblings. None = all. It does not affect which replies are compared.

    Raises:
        ValueError: an argument is not one of its values.
    """

    def __init__(
        self,
        path: str,
        split: Literal["train", "val"] = "train",
        languages: Sequence[str] = ("en",),
        include_synthetic: bool = False,
        give: Literal["groups", "pairs", "threads", "prompts"] = "groups",
        top_k: int | None = None,
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split must be train or val, got {split!r}")
        if give not in GIVES:
            raise ValueError(f"give must be one of {', '.join(GIVES)}, got {give!r}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.path, self.split, self.languages = path, split, tuple(languages)
        self.include_synthetic, self.give, self.top_k = include_synthetic, give, top_k

    def rows(self) -> list[Row]:
        """Return the rows in file order. Raises ValueError with file and line, or when no row is left."""
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ValueError(f"{self.path}: no such file")
        records = read_file(path)
        roots = [root for root in _trees(records) if is_held_out(_tree_id(root)) == (self.split == "val")]
        rows = [row for root in roots for row in self._rows(root, records[0].source)]
        if not rows:
            raise ValueError(
                f"{path}: no {GIVES[self.give]} in the {len(roots)} {self.split} trees, with languages {self.languages}"
            )
        return rows

    def _rows(self, root: Node, source: str) -> Iterator[Row]:
        for node, thread in self._walk(root):
            name, role = node.message["message_id"], node.message["role"]
            if self.give == "threads" and role == "assistant" and self._ends(node):
                yield Row({"messages": thread}, f"{node.origin} thread to {name}", source)
            elif self.give == "prompts" and role == "prompter":
                yield Row({"prompt": thread}, f"{node.origin} thread to {name}", source)
            elif self.give in ("groups", "pairs"):
                for columns in self._compared(node):
                    yield Row({"prompt": thread, **columns}, f"{node.origin} replies to {name}", source)

    def _walk(self, root: Node) -> Iterator[tuple[Node, list[dict[str, str]]]]:
        """Yield every message of the tree that is kept, depth first, with the thread that ends in it."""
        waiting = [(root, [_turn(root)])] if self._kept(root) else []
        while waiting:
            node, thread = waiting.pop()
            yield node, thread
            waiting += [(reply, [*thread, _turn(reply)]) for reply in reversed(self._continued(node))]

    def _continued(self, node: Node) -> list[Node]:
        """Return the replies that threads follow."""
        kept = [reply for reply in node.replies if self._kept(reply)]
        if self.top_k is None:
            return kept
        alone = len(node.replies) == 1
        ranks = [(reply, _rank(reply)) for reply in kept]
        return [
            reply
            for reply, rank in ranks
            if reply.message.get("role") != "assistant" or (alone if rank is None else rank < self.top_k)
        ]

    def _ends(self, node: Node) -> bool:
        replies = self._continued(node)
        return not replies or (replies[0].message.get("role") == "prompter" and not self._continued(replies[0]))

    def _compared(self, node: Node) -> Iterator[dict[str, Any]]:
        replies = [reply for reply in node.replies if self._kept(reply) and _turn(reply)["role"] == "assistant"]
        group = sorted(
            ((rank, reply) for reply in replies if (rank := _rank(reply)) is not None), key=lambda item: item[0]
        )
        if self.give == "pairs":
            for (best, chosen), (worst, rejected) in combinations(group, 2):
                if best < worst:
                    yield {"chosen": chosen.message["text"], "rejected": rejected.message["text"]}
        elif len({rank for rank, _ in group}) > 1:
            yield {"completions": [reply.message["text"] for _, reply in group], "ranks": [rank for rank, _ in group]}

    def _kept(self, node: Node) -> bool:
        message = node.message
        if message.get("deleted") or message.get("review_result") is False or message.get("tree_state", READY) != READY:
            return False
        return message.get("lang") in (None, *self.languages) and (
            self.include_synthetic or not message.get("synthetic")
        )


READY = "ready_for_export"


def is_held_out(tree_id: str) -> bool:
    """Return whether a tree is held out. The hash is fixed, so the answer is the same in every process."""
    return crc32(tree_id.encode()) % HELD_OUT_ONE_IN == 0


def _tree_id(root: Node) -> str:
    return str(root.message.get("message_tree_id") or root.message["message_id"])


def _turn(node: Node) -> dict[str, str]:
    role, text = node.message.get("role"), node.message.get("text")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(
            f"{node.origin}: message {node.message['message_id']} has the role {role!r}, known are {', '.join(ROLES)}"
        )
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{node.origin}: message {node.message['message_id']} has no text")
    return {"role": ROLES[role], "content": text}


def _rank(node: Node) -> int | None:
    rank = node.message.get("rank")
    if rank is None:
        return None
    number = None if isinstance(rank, bool | str) else as_number(rank)
    if number is None or number != int(number):
        raise ValueError(
            f"{node.origin}: message {node.message['message_id']} has the rank {rank!r}, a whole number or null was "
            "expected"
        )
    return int(number)


def _trees(records: list[Row]) -> list[Node]:
    """Link the messages and return the roots. Raises ValueError when no root leads to a message."""
    nodes: dict[str, Node] = {}
    for record in records:
        for node in _messages(record):
            name = node.message["message_id"]
            if name in nodes:
                raise ValueError(f"{node.origin}: message {name} is there twice, first in {nodes[name].origin}")
            nodes[name] = node
    for node in nodes.values():
        if node.parent is not None and node.parent not in nodes:
            raise ValueError(
                f"{node.origin}: message {node.message['message_id']} replies to {node.parent}, which is not in the "
                "file"
            )
        if node.parent is not None:
            nodes[node.parent].replies.append(node)
    roots = [node for node in nodes.values() if node.parent is None]
    reached: set[str] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        reached.add(node.message["message_id"])
        waiting += node.replies
    for name, node in nodes.items():
        if name not in reached:
            raise ValueError(
                f"{node.origin}: message {name} is its own ancestor; the parents of a tree must not form a circle"
            )
    return roots


def _messages(record: Row) -> Iterator[Node]:
    """Yield the messages of one line: a tree, a message with its replies, or one message."""
    root = record.columns.get("prompt", record.columns)
    if isinstance(root, dict) and root is not record.columns:
        root = {
            **root,
            **{name: record.columns[name] for name in ("message_tree_id", "tree_state") if name in record.columns},
        }
    elif "user_message_id" in record.columns:  # the seed data, which uses other names
        root = {
            **record.columns,
            "message_id": record.columns["user_message_id"],
            "parent_id": record.columns.get("parent_message_id"),
        }
    waiting: list[tuple[Any, str | None]] = [(root, root.get("parent_id") if isinstance(root, dict) else None)]
    while waiting:
        message, parent = waiting.pop()
        replies = (message.get("replies") or []) if isinstance(message, dict) else None
        if (
            not isinstance(message, dict)
            or not isinstance(name := message.get("message_id"), str)
            or not isinstance(said := message.get("parent_id"), str | None)
            or not isinstance(replies, list)
        ):
            raise ValueError(
                f"{record.origin}: not a conversation tree: a message needs a message_id, a text and a role, its "
                "parent_id is text or null, and replies are a list"
            )
        yield Node(message, parent, record.origin)
        if said not in (None, parent):
            raise ValueError(
                f"{record.origin}: message {name} stands below {parent} and says that its parent is {said}"
            )
        waiting += [(reply, name) for reply in reversed(replies)]
