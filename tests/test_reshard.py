"""The publishing plan, the digest and the sender's address: no processes."""

import socket
from itertools import pairwise
from math import prod
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sdpo.mcore import names
from megatron_sdpo.reshard.digest import checksum, describe, digest
from megatron_sdpo.reshard.host import HostCopies
from megatron_sdpo.reshard.plan import Bucket, plan
from megatron_sdpo.reshard.publish import probe_ids
from megatron_sdpo.reshard.transport import own_address

MODELS = [(family, tied) for family in ("llama", "qwen2", "qwen3") for tied in (False, True)]


def config(family: str = "llama", tied: bool = False) -> dict[str, Any]:
    return {
        "model_type": family,
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "tie_word_embeddings": tied,
    }


def size(bucket: Bucket, element_bytes: int) -> int:
    return sum(prod(tensor.shape) for tensor in bucket.tensors) * element_bytes


# --- the plan ---


@pytest.mark.parametrize(("pp", "vp"), [(1, 1), (2, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize(("family", "tied"), MODELS)
@settings(deadline=None, derandomize=True)
@given(bucket_bytes=st.integers(1, 120_000), element_bytes=st.sampled_from([2, 4]))
def test_every_tensor_travels_once_in_buckets_of_the_size_asked_for(
    family: str, tied: bool, pp: int, vp: int, bucket_bytes: int, element_bytes: int
) -> None:
    hf = config(family, tied)
    buckets = plan(hf, pp, element_bytes, bucket_bytes, vp)
    sent = [tensor for bucket in buckets for tensor in bucket.tensors]
    assert sorted(tensor.name for tensor in sent) == sorted(names.hf_layout(hf))
    for bucket in buckets:
        assert bucket.parameters
        assert size(bucket, element_bytes) <= bucket_bytes or len(bucket.parameters) == 1
        for parameter in bucket.parameters:
            assert parameter.tensors == names.parameters(hf)[parameter.tensors[0].parameter]  # none is divided
            (stage,) = {tensor.stage(pp * vp) for tensor in parameter.tensors}
            assert stage % pp == bucket.rank
            local = parameter.tensors[0].local(pp * vp)
            assert parameter.local == (local if vp == 1 else f"{stage // pp}.{local}")
    stages = [bucket.rank for bucket in buckets]
    assert stages == sorted(stages)
    assert set(stages) == set(range(pp))
    assert buckets == plan(dict(hf), pp, element_bytes, bucket_bytes, vp)


@pytest.mark.parametrize(("family", "tied"), MODELS)
@settings(deadline=None, derandomize=True)
@given(bucket_bytes=st.integers(1, 120_000))
def test_what_an_engine_fuses_arrives_together(family: str, tied: bool, bucket_bytes: int) -> None:
    where = {
        tensor.name: i
        for i, bucket in enumerate(plan(config(family, tied), 2, 4, bucket_bytes))
        for tensor in bucket.tensors
    }
    kinds = ["weight", "bias"] if family == "qwen2" else ["weight"]
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        for kind in kinds:
            assert len({where[f"{prefix}.self_attn.{x}_proj.{kind}"] for x in "qkv"}) == 1
        assert len({where[f"{prefix}.mlp.{x}_proj.weight"] for x in ("gate", "up")}) == 1


@pytest.mark.parametrize("pp", [1, 2])
def test_buckets_are_filled(pp: int) -> None:
    """No two neighbours of a stage would have fitted into one."""
    for one, other in pairwise(plan(config(), pp, 4, 20_000)):
        if one.rank == other.rank:
            first = other.parameters[0].elements() * 4
            assert size(one, 4) + first > 20_000
    assert len(plan(config(), pp, 4, 1 << 30)) == pp


def test_a_tied_embedding_is_sent_by_the_first_stage() -> None:
    stages = {t.name: b.rank for b in plan(config(tied=True), 2, 4, 1 << 30) for t in b.tensors}
    assert stages["model.embed_tokens.weight"] == 0
    assert "lm_head.weight" not in stages


# --- the digest ---


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in {"a": (7, 5), "b": (33,), "c": ()}.items()}


def digest_of(named: dict[str, Tensor]) -> str:
    return digest(describe(name, tensor) for name, tensor in named.items())


def test_the_digest_does_not_depend_on_order() -> None:
    named = tensors()
    assert digest_of(named) == digest_of(dict(reversed(named.items())))
    assert len(digest_of(named)) == 16


def test_the_digest_sees_names_shapes_dtypes_and_missing_tensors() -> None:
    named = tensors()
    others = [
        {("A" if name == "a" else name): tensor for name, tensor in named.items()},
        {"a": named["b"], "b": named["a"], "c": named["c"]},
        named | {"a": named["a"].reshape(5, 7)},
        named | {"a": named["a"].view(torch.int32)},
        {name: tensor for name, tensor in named.items() if name != "c"},
    ]
    assert len({digest_of(other) for other in [named, *others]}) == 6


@settings(deadline=None, derandomize=True)
@given(byte=st.integers(0, 7 * 5 * 4 - 1), bit=st.integers(0, 7))
def test_the_digest_sees_one_bit(byte: int, bit: int) -> None:
    named = tensors()
    before = digest_of(named)
    named["a"].view(-1).view(torch.uint8)[byte] ^= 1 << bit
    assert digest_of(named) != before


@pytest.mark.parametrize("distance", [1, 2, 4096, 65_521, 65_536, 1 << 20])
def test_the_checksum_sees_two_values_swapped(distance: int) -> None:
    tensor = torch.arange((1 << 20) + 10, dtype=torch.float32)
    before = checksum(tensor)
    tensor[[3, 3 + distance]] = tensor[[3 + distance, 3]]
    assert checksum(tensor) != before


@settings(deadline=None, derandomize=True)
@given(chunk=st.integers(1, 200))
def test_chunks_do_not_change_the_checksum(chunk: int) -> None:
    tensor = tensors()["a"]
    data = tensor.reshape(-1).view(torch.uint8).tolist()
    assert checksum(tensor, chunk) == sum(place * byte for place, byte in enumerate(data, 1))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_checksum_is_exact_where_products_are_not(precision: str) -> None:
    """The largest sums, more than a chunk of them, under every precision that a process may have asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        data = torch.full(((1 << 20) + 131,), 255, dtype=torch.uint8)
        assert checksum(data) == 255 * len(data) * (len(data) + 1) // 2
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_checksum_reads_values_not_storage() -> None:
    tensor = tensors()["a"]
    assert checksum(tensor.T) == checksum(tensor.T.contiguous()) != checksum(tensor)
    assert checksum(torch.empty(0)) == 0
    assert checksum(tensor.bfloat16()) != checksum(tensor)


# --- the probe ---


def test_the_probe_is_fixed_and_in_the_vocabulary() -> None:
    assert probe_ids(104, 32) == probe_ids(104, 32)
    assert len(probe_ids(104, 32)) == 32
    assert set(probe_ids(40, 500)) == set(range(39)), "all but the last, which an engine does not tell"


def test_a_sender_listens_where_its_engines_reach_it() -> None:
    """On every address of this machine that something could come from, and on no other."""
    found = [a.address for addresses in psutil.net_if_addrs().values() for a in addresses if a.family == socket.AF_INET]
    assert "127.0.0.1" in found
    for address in found:
        assert own_address(f"http://{address}:31000") == address
    assert own_address("http://localhost:31000") in ("127.0.0.1", "::1")
    with pytest.raises(ValueError, match="names no host"):
        own_address("31000")


# --- the copies ---


ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_copies_are_kept_and_their_memory_is_used_again(device: str) -> None:
    made = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 128)}
    kinds = {"a": torch.bfloat16, "b": torch.float32, "c": torch.float8_e4m3fn}

    def bucket() -> list[tuple[str, Tensor]]:
        return [(n, torch.randn(shapes[n], generator=made).to(kinds[n]).to(device)) for n in shapes]

    def same(copies: list[tuple[str, Tensor]], pairs: list[tuple[str, Tensor]]) -> bool:
        if device == "cuda":
            torch.cuda.synchronize()
        bits = [[(n, t.cpu().reshape(-1).view(torch.uint8).tolist()) for n, t in side] for side in (copies, pairs)]
        return bits[0] == bits[1] and [t.shape for _, t in copies] == [t.shape for _, t in pairs]

    host = HostCopies()
    versions = [[bucket(), bucket()[:2]] for _ in range(3)]
    kept = [[host.copy(v % 2, i, pairs) for i, pairs in enumerate(buckets)] for v, buckets in enumerate(versions[:2])]
    places = [[t.data_ptr() for _, t in copies] for copies in kept[0]]
    assert all(same(c, p) for v in (0, 1) for c, p in zip(kept[v], versions[v], strict=True))
    again = [host.copy(0, i, pairs) for i, pairs in enumerate(versions[2])]
    assert [[t.data_ptr() for _, t in copies] for copies in again] == places
    assert all(same(c, p) for c, p in zip(again, versions[2], strict=True))
    assert all(same(c, p) for c, p in zip(kept[1], versions[1], strict=True)), "the other set is as it was"
    assert all(t.is_pinned() for _, t in again[0]) == (device == "cuda")
    wider = [(name, torch.cat([t, t])) for name, t in versions[0][1]]  # engines in FP8 or not, a changed layout
    assert same(host.copy(0, 1, wider), wider) and same(again[0], versions[2][0])
