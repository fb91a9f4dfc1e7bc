"""Compares loss and gradient of DistillModule with those of TRL's trainers, on the same tiny pair and the same rows.

Run: python tests/benchmarks/trl_distillation.py, in an environment that also has TRL: pip install trl==1.16.0

It prints one line for each divergence, and exits 1 if a loss or a gradient differs by more than 1e-5.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from modules import DistillModule
from modules.functional.masked import pad_rows
from modules.losses import JSD
from modules.networks.policy import Policy
from modules.rollout.sampling import Sampling
from modules.types import PolicyBatch, PromptBatch

STUDENT, TEACHER = "tiny-small", "tiny-addition"
ROWS = [("12+34=", "640"), ("7+8=", "51."), ("Say hello to all of us: ", "Hello, hello and hello!"), ("90+9=", "990")]
BETAS = (0.0, 0.1, 0.5, 1.0)
TOLERANCE = 1e-5
TOP_K = 7

Found = tuple[float, dict[str, Tensor]]  # loss, gradient by parameter


def our_batch(module: DistillModule) -> PolicyBatch:
    """Make the batch of the rows' completions with their end tokens."""
    tokens, end = module.tokenizer, module.tokenizer.eos_token_id
    prompts = PromptBatch(
        uid=[prompt for prompt, _ in ROWS],
        prompt=[prompt for prompt, _ in ROWS],
        prompt_ids=[tokens(prompt).input_ids for prompt, _ in ROWS],
        answer=[None] * len(ROWS),
        source=[""] * len(ROWS),
        info=[{}] * len(ROWS),
        completion_ids=[[*tokens(completion).input_ids, end] for _, completion in ROWS],
    )
    return module.make_lessons(module.recite(prompts), prompts)


def differentiate(model: torch.nn.Module, compute: Callable[..., Tensor], *arguments: Any) -> Found:
    """Return the loss that ``compute`` makes of the arguments, and its gradient by parameter of ``model``."""
    model.zero_grad()
    loss = compute(*arguments)
    loss.backward()
    return float(loss.detach()), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def ours(beta: float, temperature: float, top_k: int | None = None) -> tuple[Found, PolicyBatch, DistillModule]:
    sampling = Sampling(max_completion_length=64, temperature=temperature)
    module = DistillModule(STUDENT, TEACHER, JSD(beta), on_policy=0.0, top_k=top_k, sampling=sampling)
    batch = our_batch(module)
    tokens = batch["row_count"].sum()
    return differentiate(module.policy.model, lambda: module.divergences(batch).sum() / tokens), batch, module


def theirs_by_rows(batch: PolicyBatch) -> dict[str, Tensor]:
    """Make right-padded rows with labels, as GKDTrainer takes them."""
    prompts = [ids[keep].tolist() for ids, keep in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    answers = [ids[keep].tolist() for ids, keep in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
    input_ids, mask = pad_rows([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    labels = [[-100] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
    return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": pad_rows(labels, -100)[0]}


def theirs_by_sides(batch: PolicyBatch) -> dict[str, Tensor]:
    """Make prompts padded on the left and completions padded on the right, as DistillationTrainer takes them."""
    lengths = batch["prompt_mask"].sum(1)
    width = int(lengths.max())
    prompts = torch.stack(
        [ids.roll(width - int(length)) for ids, length in zip(batch["prompt_ids"], lengths, strict=True)]
    )
    return {
        "prompt_ids": prompts,
        "prompt_mask": (torch.arange(width) >= (width - lengths)[:, None]).long(),
        "completion_ids": batch["completion_ids"],
        "completion_mask": batch["completion_mask"].long(),
    }


def compare(folder: Path) -> Iterator[tuple[str, Found, Found]]:
    """Yield a name, our numbers and TRL's."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    for name in (STUDENT, TEACHER):
        Policy(name, dropout=False).save_pretrained(folder / name)
    pair = {"model": str(folder / STUDENT), "teacher_model": str(folder / TEACHER)}
    plain: dict[str, Any] = {"output_dir": str(folder / "out"), "report_to": [], "use_cpu": True, "bf16": False}
    plain |= {"gradient_checkpointing": False, "per_device_train_batch_size": len(ROWS)}
    tokenizer = Policy(STUDENT).tokenizer
    for beta in BETAS:
        mine, batch, _ = ours(beta, 1.0)
        chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in ROWS]
        gkd = GKDTrainer(
            **pair,
            args=GKDConfig(**plain, beta=beta, lmbda=0.0, disable_dropout=True),
            train_dataset=Dataset.from_dict({"messages": chats}),
            processing_class=tokenizer,
        )
        rows = theirs_by_rows(batch)
        yield f"GKDTrainer beta {beta}", mine, differentiate(gkd.model, gkd.compute_loss, gkd.model, rows)
        for temperature in (1.0, 0.7):
            mine, batch, _ = ours(beta, temperature)
            trainer = DistillationTrainer(
                **pair,
                args=DistillationConfig(**plain, beta=beta, temperature=temperature, max_completion_length=64),
                train_dataset=Dataset.from_dict({"prompt": [prompt for prompt, _ in ROWS]}),
            )
            sides = theirs_by_sides(batch)
            found = differentiate(trainer.model, trainer.compute_loss, trainer.model, sides)
            yield f"DistillationTrainer beta {beta} temperature {temperature}", mine, found
        mine, batch, module = ours(beta, 1.0, TOP_K)
        models = module.policy.model, module.teacher.policy.model
        found = differentiate(models[0], compute_buckets, *models, theirs_by_rows(batch), beta)
        yield f"top {TOP_K} and a tail, beta {beta}", mine, found


def compute_buckets(student: Any, teacher: Any, rows: dict[str, Tensor], beta: float) -> Tensor:
    """Compute the loss of TRL's functions on the teacher's tokens. Their tail is 1 - the others, so in float64."""
    from trl.experimental.sdpo.loss_utils import add_tail_bucket, compute_divergence

    kept = rows["labels"][:, 1:] != -100
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    logprobs = [model(**inputs).logits[:, :-1][kept].double().log_softmax(-1) for model in (student, teacher)]
    ids = logprobs[1].topk(TOP_K).indices
    mine: Tensor = compute_divergence(*(add_tail_bucket(each.gather(-1, ids)) for each in logprobs), beta)
    return mine.mean()


def main() -> int:
    try:
        import trl
    except ImportError:
        print(
            "skipped: TRL is not installed; pip install trl==1.16.0 beside this project, in an environment of its own"
        )
        return 0
    worst = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        for name, (loss, gradients), (their_loss, theirs) in compare(Path(temporary)):
            assert gradients.keys() == theirs.keys()
            gap = max(float((gradients[key] - theirs[key]).abs().max()) for key in gradients)
            size = max(float(each.abs().max()) for each in theirs.values())
            worst = max(worst, abs(loss - their_loss), gap)
            print(
                f"{name}: loss {loss:.6f} and {their_loss:.6f}, gradients up to {size:.2g} differ by at most {gap:.1e}"
            )
    print(f"TRL {trl.__version__}: the largest difference is {worst:.1e}, {TOLERANCE:.0e} is allowed")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
