"""Which tokens are learned? Shows the first training batch, token by token."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from callbacks.phase import find_tensorboards
from modules.types import PolicyBatch, find_attended, make_printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TOKENS = 400  # most tokens shown of a row
LEAD = 200  # most of these before the first learned token
WIDTH = 100  # columns of a line
TYPE_WIDTH = 0.602  # width of a character of DejaVu Sans Mono, in units of the font size
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # decoders return it for an unfinished character
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
    """A piece of text in one colour."""

    text: str
    kind: Kind  # a learned token, a token that is only read, or a remark of the picture


class PictureRow(NamedTuple):
    """One row of a batch without its padding."""

    ids: list[int]  # [T]
    learned: list[bool]  # [T]
    starts: list[int]  # positions where its documents begin


class HasTokenizer(Protocol):
    """The part of a module that ``TokenPicture`` reads."""

    tokenizer: Any


class TokenPicture(Callback):
    """Shows the first rows of a fit's first training batch, with the learned tokens coloured and the others grey.

    It reads the batch itself, after collating. The picture goes to TensorBoard as the figure ``data/token_picture`` and
    to the console. A console without colours shows learned tokens in double brackets.

    Spaces show as middle dots and line breaks as return signs. Special tokens show as their text, and padding is left
    out. A line separates documents that are packed into one row. For a row longer than 400 tokens it shows the part
    around the first learned token.

    Args:
        num_rows: rows to show, at least 1. A row is a conversation, or a prompt with one completion.

    Raises:
        ValueError: ``num_rows`` is below 1.
    """

    def __init__(self, num_rows: int = 3) -> None:
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}.")
        self.num_rows = num_rows
        self.shown = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit, so that a new one shows its own first batch."""
        self.shown = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the first batch, on rank zero."""
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
        for logger in find_tensorboards(trainer):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # drawn as boxes
                logger.experiment.add_figure(
                    "data/token_picture", draw_tokens(wrap_pieces(pieces)), global_step=trainer.global_step
                )


def find_rows(batch: Any) -> list[PictureRow]:
    """Return the rows of a batch without padding; none for a batch of another kind.

    They are the rows of an ``InstructionBatch``, or the completions of a ``PreferenceBatch`` or ``PolicyBatch``, each
    after its prompt.
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
    kept = find_attended(cast(PolicyBatch, batch)).bool()
    parts = zip(
        batch["prompt_index"].tolist(), batch["completion_ids"], batch["completion_mask"].bool(), kept, strict=True
    )
    return [
        PictureRow(prompts[prompt] + row[keep].tolist(), [False] * len(prompts[prompt]) + learned[keep].tolist(), [0])
        for prompt, row, learned, keep in parts
    ]


def cut_pieces(tokenizer: Any, row: PictureRow) -> list[Piece]:
    """Return a row as text, at most MAX_TOKENS tokens of it.

    Each token makes one piece; several tokens that form one character make one piece together.
    """
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
    """Yield the text that each token adds to the text before it.

    A token that ends inside a character is joined with the next token, unless only one of the two is learned.
    """
    done = ""
    for place, kind in enumerate(learned):
        text = tokenizer.decode(ids[: place + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        waits = text.endswith(REPLACEMENT) and place + 1 < len(ids) and learned[place + 1] == kind
        if not waits:
            yield Piece(text[len(done) :].translate(VISIBLE), "learned" if kind else "context")
            done = text


def style_pieces(pieces: Sequence[Piece], marked: bool) -> Text:
    """Return the text for the console. ``marked`` puts double brackets around runs of learned pieces."""
    text = Text()
    for kind, run in groupby(pieces, key=lambda piece: piece.kind):
        joined = make_printable("".join(piece.text for piece in run))
        text.append(BRACKETS.format(joined) if marked and kind == "learned" else joined, STYLES[kind])
    return text


def wrap_pieces(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Break the pieces into lines of at most WIDTH columns."""
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
    """Draw a figure as high as the lines need, each piece on its background.

    A column is 8 whole pixels wide, because text is placed on whole pixels.
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
