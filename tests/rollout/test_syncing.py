"""The weights that an engine gets, and how a difference is found."""

import copy

import pytest
import torch
from conftest import FAST, GENERAL, Holder, build
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from modules.networks.lora import Lora, add_adapters, merge_adapters
from modules.rollout.syncing import (
    BLOCK_WORDS,
    check_checksums,
    check_probe,
    checksum,
    find_bound,
    merged_weights,
    probe_logprobs,
    probe_rows,
)


def test_weights_come_under_their_names_and_tied_ones_once(policy: Holder) -> None:
    found = list(merged_weights(policy))
    names = [name for name, _ in found]
    assert len(set(names)) == len(names)
    state = policy.model.state_dict()
    tied = set(state) - set(names)
    assert tied == ({"lm_head.weight"} if policy.model.config.tie_word_embeddings else set())
    assert all(torch.equal(weight, state[name]) and not weight.requires_grad for name, weight in found)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "llama"])  # gpt2 has transposed layers, llama tied embeddings
def test_adapters_are_merged_as_in_an_export(name: str) -> None:
    holder = build({**FAST, **GENERAL}[name])
    add_adapters(holder.model, Lora(r=3))
    add_adapters(holder.model, Lora(r=2), "critic")
    with torch.no_grad():
        for weight in holder.model.parameters():
            if weight.requires_grad:
                weight.add_(0.05)
    before = copy.deepcopy(holder.model.state_dict())
    found = dict(merged_weights(holder))
    expected = dict(merge_adapters(holder.model).named_parameters())
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())
    assert all(torch.equal(before[key], weight) for key, weight in holder.model.state_dict().items())


def test_a_sharded_weight_comes_whole(qwen3: Holder, tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        head = qwen3.model.lm_head
        whole = head.weight.detach().clone()
        head.weight = torch.nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
        found = dict(merged_weights(qwen3))["lm_head.weight"]
        assert type(found) is torch.Tensor and torch.equal(found, whole)
    finally:
        torch.distributed.destroy_process_group()


def test_the_checksum_is_the_sum_that_it_says() -> None:
    # Two words of 8 bytes: 1 and 2. The odd numbers are SplitMix64 of 1 and 2 with the last bit set.
    def mix(n: int) -> int:
        x = n * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return (x ^ x >> 31) | 1

    expected = (mix(1) + 2 * mix(2)) % 2**64
    assert checksum(torch.tensor([1, 2])) == f"int64[2]:{expected:016x}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_the_checksum_tells_of_every_bit(dtype: torch.dtype) -> None:
    size = 8 * BLOCK_WORDS // torch.empty((), dtype=dtype).element_size() + 5  # a second block, not full
    tensor = torch.rand(size).to(dtype)
    right = checksum(tensor)
    data = tensor.view(torch.uint8)
    for place in (0, 1, 7, 8, len(data) // 2, len(data) - 1):
        for bit in (0, 7):
            data[place] ^= 1 << bit
            assert checksum(tensor) != right
            data[place] ^= 1 << bit
    assert checksum(tensor) == right
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert checksum(tensor) == right
    torch.set_num_threads(threads)


def test_the_checksum_tells_of_order_shape_and_dtype() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    others = [tensor.view(3, 2), tensor.flip(0), tensor.flip(1), tensor.view(torch.int32), torch.zeros(2, 3)]
    assert len({checksum(each) for each in [tensor, *others]}) == 6
    assert checksum(torch.arange(12.0).view(3, 4).t()[:2]) == checksum(torch.tensor([[0.0, 4, 8], [1, 5, 9]]))
    assert checksum(torch.zeros(0)) != checksum(torch.zeros(1))


def test_the_probe_is_the_log_softmax_of_a_plain_forward(policy: Holder) -> None:
    rows = probe_rows(policy.model.config.vocab_size, policy.max_positions)
    assert rows == probe_rows(policy.model.config.vocab_size, policy.max_positions)
    assert all(0 <= token < policy.model.config.vocab_size for row in rows for token in row)
    found = probe_logprobs(policy.model, rows)
    model = copy.deepcopy(policy.model).eval()
    for row, logprobs in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0].double()
        for place, value in enumerate(logprobs):
            expected = logits[place, row[place + 1]] - logits[place].exp().sum().log()
            assert value == pytest.approx(float(expected), abs=1e-4)


def test_the_probe_fits_few_positions() -> None:
    assert {len(row) for row in probe_rows(7, 5)} == {5}
    assert {len(row) for row in probe_rows(7, 500)} == {16}


def test_a_difference_is_named() -> None:
    mine = {"a.weight": "float32[1]:01", "b.weight": "float32[1]:02"}
    check_checksums(mine, dict(mine), "engine")
    with pytest.raises(RuntimeError, match="^engine has another weight b.weight than the policy"):
        check_checksums(mine, mine | {"b.weight": "float32[1]:03"}, "engine")
    with pytest.raises(RuntimeError, match="engine has no weight b.weight"):
        check_checksums(mine, {"a.weight": "float32[1]:01"}, "engine")
    with pytest.raises(RuntimeError, match="engine has a weight c.weight that the policy lacks"):
        check_checksums(mine, mine | {"c.weight": "float32[1]:03"}, "engine")


def test_a_probe_beyond_the_bound_is_refused(qwen3: Holder) -> None:
    rows = [[-1.0, -2.0], [-3.0, -4.0]]
    check_probe(rows, [[-1.0, -2.0], [-3.0, -4.00009]], 1e-4, "engine")
    with pytest.raises(RuntimeError, match="the probe differs by 0.25 nats, more than 0.0001"):
        check_probe(rows, [[-1.0, -2.25], [-3.0, -4.00009]], 1e-4, "engine")
    with pytest.raises(RuntimeError, match="differs by nan nats"):
        check_probe(rows, [[-1.0, -2.0], [float("nan"), -4.0]], 1e-4, "engine")
    with pytest.raises(RuntimeError, match="gives 2 log-probs of the probe, not 4"):
        check_probe(rows, [[-1.0, -2.0]], 1e-4, "engine")
    assert find_bound(qwen3.model) == 1e-4
    assert find_bound(qwen3.model.bfloat16()) == 0.1
