"""Which tokens are learned? The first training batch, token by token."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from callbacks.phase import tensorboards

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TOKENS = 400  # of a row that are shown
LEAD = 200  # of them before the first learned one, where a row is longer
WIDTH = 100  # columns of a line
TYPE_WIDTH = 0.602  # of DejaVu Sans Mono, of its size
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders give for an unfinished character
VISIBLE = str.maketrans(
    {
        " ": "\N{MIDDLE DOT}",
        "\n": "\N{RETURN SYMBOL}\n",
        "\r": "\N{SYMBOL FOR CARRIAGE RETURN}",
        "\t": "\N{RIGHTWARDS ARROW}",
    }
)
BRACKETS = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}{}\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"
STYLES = {"learned": "black on green", "context": "bright_black", "mark": "italic cyan"}
COLORS = {"learned": "#a6e3a1", "context": "#e6e6e6", "mark": "white"}  # backgrounds of the figure

Kind = Literal["learned", "context", "mark"]


class Piece(NamedTuple):
    """Text of one colour."""

    text: str
    kind: Kind  # learned token, token that is only read, or a remark of ours


class PictureRow(NamedTuple):
    """One row without its padding."""

    ids: list[int]  # [T]
    learned: list[bool]  # [T]
    starts: list[int]  # where its documents begin


class HasTokenizer(Protocol):
    """What is read of the module."""

    tokenizer: Any


class TokenPicture(Callback):
    """Shows the first rows of the first batch that a fit trains on, read from the batch itself: learned tokens
    coloured, the others grey.

    As a figure in TensorBoard, ``data/token_picture``, and in the console; where that has no colours, learned tokens
    stand in double brackets. Spaces show as middle dots, line breaks as arrows; special tokens show as their text,
    padding not at all; documents that are packed into one row are parted by a line. Of a row longer than 400 tokens the
    part around the first learned one is shown.

    Args:
        num_rows: rows to show, at least 1: conversations, or prompts with one completion each.

    Raises:
        ValueError: ``num_rows`` below 1.
    """

    def __init__(self, num_rows: int = 3) -> None:
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}.")
        self.num_rows = num_rows
        self.shown = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new fit shows its own first batch."""
        self.shown = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the batch if it is the first, from rank zero."""
        if self.shown or not trainer.is_global_zero:
            return
        self.shown = True
        rows = find_rows(batch)
        if not rows:
            rank_zero_info(
                "token picture: the batch holds neither rows of tokens nor completions, so there is nothing to show"
            )
            return
        tokenizer = cast(HasTokenizer, pl_module).tokenizer
        pieces: list[Piece] = []
        for number, row in enumerate(rows[: self.num_rows]):
            title = f"row {number + 1} of {len(rows)}: {len(row.ids)} tokens, {sum(row.learned)} learned"
            pieces += [Piece(f"{title}\n", "mark"), *cut_pieces(tokenizer, row), Piece("\n\n", "mark")]
        console = Console()
        console.print(style_pieces(pieces, marked=console.color_system is None))
        for logger in tensorboards(trainer):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # drawn as boxes
                logger.experiment.add_figure(
                    "data/token_picture", draw_tokens(wrap_pieces(pieces)), global_step=trainer.global_step
                )


def find_rows(batch: Any) -> list[PictureRow]:
    """The rows of an ``InstructionBatch``, or the completions of a ``PreferenceBatch`` or ``PolicyBatch``, each behind
    its prompt; none of others.
    """
    if not isinstance(batch, Mapping):
        return []
    if "loss_mask" in batch:
        ids, kept, learned = batch["input_ids"], batch["attention_mask"].bool(), batch["loss_mask"].bool()  # [N, T]
        positions = batch.get("position_ids")
        starts = (
            [[0]] * len(ids)
            if positions is None
            else [(row[keep] == 0).nonzero()[:, 0].tolist() for row, keep in zip(positions, kept, strict=True)]
        )
        parts = zip(ids, kept, learned, starts, strict=True)
        return [PictureRow(row[keep].tolist(), mask[keep].tolist(), begin) for row, keep, mask, begin in parts]
    if "completion_ids" not in batch:
        return []
    prompts = [row[keep].tolist() for row, keep in zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)]
    completions = [
        row[keep].tolist() for row, keep in zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
    ]
    both = [(prompts[prompt], ids) for prompt, ids in zip(batch["prompt_index"].tolist(), completions, strict=True)]
    return [PictureRow(prompt + ids, [False] * len(prompt) + [True] * len(ids), [0]) for prompt, ids in both]


def cut_pieces(tokenizer: Any, row: PictureRow) -> list[Piece]:
    """The row as text, one piece per token or per character of several tokens; at most MAX_TOKENS tokens."""
    first = row.learned.index(True) if any(row.learned) else 0
    start = max(0, min(first - LEAD, len(row.ids) - MAX_TOKENS))
    end = min(start + MAX_TOKENS, len(row.ids))
    borders = [start, *(place for place in row.starts if start < place < end), end]
    pieces = [Piece(f"({start} tokens before)\n", "mark")] if start else []
    for document, (left, right) in enumerate(zip(borders, borders[1:], strict=False)):
        if document:
            pieces.append(Piece("\n---- next document ----\n", "mark"))
        pieces += _cut_document(tokenizer, row.ids[left:right], row.learned[left:right])
    return pieces + ([Piece(f"\n({len(row.ids) - end} tokens behind)", "mark")] if end < len(row.ids) else [])


def _cut_document(tokenizer: Any, ids: Sequence[int], learned: Sequence[bool]) -> Iterator[Piece]:
    """What each token adds to the text before it. One that ends inside a character waits for the next, but not for one
    of the other kind.
    """
    done = ""
    for place, kind in enumerate(learned):
        text = tokenizer.decode(ids[: place + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        waits = text.endswith(REPLACEMENT) and place + 1 < len(ids) and learned[place + 1] == kind
        if not waits:
            yield Piece(text[len(done) :].translate(VISIBLE), "learned" if kind else "context")
            done = text


def style_pieces(pieces: Sequence[Piece], marked: bool) -> Text:
    """For the console; ``marked`` puts double brackets around runs of learned pieces."""
    text = Text()
    for kind, run in groupby(pieces, key=lambda piece: piece.kind):
        joined = "".join(piece.text for piece in run)
        text.append(BRACKETS.format(joined) if marked and kind == "learned" else joined, STYLES[kind])
    return text


def wrap_pieces(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces in lines of at most WIDTH columns."""
    lines: list[list[Piece]] = [[]]
    column = 0
    for text, kind in pieces:
        for character in text:
            if character == "\n" or column + cell_len(character) > WIDTH:
                lines.append([])
                column = 0
            if character == "\n":
                continue
            line = lines[-1]
            if line and line[-1].kind == kind:
                line[-1] = Piece(line[-1].text + character, kind)
            else:
                line.append(Piece(character, kind))
            column += cell_len(character)
    return lines


def draw_tokens(lines: Sequence[Sequence[Piece]]) -> "Figure":
    """A figure that is as high as the lines need, each piece on its background. A column is 8 whole pixels, since type
    is set on whole pixels.
    """
    from matplotlib.figure import Figure

    width, height = 0.08, 0.17  # of a column and of a line, inches
    figure = Figure(figsize=((WIDTH + 2) * width, (len(lines) + 1) * height), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-1, WIDTH + 1), ylim=(len(lines) + 0.5, -0.5))
    axes.axis("off")
    for number, line in enumerate(lines):
        column = 0
        for text, kind in line:
            axes.barh(number, cell_len(text), height=1.0, left=column, color=COLORS[kind])
            axes.text(
                column,
                number,
                text,
                parse_math=False,
                family="DejaVu Sans Mono",
                fontsize=72 * width / TYPE_WIDTH,
                va="center",
            )
            column += cell_len(text)
    return figure
