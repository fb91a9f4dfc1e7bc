"""The policy: log-probs against whole logits of plain rows, shared prompts against separate rows, loading, dropout."""

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modules.functional.logprobs import token_logprobs
from modules.networks import policy as policy_file
from modules.networks.loading import find_end_of_turn
from modules.networks.lora import Lora, find_adapter_parameters
from modules.networks.policy import Policy
from modules.networks.tiny import tiny_tokenizer
from modules.rollout import InProcessEngine, Sampling

SMALL = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=272, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    "sliding": lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4)),
}


@pytest.fixture(params=MODELS)
def policy(request, tmp_path) -> Policy:
    torch.manual_seed(1)
    MODELS[request.param]().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return Policy(str(tmp_path), dropout=False)


def ragged_batch(prompt_lengths: list[int], completion_lengths: list[list[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 261, (n,), generator=generator) for n in prompt_lengths]
    completions = [torch.randint(5, 261, (n,), generator=generator) for group in completion_lengths for n in group]
    index = torch.tensor([i for i, group in enumerate(completion_lengths) for _ in group])
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "prompt_ids": pad(prompts, batch_first=True),
        "prompt_mask": pad([torch.ones(len(p), dtype=torch.bool) for p in prompts], batch_first=True),
        "completion_ids": pad(completions, batch_first=True),
        "completion_mask": pad([torch.ones(len(c), dtype=torch.bool) for c in completions], batch_first=True),
        "prompt_index": index,
    }


def naive(policy: Policy, batch: dict[str, Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """Run one forward per row with only its own tokens, and take the float32 log_softmax of the whole logits."""
    mask = batch["completion_mask"]
    logprobs, entropies = [], []
    for i, p in enumerate(batch["prompt_index"].tolist()):
        prompt = batch["prompt_ids"][p][batch["prompt_mask"][p]]
        completion = batch["completion_ids"][i][mask[i]]
        logits = policy.model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        table = (logits / temperature).log_softmax(-1)
        row = table[torch.arange(len(completion)), completion]
        spare = mask.shape[1] - len(completion)
        logprobs.append(torch.nn.functional.pad(row, (0, spare)))
        entropies.append(torch.nn.functional.pad(-(table.exp() * table).sum(-1), (0, spare)))
    return torch.stack(logprobs), torch.stack(entropies)


def gradients(policy: Policy, value: Tensor) -> list[Tensor]:
    return torch.autograd.grad(value, list(policy.parameters()))


@pytest.mark.parametrize("lengths", [[5, 5, 5], [3, 9, 6]], ids=["equal", "ragged"])
def test_shared_prompts_equal_separate_rows(policy, lengths):
    batch = ragged_batch(lengths, [[4, 1, 7], [2, 2], [6]])
    scores = policy.completion_scores(batch, temperature=0.7, details=True)
    expected, entropies = naive(policy, batch, 0.7)
    torch.testing.assert_close(scores.logprobs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.entropies, entropies, atol=1e-5, rtol=0)
    assert not torch.allclose(scores.logprobs, naive(policy, batch, 1.0)[0], atol=1e-3)
    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    for mine, theirs in zip(
        gradients(policy, (scores.logprobs * weights).sum()), gradients(policy, (expected * weights).sum()), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_sharing_rule_is_explicit(policy):
    assert policy.shares_prompts == (policy.model.config.model_type != "mistral")


def test_one_token_completions(policy):
    batch = ragged_batch([4, 2], [[1, 1], [1]])
    torch.testing.assert_close(
        policy.completion_scores(batch).logprobs, naive(policy, batch, 1.0)[0], atol=1e-5, rtol=0
    )


def test_rows_may_use_every_position(tmp_path):
    """The longest prompt has a short completion and the other way round, so no row exceeds the model's positions."""
    GPT2LMHeadModel(GPT2Config(vocab_size=272, n_embd=32, n_layer=2, n_head=4, n_positions=32)).save_pretrained(
        tmp_path
    )
    tiny_tokenizer().save_pretrained(tmp_path)
    policy = Policy(str(tmp_path), dropout=False)
    for lengths, completions in (([25, 3], [[7, 5], [29, 20]]), ([25, 3], [[7], [29]])):
        batch = ragged_batch(lengths, completions)
        torch.testing.assert_close(
            policy.completion_scores(batch).logprobs, naive(policy, batch, 1.0)[0], atol=1e-5, rtol=0
        )
        assert policy.completion_states(batch).shape == (len(batch["prompt_index"]), 32)


def test_chunks_change_nothing(policy, monkeypatch):
    batch = ragged_batch([3, 9], [[4, 1, 7], [5, 5]])
    whole = policy.completion_scores(batch, details=True)
    reference = gradients(policy, whole.logprobs.sum())
    monkeypatch.setattr(policy_file, "MAX_LOGITS", 272 * 3)
    chunked = policy.completion_scores(batch, details=True)
    for mine, theirs in zip(chunked, whole, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    for mine, theirs in zip(gradients(policy, chunked.logprobs.sum()), reference, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_token_scores_of_rows_with_padding(policy):
    ids = torch.tensor([[9, 8, 7, 6, 5], [20, 21, 22, 0, 0]])
    mask = torch.tensor([[True, False, True, True, True], [True, True, True, False, False]])
    scores = policy.token_scores(ids, mask, details=True)
    for row, length in ((0, 5), (1, 3)):
        table = policy.model(ids[row : row + 1, :length]).logits[0].log_softmax(-1)
        for t in range(length):
            wanted = table[t - 1, ids[row, t]].item() if t > 0 and mask[row, t] else 0.0
            assert scores.logprobs[row, t].item() == pytest.approx(wanted, abs=1e-5)
            hit = float(t > 0 and bool(mask[row, t]) and int(table[t - 1].argmax()) == int(ids[row, t]))
            assert float(scores.hits[row, t]) == hit
    assert scores.logprobs[1, 3:].eq(0).all() and scores.logprobs[:, 0].eq(0).all()


def test_tiny_is_the_same_every_time_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = Policy("tiny"), Policy("tiny")
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_stop_tokens_hold_eos_and_end_of_turn():
    policy = Policy("tiny")
    assert policy.stop_token_ids == {
        policy.tokenizer.convert_tokens_to_ids("<|eos|>"),
        policy.tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }
    assert find_end_of_turn(policy.tokenizer) == policy.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_dropout_off_makes_training_mode_deterministic(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=272, n_embd=32, n_layer=2, n_head=4, n_positions=128)).save_pretrained(
        tmp_path
    )
    tiny_tokenizer().save_pretrained(tmp_path)
    batch = ragged_batch([4, 2], [[3, 3], [5]])
    for dropout in (True, False):
        policy = Policy(str(tmp_path), dropout=dropout)
        assert policy.model.training
        same = torch.equal(policy.completion_scores(batch).logprobs, policy.completion_scores(batch).logprobs)
        assert same != dropout


def test_export_loads_with_equal_logits(policy, tmp_path):
    folder = tmp_path / "export"
    policy.save_pretrained(folder)
    ids = torch.arange(5, 25)[None]
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(loaded(ids).logits, policy.model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(folder)("23+45=")["input_ids"] == policy.tokenizer("23+45=")["input_ids"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda d: str(d / "absent.gguf"), "no GGUF file"),
        (lambda d: str(d), "without config.json"),
        (
            lambda d: str((d / "adapter_config.json").write_text("{}") and d),
            "holds adapters without their model; name the",
        ),
        (
            lambda d: str(d / "absent"),
            "is not 'tiny', 'tiny-small', 'tiny-addition', 'tiny-calculator', 'tiny-chains', a Hugging Face model folder",
        ),
    ],
)
def test_unknown_paths_are_refused_in_one_sentence(tmp_path, monkeypatch, make, sentence):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=sentence) as error:
        Policy(make(tmp_path))
    assert "\n" not in str(error.value)


def test_tokenizer_larger_than_the_model_is_refused(tmp_path):
    LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": 100})).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="261 tokens and the model only 100"):
        Policy(str(tmp_path))


REFUSED = {
    "softcap": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8)),
        "final_logit_softcapping",
    ),
    "dynamic": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=DYNAMIC)), "dynamic rotary positions"),
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize("name", REFUSED)
def test_models_whose_scores_would_be_wrong_are_refused(tmp_path, name):
    make, sentence = REFUSED[name]
    make().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        Policy(str(tmp_path))


def test_scores_that_differ_from_the_models_own_are_refused(policy, monkeypatch):
    head = policy.model.get_output_embeddings()
    monkeypatch.setattr(
        policy.model, "get_output_embeddings", lambda: lambda hidden: 2 * head(hidden)
    )  # as a model with a hidden scale
    with pytest.raises(ValueError, match="log-probabilities from its hidden states are off by"):
        policy.check_scores()


def test_untested_architectures_do_not_share_and_are_right(tmp_path):
    torch.manual_seed(1)
    layers = {"attention_types": [[["global", "local"], 1]], "window_size": 4}
    config = GPTNeoConfig(
        vocab_size=272, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=128, **layers
    )
    GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    policy = Policy(str(tmp_path), dropout=False)
    assert not policy.shares_prompts
    batch = ragged_batch([3, 9, 6], [[4, 1, 7], [2, 2], [6]])
    torch.testing.assert_close(
        policy.completion_scores(batch).logprobs, naive(policy, batch, 1.0)[0], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("completions", [[[4, 1, 7], [2, 2], [6]], [[4], [2], [6]]], ids=["groups", "one each"])
def test_token_states_are_those_in_which_the_tokens_were_chosen(policy, completions):
    """In both layouts they equal the last hidden states of whole rows, and their head gives each token's logits."""
    batch = ragged_batch([3, 9, 6], completions)
    states, mask = policy.token_states(batch), batch["completion_mask"]
    assert states.shape == (*mask.shape, policy.model.get_output_embeddings().in_features)
    for i, p in enumerate(batch["prompt_index"].tolist()):
        prompt, tokens = batch["prompt_ids"][p][batch["prompt_mask"][p]], batch["completion_ids"][i][mask[i]]
        hidden = policy.model.base_model(torch.cat([prompt, tokens])[None]).last_hidden_state[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(states[i, : len(tokens)], hidden, atol=1e-5, rtol=0)


def test_token_states_do_not_see_their_token(policy):
    batch = ragged_batch([3, 9], [[4, 1], [5]])
    before = policy.token_states(batch)
    batch["completion_ids"] = batch["completion_ids"].clone()
    batch["completion_ids"][0, 2] += 1
    after = policy.token_states(batch)
    torch.testing.assert_close(after[0, :3], before[0, :3], atol=1e-6, rtol=0)
    assert float((after[0, 3] - before[0, 3]).detach().abs().max()) > 1e-3


def test_scores_of_states_are_completion_scores(policy):
    batch = ragged_batch([3, 9], [[4, 1], [5, 2]])
    whole = policy.completion_scores(batch, 0.7, details=True)
    for mine, theirs in zip(policy.scores_of(policy.token_states(batch), batch, 0.7, details=True), whole, strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    assert policy.scores_of(policy.token_states(batch), batch).entropies is None


@pytest.mark.parametrize("chunk", [None, 3])
def test_entropies_have_a_gradient_where_they_are_asked_for(policy, monkeypatch, chunk):
    batch = ragged_batch([3, 9], [[4, 1], [5]])
    logprobs, entropies = naive(policy, batch, 0.7)
    weights = torch.linspace(-1, 1, entropies.numel()).view_as(entropies)
    expected = gradients(policy, (entropies * weights + logprobs).sum())
    if chunk is not None:
        monkeypatch.setattr(policy_file, "MAX_LOGITS", 272 * chunk)
    scores = policy.scores_of(policy.token_states(batch), batch, 0.7, entropy=True)
    torch.testing.assert_close(scores.entropies, entropies, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.logprobs, logprobs, atol=1e-5, rtol=0)
    for mine, theirs in zip(
        gradients(policy, (scores.entropies * weights + scores.logprobs).sum()), expected, strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert not policy.scores_of(policy.token_states(batch), batch, 0.7, details=True).entropies.requires_grad


@pytest.mark.parametrize("resized", [False, True], ids=["", "resized"])
@pytest.mark.parametrize("adapters", [None, Lora(r=4)], ids=["whole", "adapters"])
def test_transformers_generates_from_an_export_what_our_engine_samples(policy, tmp_path, adapters, resized):
    """On 20 prompts, greedy, with the settings that the export holds: the same tokens and the same ends."""
    if resized:
        policy.model.resize_token_embeddings(290)
        policy.tokenizer.add_tokens([f"<added {number}>" for number in range(290 - len(policy.tokenizer))])
        policy.model.save_pretrained(tmp_path)
        policy.tokenizer.save_pretrained(tmp_path)
        policy = Policy(str(tmp_path), dropout=False)
        assert len(policy.tokenizer) == policy.model.config.vocab_size == 290
    if adapters is not None:
        policy = Policy(str(tmp_path), dropout=False, lora=adapters)
        with torch.no_grad():
            for weight in find_adapter_parameters(policy.model, "policy").values():
                weight.add_(torch.randn_like(weight) * 0.1)
    prompts = [[5 + (7 * i + 11 * j * j) % 250 for j in range(1 + (5 * i) % 9)] for i in range(20)]

    def sample() -> list[list[int]]:
        engine = InProcessEngine()
        engine.sync_weights(policy, 0)
        groups = engine.generate(prompts, 1, Sampling(temperature=0, max_completion_length=12), list(range(20)))
        return [group[0].token_ids for group in groups]

    policy.stop_token_ids |= {tokens[5] for tokens in sample()[:3]}  # what a random model does say
    ours = sample()
    assert min(map(len, ours)) < max(map(len, ours)) == 12
    policy.save_pretrained(tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    for prompt, mine in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert theirs[0, len(prompt) :].tolist() == mine


def test_an_export_generates_by_nothing_that_training_did_not_use(tmp_path, caplog):
    """Settings of the start, such as a penalty on repetition, would change what ``generate`` says."""
    model = MODELS["llama"]()
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, repetition_penalty=1.5, no_repeat_ngram_size=2, do_sample=True
    )
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with caplog.at_level("INFO"):
        Policy(str(tmp_path)).save_pretrained(tmp_path / "export")
    assert "generates by do_sample, no_repeat_ngram_size, repetition_penalty; training did not" in caplog.text
    found = GenerationConfig.from_pretrained(tmp_path / "export").to_diff_dict()
    assert {name for name in found if not name.startswith(("transformers", "_"))} == {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }


def test_an_export_has_the_pad_token_that_the_tokenizer_had(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    policy = Policy(str(tmp_path))
    policy.save_pretrained(tmp_path / "export")
    assert AutoTokenizer.from_pretrained(tmp_path / "export").pad_token is None
    assert policy.tokenizer.pad_token == policy.tokenizer.eos_token


def test_the_output_head_computes_in_fp32_under_autocast(policy):
    ids = torch.arange(5, 45).view(2, 20)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = policy.hidden_states(ids)[:, :-1]
        scored = policy.token_scores(ids, mask).logprobs[:, 1:]
    with torch.no_grad():
        wanted = token_logprobs(policy.model.get_output_embeddings()(hidden.float()), ids[:, 1:])
    assert scored.dtype == torch.float32
    assert torch.allclose(scored, wanted, atol=1e-6)


def test_without_gradients_padding_is_left_out_and_scores_are_the_same(monkeypatch):
    policy = Policy("tiny", dropout=False)
    widths = []
    policy.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generator = torch.Generator().manual_seed(0)
    lengths = [40, 3, 5, 30]
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, 200, mask.shape, generator=generator)
    prompts = torch.randint(5, 200, (2, 9), generator=generator)
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": torch.arange(9) < torch.tensor([[9], [4]]),
        "completion_ids": ids,
        "completion_mask": mask,
        "prompt_index": torch.tensor([0, 1, 1, 0]),
    }
    whole = policy.token_scores(ids, mask, details=True), policy.completion_scores(batch, details=True)
    states = policy.completion_states(batch)
    del widths[:]
    monkeypatch.setattr(policy_file, "CPU_TOKENS", 64)
    with torch.no_grad():
        assert policy.token_scores(ids, mask).logprobs.shape == mask.shape
        assert sorted(widths) == [(1, 3), (1, 40), (2, 30)]  # 2 x 40 and 3 x 30 are more than 64
        del widths[:]
        parts = policy.token_scores(ids, mask, details=True), policy.completion_scores(batch, details=True)
        # 9 + 2 x 40 columns are more than 64, so these rows hold the prompt each; those of the other prompt share it
        assert widths[-4:] == [(1, 49), (1, 39), (1, 4), (2, 4)]
        torch.testing.assert_close(policy.completion_states(batch), states.detach(), atol=1e-5, rtol=1e-5)
    for expected, found in zip(whole, parts, strict=True):
        for one, other in zip(expected, found, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(other, one.detach(), atol=1e-5, rtol=1e-5)
