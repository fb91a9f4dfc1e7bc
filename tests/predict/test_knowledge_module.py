"""KnowledgeModule on a tiny model that was taught facts: its categories, seeds and refusals."""

import pytest
import torch
from lightning.pytorch import seed_everything

from datamodules import Facts, FactsDataModule, VerifiableDataModule
from modules import KnowledgeModule
from modules.networks.policy import Policy
from modules.trainer.seeds import derive_seed
from modules.types import KNOWLEDGE_CATEGORIES

TEMPLATE = "{question}={answer}\n"


def prompts_of(num_facts, tokenizer, **settings):
    data = FactsDataModule(tokenizer, Facts(num_facts), template=TEMPLATE, num_shots=1, **settings)
    data.setup("predict")
    return list(data.predict_dataloader())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Teach a policy facts 0 to 7 with all of their prompts, and facts 8 to 11 with the first of three."""
    seed_everything(0)
    policy = Policy("tiny")
    (batch,) = prompts_of(16, policy.tokenizer, num_prompts=3)
    texts = [
        prompt + answer + "\n"
        for prompt, answer, info in zip(batch["prompt"], batch["answer"], batch["info"], strict=True)
        if info["row"] < 8
    ]
    texts += [batch["prompt"][3 * row] + batch["answer"][3 * row] + "\n" for row in range(8, 12)]
    ids = torch.tensor([policy.tokenizer(text).input_ids for text in texts])
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, -5:] = True
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(50):
        optimizer.zero_grad()
        (-policy.token_scores(ids, mask).logprobs.sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    path = tmp_path_factory.mktemp("knows")
    policy.save_pretrained(path)
    return path


def labels(module, batches):
    found = []
    for index, batch in enumerate(batches):
        module.predict_step(batch, index)
        found += module.record.labels
    return {record["row"]: record["label"] for record in found}


def asked(folder, **settings):
    return KnowledgeModule(str(folder), max_completion_length=5, **settings)


def test_what_was_taught_is_known_and_the_rest_is_not(folder):
    module = asked(folder, num_samples=4)
    found = labels(module, prompts_of(16, module.tokenizer, num_prompts=3))
    assert [found[row]["knowledge"] for row in range(8)] == ["HighlyKnown"] * 8
    assert {found[row]["knowledge"] for row in range(12, 16)} == {"Unknown"}
    assert (
        found[0]["p_greedy"] == 1.0
        and found[0]["p_sampled"] > 0.9
        and (found[15]["p_greedy"], found[15]["p_sampled"]) == (0.0, 0.0)
    )
    assert {name: found[3][name] for name in ("question", "relation", "completion")} == {
        name: Facts(4).rows()[3].columns[name] for name in ("question", "relation", "completion")
    }


def test_answers_are_those_of_the_engine_by_hand(folder):
    """Every prompt sampled alone with its own seed gives the same shares, so neither the batch nor another fact
    matters.
    """
    module = asked(folder, num_samples=4, temperature=1.0, seed=3)
    (batch,) = prompts_of(12, module.tokenizer, num_prompts=3)
    found = labels(module, [batch])
    for row in (0, 8, 9, 10, 11):
        right = []
        for number in range(3 * row, 3 * row + 3):
            seed = derive_seed(3, "knowledge", batch["uid"][number])
            (group,) = module.engine.generate([batch["prompt_ids"][number]], 4, module.sampling, [seed])
            right += [completion.text.split("\n")[0] == batch["answer"][number] for completion in group]
        assert found[row]["p_sampled"] == pytest.approx(sum(right) / 12, abs=1e-6)
        assert round(found[row]["p_greedy"] * 3, 4) in (0, 1, 2, 3)
    assert any(0 < found[row]["p_sampled"] < 1 for row in range(12))  # at temperature 1 not all is one or zero


def test_batches_change_nothing_and_seeds_do(folder):
    results = []
    for batch_size, seed in ((16, 0), (3, 0), (16, 1)):
        module = asked(folder, num_samples=4, temperature=1.5, seed=seed)
        results.append(labels(module, prompts_of(16, module.tokenizer, num_prompts=3, batch_size=batch_size)))
    assert results[0] == results[1]
    assert [row["p_sampled"] for row in results[0].values()] != [row["p_sampled"] for row in results[2].values()]
    assert [row["p_greedy"] for row in results[0].values()] == [row["p_greedy"] for row in results[2].values()]


def test_done_facts_are_not_asked(folder):
    module = asked(folder, num_samples=1)
    module.done = {f"facts#{number}" for number in range(4)}
    first, second = prompts_of(8, module.tokenizer, num_prompts=2, batch_size=4)
    module.predict_step(first, 0)
    assert module.record.labels == []
    module.predict_step(second, 1)
    assert [record["row"] for record in module.record.labels] == [4, 5, 6, 7]


def test_summary_adds_up():
    categories = ["HighlyKnown", "Unknown", "Unknown", "WeaklyKnown"]
    records = [
        {"row": n, "uid": str(n), "label": {"knowledge": name, "p_greedy": 1.0 - n / 4, "p_sampled": n / 8}}
        for n, name in enumerate(categories)
    ]
    # (1 + 0.75 + 0.5 + 0.25) / 4 and (0 + 1 + 2 + 3) / 8 / 4
    expected = {
        "rows": 4,
        "HighlyKnown": 0.25,
        "MaybeKnown": 0.0,
        "WeaklyKnown": 0.25,
        "Unknown": 0.5,
        "p_greedy": 0.625,
        "p_sampled": 0.1875,
    }
    assert KnowledgeModule("tiny").summary(records) == expected
    assert set(KNOWLEDGE_CATEGORIES) < set(expected)


def test_other_weights_or_settings_are_another_run(folder):
    mine = asked(folder)
    assert asked(folder).identity() == mine.identity()
    others = [asked(folder, temperature=0.7), asked(folder, num_samples=2), asked(folder, seed=1)]
    changed = asked(folder)
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1e-3
    assert all(other.identity() != mine.identity() for other in [*others, changed])


@pytest.mark.parametrize("settings", [{"num_samples": 0}, {"temperature": 0.0}, {"max_completion_length": 0}])
def test_refused_settings(settings):
    with pytest.raises(
        ValueError, match="num_samples must be at least 1 and temperature above 0|max_completion_length 0 must be >= 1"
    ):
        KnowledgeModule("tiny", **settings)


def test_other_prompts_are_refused():
    module = KnowledgeModule("tiny")
    data = VerifiableDataModule(module.tokenizer, Facts(4))
    data.setup("predict")
    with pytest.raises(ValueError, match="facts#0#0: this prompt asks for no fact; set data to FactsDataModule"):
        module.predict_step(next(iter(data.predict_dataloader())), 0)
