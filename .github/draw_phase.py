"""Draws .github/phase.svg, how a phase runs, from the description below: ``python .github/draw_phase.py``."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

BLUE, GREEN, ORANGE, GREY = "#dbe9f6", "#dff0d8", "#fdebd0", "#eeeeee"
BOXES = {  # name: (x, y, title, what it does, colour)
    "source": (0, 2, "source", "file, hub id, toy", BLUE),
    "data": (1, 2, "DataModule", "formats, tokens", BLUE),
    "loader": (2, 2, "phase loader", "one epoch = one phase", BLUE),
    "step": (3, 2, "training_step", "the loss, one page", GREEN),
    "trainer": (4, 2, "Trainer", "optimiser, checkpoints", GREY),
    "collect": (2, 1, "module.collect", "once a phase", GREEN),
    "engine": (1, 0, "rollout engine", "samples completions", GREEN),
    "reward": (2, 0, "rewards", "rules, models, judges", GREEN),
    "advantage": (3, 0, "advantages", "and log-probs", GREEN),
    "callbacks": (4, 0, "callbacks", "is the run healthy?", ORANGE),
}
ARROWS = [  # from, to, what travels
    ("source", "data", "rows"),
    ("data", "loader", "prompts"),
    ("loader", "step", "micro-\nbatches"),
    ("step", "trainer", "loss"),
    ("loader", "collect", "prompts"),
    ("collect", "engine", ""),
    ("engine", "reward", "rollouts"),
    ("reward", "advantage", "scores"),
    ("advantage", "loader", "PolicyBatch"),
    ("advantage", "callbacks", "record"),
    ("trainer", "callbacks", "hooks"),
]
WIDTH, HEIGHT, ACROSS, UP = 1.7, 0.62, 2.6, 1.25


def centre(name: str) -> tuple[float, float]:
    """Where the middle of a box is."""
    return BOXES[name][0] * ACROSS, BOXES[name][1] * UP


def border(start: str, end: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """The points of two boxes' borders that an arrow joins."""
    (x, y), (u, v) = centre(start), centre(end)
    if BOXES[start][1] == BOXES[end][1]:
        side = WIDTH / 2 if u > x else -WIDTH / 2
        return (x + side, y), (u - side, v)
    rise = HEIGHT / 2 if v > y else -HEIGHT / 2
    return (x, y + rise), (u, v - rise)


def main() -> None:
    """Draw the boxes and arrows."""
    figure = Figure(figsize=(11.5, 3.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-1.1, 4 * ACROSS + 1.1), ylim=(-0.5, 2 * UP + 0.5))
    axes.axis("off")
    for name, (_, _, title, text, colour) in BOXES.items():
        x, y = centre(name)
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        style = "round,pad=0.02,rounding_size=0.08"
        axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, facecolor=colour, edgecolor="#555555"))
        axes.text(x, y + 0.1, title, ha="center", va="center", fontsize=11, weight="bold")
        axes.text(x, y - 0.15, text, ha="center", va="center", fontsize=9)
    for start, end, label in ARROWS:
        tail, head = border(start, end)
        axes.annotate("", xy=head, xytext=tail, arrowprops={"arrowstyle": "-|>", "color": "#555555", "shrinkA": 1})
        level = tail[1] == head[1]
        down = tail[1] > head[1]
        shift = (0, 0.13) if level else (-0.12, 0) if down else (0.12, 0)
        place = ((tail[0] + head[0]) / 2 + shift[0], (tail[1] + head[1]) / 2 + shift[1])
        side = "center" if level else "right" if down else "left"
        axes.text(*place, label, ha=side, va="center", fontsize=8, color="#333333")
    with rc_context({"svg.hashsalt": "phase", "svg.fonttype": "none"}):
        figure.savefig(Path(__file__).with_name("phase.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
