"""TokenPicture shows what the loss sees, from the batch itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text as Drawn

from callbacks.token_picture import (
    MAX_TOKENS,
    WIDTH,
    PictureRow,
    Piece,
    TokenPicture,
    cut_pieces,
    draw_tokens,
    find_rows,
    style_pieces,
    wrap_pieces,
)
from datamodules import InstructionDataModule
from datamodules.sources import Row as SourceRow
from datamodules.sources import Source
from modules import SFTModule
from modules.__main__ import main
from modules.networks.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHAT = [{"role": "user", "content": "Größe?"}, {"role": "assistant", "content": "1 [m]\n$2$"}]
RETURN = "\N{RETURN SYMBOL}\n"


class Chats(Source):
    def rows(self) -> list[SourceRow]:
        return [SourceRow({"messages": CHAT}, f"chats:{place}", "chats") for place in range(4)]


def row(prompt: str, answer: str, starts: tuple[int, ...] = (0,)) -> PictureRow:
    before, learned = (TOKENIZER(text, add_special_tokens=False).input_ids for text in (prompt, answer))
    return PictureRow(before + learned, [False] * len(before) + [True] * len(learned), list(starts))


def text(pieces: list[Piece], kind: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def runs(folder: Path, *callbacks: Callback, **options: Any) -> None:
    rows = InstructionDataModule(tiny_tokenizer(), Chats(), batch_size=2)
    options = {"logger": TensorBoardLogger(folder, name="logs", version=""), "max_epochs": 2, **options}
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet, **options).fit(SFTModule("tiny"), datamodule=rows)


@pytest.fixture
def events(request: pytest.FixtureRequest) -> Any:
    """Give events(folder), which reads what a run wrote to TensorBoard."""
    return type(request.getfixturevalue("fit")(Callback(), [[]]))


def test_the_first_batch_of_a_fit_is_shown_once(
    tmp_path: Path, events: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = TokenPicture(num_rows=1)
    runs(tmp_path, picture)
    printed = capsys.readouterr().out
    assert printed.count("row 1 of 2") == 1 and "row 2" not in printed
    # The answer and its end of turn are learned, nothing else; no terminal, so brackets stand in for colours.
    assert (
        f"<|im_start|>assistant{RETURN}\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}1\N{MIDDLE DOT}[m]{RETURN}$2$<|im_end|>"
        in printed
    )
    assert printed.count("\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}") == 1
    assert "Größe?<|im_end|>" in printed and "<|pad|>" not in printed
    ((step, width, height),) = events(tmp_path / "logs").images("data/token_picture")
    assert step == 0
    assert width > 600 and height > 60
    runs(tmp_path, picture)
    assert capsys.readouterr().out.count("row 1 of 2") == 1  # another fit


def test_rows_come_from_the_masks() -> None:
    batch = {
        "input_ids": torch.tensor(
            [[5, 6, 7, 8, 9, 0], [5, 0, 6, 0, 0, 0]]
        ),  # 0 is a token in the middle and padding at the end
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]),
        "loss_mask": torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).bool(),
    }
    first, second = find_rows(batch)
    assert first == PictureRow([5, 6, 7, 8, 9], [False, True, False, False, True], [0])
    assert second == PictureRow([5, 0, 6], [False] * 3, [0])
    packed, _ = find_rows({**batch, "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 0, 0]])})
    assert packed.starts == [0, 2]  # not 5, which is padding


def test_completions_stand_behind_their_prompts() -> None:
    batch = {
        "prompt_ids": torch.tensor([[5, 6], [7, 0]]),
        "prompt_mask": torch.tensor([[True, True], [True, False]]),
        "completion_ids": torch.tensor([[8, 9], [10, 0], [11, 12]]),
        "completion_mask": torch.tensor([[True, True], [True, False], [True, True]]),
        "prompt_index": torch.tensor([1, 0, 0]),
    }
    assert [found.ids for found in find_rows(batch)] == [[7, 8, 9], [5, 6, 10], [5, 6, 11, 12]]
    assert find_rows(batch)[1].learned == [False, False, True]
    assert find_rows({"prompt_ids": batch["prompt_ids"]}) == []


def test_characters_of_several_tokens_and_white_space() -> None:
    pieces = cut_pieces(TOKENIZER, row("a b\tc", "ü\n日"))
    assert text(pieces, "context") == "a\N{MIDDLE DOT}b\N{RIGHTWARDS ARROW}c"
    assert [piece.text for piece in pieces if piece.kind == "learned"] == ["ü", RETURN, "日"]
    half = PictureRow(TOKENIZER("日", add_special_tokens=False).input_ids, [False, True, True], [0])
    assert [piece.kind for piece in cut_pieces(TOKENIZER, half)] == [
        "context",
        "learned",
    ]  # nothing is coloured that is not learned


def test_documents_are_parted() -> None:
    pieces = cut_pieces(TOKENIZER, row("ab", "cd", (0, 3)))
    assert [(piece.text, piece.kind) for piece in pieces if piece.kind != "mark"] == [
        ("a", "context"),
        ("b", "context"),
        ("c", "learned"),
        ("d", "learned"),
    ]
    assert [place for place, piece in enumerate(pieces) if piece.kind == "mark"] == [3]
    assert "next document" in pieces[3].text


def test_long_rows_show_what_is_learned() -> None:
    first, *shown, last = cut_pieces(TOKENIZER, row("p" * 900, "x" * 250))
    assert (first.text, last.text) == (
        "(700 tokens before)\n",
        "\n(50 tokens behind)",
    )  # 200 of context before token 900, 400 in all
    assert (text(shown, "context"), text(shown, "learned")) == ("p" * 200, "x" * 200)
    first, *shown = cut_pieces(TOKENIZER, row("p" * 500, "x" * 10))
    assert (first.text, len(shown)) == ("(110 tokens before)\n", MAX_TOKENS)  # to the end
    assert cut_pieces(TOKENIZER, row("p", "x"))[0].kind == "context"


def test_colours_and_brackets() -> None:
    pieces = [Piece("row\n", "mark"), Piece("[bold]", "context"), Piece("y", "learned"), Piece("es", "learned")]
    plain = style_pieces(pieces, marked=False)
    assert plain.plain == "row\n[bold]yes"
    assert {plain.plain[span.start : span.end]: str(span.style) for span in plain.spans}["yes"] == "black on green"
    brackets = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}yes\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"
    assert style_pieces(pieces, marked=True).plain == f"row\n[bold]{brackets}"


def test_lines_wrap_and_join() -> None:
    pieces = [
        Piece("a" * (WIDTH - 1), "context"),
        Piece("日", "context"),
        Piece("b", "learned"),
        Piece(f"c{RETURN}d", "learned"),
    ]
    assert wrap_pieces(pieces) == [
        [Piece("a" * (WIDTH - 1), "context")],  # the wide character does not fit in the last column
        [Piece("日", "context"), Piece("bc\N{RETURN SYMBOL}", "learned")],
        [Piece("d", "learned")],
    ]


def test_the_figure_draws_text_as_it_is() -> None:
    figure = draw_tokens([[Piece("$x$ ", "context"), Piece("a_b", "learned")], [Piece("c", "learned")]])
    (axes,) = figure.axes
    drawn = [found for found in axes.texts if isinstance(found, Drawn)]
    assert [found.get_text() for found in drawn] == ["$x$ ", "a_b", "c"]
    assert not any(found.get_parse_math() for found in drawn)
    assert [found.get_position() for found in drawn] == [(0, 0), (4, 0), (0, 1)]
    colors = [patch.get_facecolor() for patch in axes.patches]
    assert colors[1] == colors[2] != colors[0]
    FigureCanvasAgg(figure).draw()
    columns = axes.transData.transform([[0, 0], [3, 0]])[:, 0]  # pixels
    assert drawn[1].get_window_extent().width == pytest.approx(columns[1] - columns[0], abs=2)  # on its background


def test_the_overlay_prints_the_picture_of_a_config_and_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = Path(__file__).parents[2] / "configs"
    monkeypatch.chdir(tmp_path)
    main(
        [
            "fit",
            "--config",
            str(configs / "tiny/sft.yaml"),
            "--config",
            str(configs / "overlays/show_batch.yaml"),
            "--data.batch_size=2",
            "--data.train.num_examples=40",
        ]
    )
    assert capsys.readouterr().out.count(" learned\n") == 2
    assert list(tmp_path.iterdir()) == []


def test_other_batches_and_arguments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, callbacks=[TokenPicture()], **quiet).fit(
            BoringModel()
        )  # type: ignore[arg-type]
    assert any("nothing to show" in message for message in caplog.messages)
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        TokenPicture(0)
