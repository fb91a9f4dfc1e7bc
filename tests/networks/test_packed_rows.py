"""Documents of a packed row do not see each other.

Scores and gradients are those of each document alone, and models that mix documents are refused.
"""

import pytest
import torch
from test_policy import MODELS, SMALL, gradients
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from datamodules.instruction import InstructionDataset
from datamodules.loaders.step_sampler import MicroBatch
from datamodules.tokens.encoding import Tokens
from datamodules.tokens.packing import pack
from modules.networks import loading, policy
from modules.networks.policy import Policy
from modules.networks.tiny import tiny_tokenizer
from modules.types import InstructionBatch

LENGTHS = (9, 7, 6, 5, 5, 3, 2, 1)
KEPT = MODELS | {"moe": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2))}
HYBRID = {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
MIXED = {
    "state space": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=272, hidden_size=32, num_hidden_layers=2, state_size=8)
    ),
    "half state space": lambda: JambaForCausalLM(
        JambaConfig(
            **SMALL, num_key_value_heads=2, num_experts=2, mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1
        )
    ),
    "convolution": lambda: Lfm2ForCausalLM(Lfm2Config(**SMALL, **HYBRID)),
    "positions of its own": lambda: BloomForCausalLM(BloomConfig(vocab_size=272, hidden_size=32, n_layer=2, n_head=4)),
    "positions from the mask": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=272,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    ),
}


def make(model, folder) -> Policy:
    torch.manual_seed(1)
    model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Policy(str(folder), dropout=False)


@pytest.fixture(params=KEPT)
def kept(request, tmp_path) -> Policy:
    return make(KEPT[request.param], tmp_path)


def documents(seed: int = 0) -> list[Tokens]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Tokens(torch.randint(5, 261, (n,), generator=generator).tolist(), [False] + [True] * (n - 1)) for n in LENGTHS
    ]


def batch_of(rows: list[Tokens]) -> InstructionBatch:
    return InstructionDataset(rows, pad_id=0)[MicroBatch(tuple(range(len(rows))), 1)]


def scores(model: Policy, batch: InstructionBatch) -> Tensor:
    return model.token_scores(batch["input_ids"], batch["loss_mask"], batch.get("position_ids")).logprobs


def by_document(table: Tensor, rows: list[Tokens]) -> list[Tensor]:
    """Cut packed scores [N, T] into documents, the longest first; documents of one length keep their order."""
    return [
        piece
        for row, logprobs in zip(rows, table, strict=True)
        for piece in logprobs[: len(row.ids)].split(row.documents)
    ]


def alone(model: Policy, document: Tokens) -> Tensor:
    """Compute the scores from the whole logits of a single document."""
    ids = torch.tensor([document.ids])
    table = model.model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    return torch.nn.functional.pad(table, (1, 0))


def pieces(rows: list[Tokens]) -> list[list[int]]:
    return [list(part) for row in rows for part in torch.tensor(row.ids).split(row.documents)]


def test_packed_documents_score_as_alone_with_the_same_gradients(kept) -> None:
    found = documents()
    rows = pack(found, 14)
    assert [row.documents for row in rows] == [
        (9, 5),
        (7, 6, 1),
        (5, 3, 2),
    ]  # 14, 14 and 10 tokens: the last row is padded
    placed = {
        tuple(map(int, ids)): piece
        for ids, piece in zip(pieces(rows), by_document(scores(kept, batch_of(rows)), rows), strict=True)
    }
    expected = [alone(kept, document) for document in found]
    packed = [placed[tuple(document.ids)] for document in found]
    for mine, theirs in zip(packed, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    weighted = [
        sum((table * torch.linspace(-1, 1, len(table))).sum() for table in tables) for tables in (packed, expected)
    ]
    for mine, theirs in zip(gradients(kept, weighted[0]), gradients(kept, weighted[1]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_a_document_does_not_feel_what_stands_before_it(kept) -> None:
    first, second = documents()[:2]
    changed = Tokens([token % 255 + 6 for token in first.ids], first.supervised)
    tables = [scores(kept, batch_of(pack([other, second], 16)))[0, len(first.ids) :] for other in (first, changed)]
    torch.testing.assert_close(tables[0], tables[1], atol=1e-6, rtol=0)
    (joined,) = pack([first, second], 16)
    (leaking,) = scores(kept, batch_of([Tokens(joined.ids, joined.supervised)]))  # without position ids it does
    assert not torch.allclose(leaking[len(first.ids) :], tables[0], atol=1e-3, rtol=0)


def test_nothing_predicts_the_first_token_of_a_document(kept) -> None:
    batch = batch_of(pack(documents(), 14))
    batch["loss_mask"] = batch["attention_mask"]
    assert scores(kept, batch)[batch["position_ids"] == 0].eq(0).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_mode_and_gradient_checkpointing_change_nothing(kept, checkpointing) -> None:
    found = documents()
    batch = batch_of(pack(found, 14))
    reference = scores(kept, batch)
    kept.model.train()
    if checkpointing:
        kept.model.gradient_checkpointing_enable()
    trained = scores(kept, batch)
    torch.testing.assert_close(trained, reference, atol=1e-6, rtol=0)
    for mine, theirs in zip(gradients(kept, trained.sum()), gradients(kept, reference.sum()), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_rows_laid_end_to_end_score_the_same(kept, monkeypatch) -> None:
    batch = batch_of(pack(documents(), 14))
    reference = scores(kept, batch)
    monkeypatch.setattr(
        policy, "flattens", lambda model: True
    )  # what a flash attention kernel needs is right for any other too
    torch.testing.assert_close(scores(kept, batch), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MIXED)
def test_models_that_mix_documents_are_refused_with_the_first_packed_rows(tmp_path, name) -> None:
    model = make(MIXED[name], tmp_path)
    modes = [module.training for module in model.modules()]
    plain = batch_of(documents()[:2])
    scores(model, plain)  # rows of one document are welcome
    with pytest.raises(
        ValueError, match="mixes the documents of a packed row: their log-probabilities are off by"
    ) as error:
        scores(model, batch_of(pack(documents(), 14)))
    assert "\n" not in str(error.value)
    assert [module.training for module in model.modules()] == modes


def test_packing_is_checked_once(tmp_path, monkeypatch) -> None:
    model = make(MODELS["llama"], tmp_path)
    calls: list[str] = []
    check = loading.check_packing
    monkeypatch.setattr(policy, "check_packing", lambda name, *rest: (calls.append(name), check(name, *rest)))
    for _ in range(2):
        scores(model, batch_of(pack(documents(), 14)))
    assert len(calls) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_attention_keeps_documents_apart(tmp_path) -> None:
    pytest.importorskip("flash_attn")
    model = make(MODELS["llama"], tmp_path).cuda()
    found = documents()
    batch = batch_of(pack(found, 14))
    reference = scores(model, {name: value.cuda() for name, value in batch.items()})
    model.model.set_attn_implementation("flash_attention_2")
    model.packing_checked = False
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(
            scores(model, {name: value.cuda() for name, value in batch.items()}), reference, atol=0.1, rtol=0
        )
