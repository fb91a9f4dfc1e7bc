"""Samples in a real Trainer, and how TensorBoard's own Markdown renderer shows hostile text."""

import dataclasses
from html import unescape
from typing import Any

import pytest
from tensorboard.plugin_util import markdown_to_safe_html

from callbacks import Samples
from callbacks.samples import pick_spread, write_sections

HOSTILE = "a | b\n\n```\n<script>alert(1)</script> <img src=x onerror=alert(2)>\n`tick` **bold** [link](javascript:alert(3))\n---\r\n# title\x0b| x"


def test_text_holds_prompt_completion_answer_rewards_and_finish(make: Any, fit: Any) -> None:
    rollouts = [make(0.25, [1, 2, 3], "it is five", group=3, finish="length"), make(None, text="", group=4)]
    ((step, text),) = fit(Samples(), [rollouts]).texts("train/samples")
    assert step == 2
    for part in (
        "    2 + 2 = ?",
        "    it is five",
        "    4",
        "| **trained on** | 0.250 |",
        "| exact | 0.250 |",
        "3 tokens, finish length",
    ):
        assert part in text
    assert "| exact | unscorable |" in text
    assert "    (empty)" in text


def test_texts_appear_every_n_phases_and_at_the_end(make: Any, fit: Any) -> None:
    phases = [[make(text=f"phase {i}")] for i in range(5)]
    texts = fit(Samples(every_n_phases=2), phases).texts("train/samples")
    assert [step for step, _ in texts] == [4, 8, 10]
    assert ["phase 1" in texts[0][1], "phase 3" in texts[1][1], "phase 4" in texts[2][1]] == [True] * 3
    assert len(fit(Samples(every_n_phases=5), phases).texts("train/samples")) == 1
    assert fit(Samples(), [[]]).texts("train/samples") == []


def test_samples_show_different_prompts(make: Any) -> None:
    rollouts = [make(group=i // 4) for i in range(16)]
    assert [rollout.group for rollout in pick_spread(rollouts, 4)] == [0, 1, 2, 3]
    assert pick_spread(rollouts[:3], 4) == rollouts[:3]


def test_hostile_text_is_shown_and_not_obeyed(make: Any) -> None:
    html = markdown_to_safe_html(write_sections([make(text=HOSTILE)]))
    assert "<script" not in html
    assert "<img" not in html
    assert "<h1" not in html
    assert "<a " not in html
    shown = unescape(html)
    for line in (
        "a | b",
        "```",
        "<script>alert(1)</script>",
        "`tick` **bold** [link](javascript:alert(3))",
        "# title",
        "| x",
    ):
        assert line in shown
    unsafe = markdown_to_safe_html(HOSTILE)
    assert "<h1" in unsafe  # the same text without protection does change the page


def test_names_cannot_break_the_table(make: Any) -> None:
    rollout = dataclasses.replace(make(), uid="<b>row</b>\n# 1", rewards={"a|b`c`<i>*d*\n_e_": 0.5})
    text = write_sections([rollout])
    assert "<" not in text  # not left to the reader of the text to clean up
    html = markdown_to_safe_html(text)
    assert html.count("<tr>") == 3
    assert html.count("<td>") == 4
    assert "<b>" not in html
    assert "<i>" not in html
    assert "<em>" not in html
    assert "<h1" not in html
    assert "<code>c" not in html
    assert "a|b`c`<i>*d* _e_" in unescape(html)
    assert "<b>row</b> # 1" in unescape(html)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        Samples(num_samples=0)
    with pytest.raises(ValueError, match="every_n_phases"):
        Samples(every_n_phases=0)
