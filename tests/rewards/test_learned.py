"""Learned rewards: ensembles by hand, the rollout's own tokens or its text in another vocabulary, and scores that do
not depend on the batch.
"""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modules.networks.lora import POLICY, Lora, find_adapter_parameters, list_adapters
from modules.networks.policy import Policy
from modules.networks.scalar_head import make_sequence_classifier
from modules.networks.tiny import tiny_model, tiny_tokenizer
from modules.reward import RewardModule, write_moments
from modules.rewards.combined import Versus
from modules.rewards.learned import LearnedReward, combine, split_rows
from modules.types import Completion, Rollout

TINY = tiny_tokenizer()
EOS, TURN = TINY.eos_token_id, TINY.convert_tokens_to_ids("<|im_end|>")


def save(folder: Path, seed: int = 0, tokenizer: PreTrainedTokenizerFast = TINY, **numbers) -> str:
    """Save a reward model with its own weights, and with ``reward_mean`` and ``reward_std`` if given."""
    torch.manual_seed(seed)
    make_sequence_classifier(tiny_model(seed=seed), torch.randn(128), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | numbers))
    return str(folder)


def rollout(
    text: str, prompt: str = "2 + 2 = ", finish: str = "stop", tail: tuple[int, ...] = (EOS,), answer: str | None = None
) -> Rollout:
    ids = [*TINY(text).input_ids, *tail]
    return Rollout(
        "u", prompt, TINY(prompt).input_ids, answer, Completion(ids, [0.0] * len(ids), text, finish), 0, {}, None
    )  # type: ignore[arg-type]


def raw(path: str, ids: list[int]) -> float:
    """Return the model's score at the end of a single row without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        return float(model.score(model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]))


def test_ensembles_by_hand():
    scores = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert combine(scores, "mean", 0.1).tolist() == [3.0, 0.0]
    assert combine(scores, "worst", 0.1).tolist() == [1.0, 0.0]
    # population variance (4 + 1 + 9) / 3 = 14 / 3; the sample variance 7 would give 2.3
    assert combine(scores, "uncertainty", 0.1).tolist() == pytest.approx([2.5333333333, 0.0], abs=1e-9)


def test_score_is_normalised_and_the_same_in_every_batch(tmp_path):
    path = save(tmp_path, reward_mean=0.5, reward_std=2.0)
    rollouts = [rollout(text, prompt) for text in ("4", "a much longer answer", "") for prompt in ("2 + 2 = ", "?")]
    together = LearnedReward(path)(rollouts)
    for batch_tokens in (1, 24, 60):
        assert LearnedReward(path, batch_tokens=batch_tokens)(rollouts[::-1])[::-1] == pytest.approx(together, abs=1e-5)
    for one, score in zip(rollouts, together, strict=True):
        assert score == pytest.approx((raw(path, [*one.prompt_ids, *one.completion.token_ids]) - 0.5) / 2.0, abs=1e-5)
    assert len({round(score, 4) for score in together}) == 6
    assert LearnedReward(path)([]) == []


def test_sampled_tokens_are_not_tokenised_again(tmp_path):
    vocabulary = {token: i for i, token in enumerate(("<|pad|>", "<|eos|>", *bytes_to_unicode().values(), "aa"))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "a")]))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<|pad|>", "<|eos|>")])
    merging = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|eos|>")
    a, aa = vocabulary["a"], vocabulary["aa"]
    path = save(tmp_path, tokenizer=merging)
    (score,) = LearnedReward(path)(
        [Rollout("u", "b", [vocabulary["b"]], None, Completion([a, a, 1], [0.0] * 3, "aa", "stop"), 0, {}, None)]
    )
    assert merging("aa").input_ids == [aa]
    assert score == pytest.approx(raw(path, [vocabulary["b"], a, a, 1]), abs=1e-5)
    assert score != pytest.approx(raw(path, [vocabulary["b"], aa, 1]), abs=1e-3)

    # of the policy's vocabulary, which numbers its bytes from 5: the text counts, and the end token where the
    # completion ended by itself
    own, other = rollout("aa", "b"), LearnedReward(path)
    assert other([own])[0] == pytest.approx(raw(path, [vocabulary["b"], aa, 1]), abs=1e-5)
    assert other([rollout("aa", "b", finish="length", tail=())])[0] == pytest.approx(
        raw(path, [vocabulary["b"], aa]), abs=1e-5
    )


def test_stop_strings_and_cut_off_completions_keep_their_tokens(tmp_path):
    path, reward = save(tmp_path), LearnedReward(str(tmp_path))
    stopped = rollout("4", tail=tuple(TINY("\n\n").input_ids))  # the stop string is in the tokens and not in the text
    cut = rollout("4 because", finish="length", tail=())
    assert reward([stopped, cut]) == pytest.approx(
        [raw(path, TINY("2 + 2 = 4\n\n").input_ids), raw(path, TINY("2 + 2 = 4 because").input_ids)], abs=1e-5
    )


@pytest.mark.parametrize(
    ("prompt", "end"), [("2 + 2 = ", EOS), ("<|im_start|>user\n2 + 2<|im_end|>\n<|im_start|>assistant\n", TURN)]
)
def test_an_answer_ends_as_completions_of_its_prompt_do(tmp_path, prompt, end):
    save(tmp_path)
    same = rollout("4", prompt, tail=(end,), answer="4")
    longer = rollout("5 or so", prompt, tail=(end,), answer="4")
    reward = LearnedReward(str(tmp_path))
    other = rollout("4", prompt, tail=(EOS + TURN - end,), answer="4")  # ends in another way, so it has another score
    mine, theirs, elsewhere = reward([same, longer, other])
    assert mine != elsewhere
    assert Versus(reward)([same, longer]) == [0.5, float(theirs > mine)]


def test_members_are_put_on_one_scale_first(tmp_path):
    paths = [save(tmp_path / str(seed), seed, reward_mean=10.0 * seed, reward_std=1.0 + seed) for seed in range(3)]
    rollouts = [rollout("4"), rollout("five")]
    ids = [[*one.prompt_ids, *one.completion.token_ids] for one in rollouts]
    members = torch.tensor(
        [[(raw(path, row) - 10.0 * seed) / (1.0 + seed) for seed, path in enumerate(paths)] for row in ids]
    )
    assert LearnedReward(paths)(rollouts) == pytest.approx(members.mean(1).tolist(), abs=1e-5)
    assert LearnedReward(paths, "worst")(rollouts) == pytest.approx(members.amin(1).tolist(), abs=1e-5)
    assert LearnedReward(paths, "uncertainty", 0.5)(rollouts) == pytest.approx(
        (members.mean(1) - 0.5 * members.var(1, correction=0)).tolist(), abs=1e-5
    )
    bare = save(tmp_path / "bare", 7)
    with pytest.raises(ValueError, match="bare without reward_mean"):
        LearnedReward([*paths, bare])(rollouts)


def adapted(folder: Path, seed: int, num_heads: int = 1, backbone: str = "tiny") -> str:
    """Export adapters away from their start."""
    torch.manual_seed(seed)
    module = RewardModule(backbone, num_heads=num_heads, lora=Lora(r=2))
    for weight in find_adapter_parameters(module.policy.model, POLICY).values():
        weight.data.add_(torch.randn(weight.shape), alpha=0.1)
    module.moments = torch.rand(1 + num_heads, 2) + 0.5
    module.save_pretrained(folder)
    return str(folder)


def test_adapters_of_the_policys_backbone_are_computed_on_it(tmp_path):
    """They score like the merged exports, whatever the policy has learned, also beside members with other backbones."""
    save(tmp_path / "base", 5)
    paths = [
        adapted(tmp_path / "one", 1),
        save(tmp_path / "whole", 2, reward_mean=0.1, reward_std=2.0),
        adapted(tmp_path / "three", 3, num_heads=3),
        adapted(tmp_path / "elsewhere", 4, backbone=str(tmp_path / "base")),
    ]
    policy = Policy("tiny", dropout=False, lora=Lora(r=4, target_modules=("q_proj",)))
    for weight in find_adapter_parameters(policy.model, POLICY).values():
        weight.data.add_(torch.randn(weight.shape), alpha=0.1)
    ids = torch.tensor([TINY("2 + 2 = 4").input_ids])
    before = policy.hidden_states(ids)
    rollouts = [rollout("4"), rollout("five", finish="length", tail=()), rollout("", prompt="?")]
    expected = LearnedReward(paths).members(rollouts)
    assert expected.shape == (3, 6)

    reward = LearnedReward(paths)
    assert reward.share_backbone(policy) == [paths[0], paths[2]]
    assert reward.share_backbone(policy) == [paths[0], paths[2]]
    other = LearnedReward(paths[2])
    assert other.share_backbone(policy) == [paths[2]]
    assert list_adapters(policy.model) == {POLICY, "reward0", "reward1", "reward2"}
    assert not any(
        weight.requires_grad
        for name in ("reward0", "reward1")
        for weight in find_adapter_parameters(policy.model, name).values()
    )
    torch.testing.assert_close(reward.members(rollouts), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.members(rollouts), expected[:, 2:5], atol=1e-5, rtol=1e-5)
    assert torch.equal(policy.hidden_states(ids), before)


def test_a_policy_without_adapters_shares_nothing(tmp_path):
    path = adapted(tmp_path / "one", 1)
    reward, policy = LearnedReward(path), Policy("tiny", dropout=False)
    assert reward.share_backbone(policy) == []
    assert not list_adapters(policy.model)
    assert reward([rollout("4")]) == LearnedReward(path)([rollout("4")])


def test_shared_members_are_measured_too(tmp_path):
    paths = [adapted(tmp_path / str(seed), seed) for seed in (1, 2)]
    write_moments(Path(paths[1]) / "config.json", None)
    with pytest.raises(ValueError, match="2 without reward_mean"):
        LearnedReward(paths).share_backbone(Policy("tiny", dropout=False, lora=Lora(r=2)))


def test_what_is_no_reward_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="'.*nowhere' is not a model folder or a hub id that can be read"):
        LearnedReward(str(tmp_path / "nowhere"))
    tiny_model().save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="has 2 labels and a reward model has one"):
        LearnedReward(str(tmp_path / "policy"))
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 261,
    }
    BertForSequenceClassification(BertConfig(num_labels=1, **small)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"\(bert\) has no linear 'score'"):
        LearnedReward(str(tmp_path / "bert"))([rollout("4")])
    for wrong in ({"paths": []}, {"ensemble": "median"}, {"uncertainty_weight": -1.0}, {"batch_tokens": 0}):
        with pytest.raises(ValueError, match="LearnedReward needs at least one path"):
            LearnedReward(**({"paths": str(tmp_path / "policy")} | wrong))  # type: ignore[arg-type]


def test_chunks_hold_what_they_may():
    rows = [(1,) * n for n in (1, 2, 2, 3, 9)]
    # padded 2 x 3 = 6 fits, 3 x 4 = 12 does not; 9 alone is over the limit and still goes
    assert [[len(row) for row in chunk] for chunk in split_rows(rows, 6)] == [[1, 2, 2], [3], [9]]
    assert list(split_rows([], 6)) == []
