"""Hugging Face names <-> Megatron shards: pure, every layout, to the bit."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sdpo.mcore import names

LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 4, 8, 4, 6, 24
LAYOUTS = list(itertools.product((1, 2, 4), (1, 2)))


def config(family: str = "llama", tied: bool = False) -> dict[str, Any]:
    return {
        "model_type": family,
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "tie_word_embeddings": tied,
        **({"num_experts": 6, "moe_intermediate_size": 12} if family == "qwen3_moe" else {}),
    }


def checkpoint(hf: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(t.shape, generator=generator) for name, t in names.hf_layout(hf).items()}


def stage(pp: int, rank: int) -> dict[str, Any]:
    size = LAYERS // pp
    return {"layers": range(rank * size, (rank + 1) * size), "first": rank == 0, "last": rank == pp - 1}


def concatenated(shards: list[Tensor], axis: int | None) -> Tensor:
    return shards[0] if axis is None else torch.cat(shards, axis)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_there_and_back_is_the_same_to_the_bit(family: str, tied: bool, tp: int, pp: int) -> None:
    hf = config(family, tied)
    before = checkpoint(hf)
    after: dict[str, Tensor] = {}
    for rank in range(pp):
        where = stage(pp, rank)
        shards = [names.to_megatron(before, hf, tp_rank, tp, **where) for tp_rank in range(tp)]
        for name in shards[0]:
            full = concatenated([shard[name] for shard in shards], names.tp_axis(name))
            pairs = names.megatron_to_hf(name, full, hf, tp, where["layers"].start)
            assert not after.keys() & dict(pairs).keys()
            after |= dict(pairs)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_the_layout_says_where_each_slice_lies(family: str, tp: int, pp: int) -> None:
    """Each rank alone, from its local parameter, recovers the slices that hf_layout promises; they cover the tensor."""
    hf = config(family)
    before = checkpoint(hf)
    covered = {name: torch.zeros(value.shape) for name, value in before.items()}
    for rank, tp_rank in itertools.product(range(pp), range(tp)):
        where = stage(pp, rank)
        local = names.to_megatron(before, hf, tp_rank, tp, **where)
        for name, tensors in names.stage_parameters(hf, **where).items():
            assert tuple(local[name].shape) == names.local_shape(tensors, tp)
            for tensor, piece in zip(tensors, names.split(tensors, local[name], hf), strict=True):
                assert (tensor.stage(pp), tensor.local(pp)) == (rank, name)
                slices = tensor.slices(tp_rank, tp)
                assert torch.equal(piece, before[tensor.name][slices])
                covered[tensor.name][slices] += 1
    for name, tensor in names.hf_layout(hf).items():
        assert (covered[name] == (tp if tensor.tp_axis is None else 1)).all()


def test_the_fused_parameters_are_megatrons() -> None:
    """Written out without the module under test: key-value group by group, and [gate; up] of each rank."""
    hf = config()
    tensors = checkpoint(hf)
    q, k, v = (tensors[f"model.layers.2.self_attn.{x}_proj.weight"] for x in "qkv")
    gate, up = (tensors[f"model.layers.2.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    d, per_group = HEAD_DIM, HEADS // KV_HEADS
    rows = []
    for group in range(KV_HEADS):
        rows += [q[group * per_group * d : (group + 1) * per_group * d], k[group * d :][:d], v[group * d :][:d]]
    qkv = torch.cat(rows)
    for tp_rank in range(2):
        local = names.to_megatron(tensors, hf, tp_rank, 2, **stage(2, 1))
        assert torch.equal(local["decoder.layers.0.self_attention.linear_qkv.weight"], qkv.chunk(2)[tp_rank])
        fc1 = torch.cat([gate.chunk(2)[tp_rank], up.chunk(2)[tp_rank]])
        assert torch.equal(local["decoder.layers.0.mlp.linear_fc1.weight"], fc1)
        assert torch.equal(
            local["decoder.layers.0.mlp.linear_fc2.weight"],
            tensors["model.layers.2.mlp.down_proj.weight"].chunk(2, 1)[tp_rank],
        )


def test_a_tied_head_is_copied_to_the_last_stage_only() -> None:
    hf = config(tied=True)
    tensors = checkpoint(hf)
    assert "lm_head.weight" not in tensors
    assert names.HEAD not in names.to_megatron(tensors, hf, 0, 1, **stage(1, 0))
    last = names.to_megatron(tensors, hf, 1, 2, **stage(2, 1))
    assert torch.equal(last[names.HEAD], tensors["model.embed_tokens.weight"].chunk(2)[1])
    assert names.megatron_to_hf(names.HEAD, tensors["model.embed_tokens.weight"], hf, 1, 2) == []


def test_unknown_and_missing_tensors_are_named() -> None:
    hf = config()
    tensors = checkpoint(hf)
    with pytest.raises(ValueError, match=r"unknown tensor 'model\.layers\.0\.self_attn\.q_norm\.weight'"):
        names.to_megatron({**tensors, "model.layers.0.self_attn.q_norm.weight": torch.ones(6)}, hf, 0, 1, **stage(1, 0))
    del tensors["model.layers.3.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"missing tensor 'model\.layers\.3\.mlp\.up_proj\.weight'"):
        names.to_megatron(tensors, hf, 0, 1, **stage(1, 0))


def test_a_tensor_of_another_shape_is_named() -> None:
    hf = config()
    tensors = checkpoint(hf)
    tensors["model.embed_tokens.weight"] = torch.zeros(48, 32)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight has the shape \(48, 32\)"):
        names.to_megatron(tensors, hf, 0, 2, **stage(1, 0))


@pytest.mark.parametrize("name", ["decoder.layers.0.mlp.router.bias", "decoder.layers.4.mlp.linear_fc2.weight", "x"])
def test_unknown_megatron_parameters_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        names.megatron_to_hf(name, torch.zeros(2, 2), config())
    if name != "decoder.layers.4.mlp.linear_fc2.weight":  # a layer too many is not known to tp_axis
        with pytest.raises(ValueError, match=name):
            names.tp_axis(name)


def test_a_cut_that_does_not_divide_is_refused() -> None:
    hf = config() | {"intermediate_size": 25}
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=rf"{name} of shape \(25, 32\) cannot be cut into 2"):
        names.hf_layout(hf)[name].slices(0, 2)


@pytest.mark.parametrize(("vocabulary", "tp"), [(41, 2), (5, 4), (41, 4), (40, 4), (3, 2)])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_vocabulary_is_padded_with_zeros_that_leave_with_no_tensor(name: str, vocabulary: int, tp: int) -> None:
    """5 entries on 4 ranks: the third rank holds one entry and one row of padding, the fourth padding alone."""
    hf = config() | {"vocab_size": vocabulary}
    tensors = checkpoint(hf)
    padded = names.padded_vocabulary(hf, tp)
    assert (padded % tp, vocabulary <= padded < vocabulary + tp) == (0, True)
    parameter = names.hf_layout(hf)[name].parameter
    shards = [names.to_megatron(tensors, hf, rank, tp, **stage(1, 0))[parameter] for rank in range(tp)]
    made_of = names.parameters(hf)[parameter]
    assert {tuple(shard.shape) for shard in shards} == {names.local_shape(made_of, tp)} == {(padded // tp, 32)}
    full = torch.cat(shards)
    assert not full[vocabulary:].any()
    full[vocabulary:] = torch.nan  # whatever stands there stays there
    ((exported, value),) = names.megatron_to_hf(parameter, full, hf, tp)
    assert exported == name
    assert torch.equal(value, tensors[name])


def test_transformer_engines_fused_norms_have_their_plain_names() -> None:
    fused = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    assert names.canonical(fused) == "decoder.layers.1.input_layernorm.weight"
    assert names.megatron_to_hf(fused, torch.ones(32), config(), 2, 2)[0][0] == "model.layers.3.input_layernorm.weight"
    assert names.tp_axis(fused) is None


def test_transformer_engines_grouped_experts_have_their_plain_names() -> None:
    hf = config("qwen3_moe")
    grouped = "decoder.layers.1.mlp.experts.linear_fc1.weight5"
    assert names.canonical(grouped) == "decoder.layers.1.mlp.experts.local_experts.5.linear_fc1.weight"
    assert names.tp_axis(grouped) == 0
    pairs = names.megatron_to_hf(grouped, torch.ones(24, 32), hf, 2, 2)
    assert [name for name, _ in pairs] == [f"model.layers.3.mlp.experts.5.{x}_proj.weight" for x in ("gate", "up")]
