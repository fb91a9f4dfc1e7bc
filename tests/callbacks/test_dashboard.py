"""The health of a run comes first in TensorBoard, and long curves stay readable."""

import re

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from callbacks import Dashboard
from callbacks.phase import draw_series
from datamodules import Addition, InstructionDataModule
from modules import SFTModule


def test_the_layout_is_in_the_event_file(tmp_path):
    module = SFTModule("tiny")
    data = InstructionDataModule(module.tokenizer, Addition(num_examples=4), batch_size=2)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    Trainer(max_epochs=1, accelerator="cpu", logger=logger, callbacks=[Dashboard()], **quiet).fit(module, data)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["1 health", "2 machinery"]
    assert [chart.title for chart in layout.category[0].chart][:2] == ["loss", "token accuracy"]
    patterns = list(layout.category[0].chart[0].multiline.tag)
    drawn = [re.match(pattern, tag) is not None for pattern in patterns for tag in ("train/loss", "val/loss")]
    assert drawn == [True, False, False, True]
    assert not any(re.match(pattern, tag) for pattern in patterns for tag in ("val/loss_std", "val/losses/mean"))


def test_many_measurements_become_faint_points_and_a_line_of_means():
    axes = Figure().subplots()
    draw_series(axes, [0.0, 1.0], [1.0, 2.0], label="few")
    assert len(axes.lines) == 1
    axes = Figure().subplots()
    draw_series(axes, [float(i) for i in reversed(range(90))], [float(i % 3) for i in range(90)], label="many")
    points, line = axes.lines
    assert points.get_alpha() < 0.5
    assert line.get_label() == "many"
    assert list(line.get_ydata()) == [1.0] * 30  # each stretch of three holds 0, 1 and 2
    assert list(line.get_xdata()) == [3 * i + 1.0 for i in range(30)]
