"""Packs several documents into one row by best-fit decreasing, which breaks no document; splits documents longer than a
row.
"""

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Sequence

from datamodules.tokens.encoding import Tokens


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Find the documents of each row, by their place in ``lengths``, in O(n log n).

    From the longest on, each document goes to the row with the least room that takes it, else to a new row. Among
    documents of equal length the first goes first, among rows with equal room the one that has had this room longest
    (``trl.data_utils``, strategy ``bfd``). Example: ``lengths`` [4, 2, 3, 1] and ``capacity`` 4 make the rows [0], [2,
    3], [1]. Raises ValueError for a longer document.
    """
    rows: list[list[int]] = []
    waiting: dict[int, deque[int]] = defaultdict(deque)  # room -> the rows that have it
    rooms: list[int] = []  # those of ``waiting`` that are not empty, ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(
                f"document {index} has {length} tokens and a row {capacity}; drop or split it before packing"
            )
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = waiting[room].popleft()
            if not waiting[room]:
                rooms.pop(place)
        rows[row].append(index)
        if room > length:
            if not waiting[room - length]:
                insort(rooms, room - length)
            waiting[room - length].append(row)
    return rows


def pack(rows: Sequence[Tokens], capacity: int) -> list[Tokens]:
    """Pack documents into rows of at most ``capacity`` tokens, each with its ``documents``. Nothing predicts a
    document's first token, so it is not supervised.
    """
    return [
        _join([rows[index] for index in indices])
        for indices in best_fit_decreasing([len(row.ids) for row in rows], capacity)
    ]


def split_long(tokens: Tokens, capacity: int) -> list[Tokens]:
    """Split a document into pieces of at most ``capacity`` tokens. Each piece begins a row or document of its own, so
    its first token is not supervised.
    """
    pieces = [slice(start, start + capacity) for start in range(0, len(tokens.ids), capacity)]
    return [Tokens(tokens.ids[piece], [False, *tokens.supervised[piece][1:]]) for piece in pieces]


def _join(rows: Sequence[Tokens]) -> Tokens:
    return Tokens(
        [token for row in rows for token in row.ids],
        [place > 0 and learned for row in rows for place, learned in enumerate(row.supervised)],
        tuple(len(row.ids) for row in rows),
    )
