"""Orders that learn, in a real Trainer: what they learned against a loop over all rollouts, and resumed bit for bit."""

import json
from collections import defaultdict
from pathlib import Path

import fixed_runs
import pytest
import resumes
import torch
from lightning.pytorch import Trainer
from programs import run_ranks

from datamodules import Prioritised, VerifiableDataModule
from modules import GRPOModule
from modules.rewards import LengthPenalty, RegexFormat
from modules.rollout.sampling import Sampling

ORDERS = {
    "prioritised": ["--data.order=Prioritised", "--data.order.rate=0.3", "--data.order.floor=0.01"],
    "mopps": ["--data.order=MoPPS", "--data.order.target=0.4", "--data.order.decay=0.9"],
}
ROWS = len(fixed_runs.PROMPTS)


def learn_by_hand(folder: Path) -> tuple[list[float], dict[str, list[float]]]:
    """Go through the rollouts of all ranks in the middle of each of the three phases.

    Returns the success rates of ``prioritised`` and the tables of ``mopps``, one number a row.
    """
    success, right, wrong = [0.5] * ROWS, [1.0] * ROWS, [1.0] * ROWS
    for step in (1, 3, 5):
        state = torch.load(folder / f"checkpoints/step{step}.ckpt", weights_only=True)["VerifiableDataModule"]
        ranks = state["phase_loader"]["ranks"]
        rollouts = [rollout for rank in ranks for rollout in rank["rollouts"]]
        scores = defaultdict(list)
        for rollout in rollouts:
            scores[int(rollout["uid"].split(":")[1].split("#")[0]) - 1].append(rollout["rewards"]["format"])
        for row, found in scores.items():
            success[row] = success[row] + 0.3 * (sum(found) / len(found) - success[row])
            right[row], wrong[row] = (
                0.9 * right[row] + 0.1 + sum(found),
                0.9 * wrong[row] + 0.1 + len(found) - sum(found),
            )
        for stretch in {rollout["uid"].split("#")[1] for rollout in rollouts}:
            prompts = {rollout["uid"] for rollout in rollouts if rollout["uid"].endswith(f"#{stretch}")}
            assert len(prompts) == 4  # of four different rows
    return success, {"right": right, "wrong": wrong}


def check_tables(name: str, folder: Path) -> None:
    """Compare what the uninterrupted run in ``folder`` learned with a loop over its rollouts."""
    success, counts = learn_by_hand(folder)
    end = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["VerifiableDataModule"]["order"]
    expected = {"success": success} if name == "prioritised" else counts
    assert end["tables"].keys() == expected.keys()
    for table, values in expected.items():
        torch.testing.assert_close(end["tables"][table].tolist(), values, rtol=0, atol=1e-12)
    assert len(set(success)) > 3  # it did learn


def test_prioritised_goes_on_bit_for_bit(tmp_path):
    resumes.check_resumes("grpo", tmp_path, *ORDERS["prioritised"], stops=resumes.FEW_STOPS)
    check_tables("prioritised", tmp_path / "whole")


@pytest.mark.parametrize(("name", "method"), [("mopps", "grpo"), ("prioritised", "grpo_choices")])
def test_what_was_learned_goes_on_in_the_middle_of_a_phase(tmp_path, name, method):
    """``grpo_choices`` draws several stretches in a phase."""
    whole = fixed_runs.fit(method, tmp_path / "whole", *ORDERS[name])
    check_tables(name, tmp_path / "whole")
    middle = str(tmp_path / "whole/checkpoints/step3.ckpt")
    resumed = fixed_runs.fit(method, tmp_path / "resumed", *ORDERS[name], "--ckpt_path", middle)
    assert fixed_runs.same(whole["state_dict"], resumed["state_dict"])
    assert fixed_runs.same(*(end["VerifiableDataModule"]["order"] for end in (whole, resumed)))
    extra = whole["VerifiableDataModule"]["phase_loader"]["ranks"][0]["extra"]
    assert (extra > 0) == (method == "grpo_choices")


def test_two_ranks_learn_and_draw_the_same_and_go_on_bit_for_bit(tmp_path):
    run_ranks(resumes.__file__, str(tmp_path), "grpo", *ORDERS["prioritised"], folder=tmp_path, timeout=300)
    check_tables("prioritised", tmp_path / "grpo/whole")


def fit(
    folder: Path, rows: list[str], order: Prioritised, resume: Path | None = None, **settings
) -> VerifiableDataModule:
    """Train one phase, or one more than a checkpoint has, and leave ``last.ckpt``."""
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": row, "answer": "1"}) + "\n" for row in rows))
    settings = {"reward": RegexFormat(r"[\x00-\x7f].*")} | settings
    module = GRPOModule("tiny-small", num_generations=4, sampling=Sampling(max_completion_length=4), **settings)
    data = VerifiableDataModule(train=str(folder / "rows.jsonl"), prompts_per_phase=2, order=order)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=2 if resume else 1, default_root_dir=folder, **quiet)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return data


def test_rows_of_one_text_are_learned_apart(tmp_path):
    order = Prioritised(rate=1.0, prior=0.3)
    fit(tmp_path, ["same", "same", "same"], order)
    assert order.success.tolist().count(0.3) == 1  # two of three were drawn


def test_other_rows_begin_anew_and_a_warning_says_so(tmp_path):
    fit(tmp_path, ["a", "b", "c"], Prioritised(rate=1.0, prior=0.3))
    order = Prioritised(rate=1.0, prior=0.3)
    with (
        pytest.warns(UserWarning, match="the training rows are not those that the checkpoint was trained on"),
        pytest.warns(
            UserWarning, match="data.order: what the checkpoint holds was learned about other rows; Prioritised"
        ),
    ):
        fit(tmp_path, ["a", "b", "x"], order, tmp_path / "last.ckpt")
    assert order.success.tolist().count(0.3) == 1  # of the first run nothing is left


def test_a_reward_that_does_not_say_what_is_right_is_refused(tmp_path):
    price = LengthPenalty(RegexFormat("a"), 0.1)
    with pytest.raises(ValueError, match=r"data.order Prioritised needs to know which answers are right, .*accuracy"):
        fit(tmp_path, ["a", "b"], Prioritised(), reward=price)
