"""What FP8 engines are sent: which tensors, which codes, how they lie in a bucket. Pure functions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_sdpo.fp8_format import BLOCK, KEY, is_quantized, quantization_config, scale_name, scale_shape
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore import names
from megatron_sdpo.quantization import CODES, of_blocks, quantized_blocks
from megatron_sdpo.reshard.quantize import Tensors, quantized
from tests.fp8_setup import write_published

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
DENSE = (*KINDS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    write_published(folder / "qwen3", "qwen3")
    write_published(folder / "narrow", "qwen3", head_dim=64)
    write_published(folder / "qwen3_moe", "qwen3_moe")
    return folder


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return read_hf_config(path), load_file(path / "model.safetensors")


def published(path: Path, kept: int = 0) -> dict[str, Tensor]:
    hf_config, tensors = read(path)
    return dict(quantized(hf_config, kept, list(tensors.items())))


def test_the_linears_of_the_layers_and_nothing_else(folder: Path) -> None:
    sent = published(folder / "qwen3")
    wanted = {f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in DENSE}
    assert {name for name, tensor in sent.items() if tensor.dtype == CODES} == wanted
    assert sent.keys() == {*read(folder / "qwen3")[1], *map(scale_name, wanted)}
    _, exact = read(folder / "qwen3")
    for name, tensor in sent.items():
        if name in wanted:
            scales = sent[scale_name(name)]
            assert scales.dtype == torch.float32
            assert (tensor.shape, scales.shape) == (exact[name].shape, scale_shape(tuple(exact[name].shape)))
            # Three bits after the point: half of the last one is a sixteenth of the number.
            bound = torch.maximum(exact[name].abs() / 16, scales.max() * 2**-10)
            assert bool(((of_blocks(tensor, scales) - exact[name]).abs() <= bound).all())
        elif name in exact:
            assert tensor is not None and torch.equal(tensor, exact[name])


def test_experts_but_not_their_router(folder: Path) -> None:
    sent = published(folder / "qwen3_moe")
    assert sent["model.layers.1.mlp.experts.7.down_proj.weight"].dtype == CODES
    assert sent["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    assert not is_quantized("model.layers.1.mlp.gate.weight", 2, 0)
    assert not is_quantized("model.layers.1.self_attn.q_proj.bias", 2, 0)
    assert not is_quantized("lm_head.weight", 2, 0)


def test_kept_layers_stay_as_they_are(folder: Path) -> None:
    assert [is_quantized(f"model.layers.{n}.mlp.up_proj.weight", 4, 1) for n in range(4)] == [False, True, True, False]
    hf_config = {**read(folder / "qwen3")[0], "num_hidden_layers": 12}
    said = quantization_config(hf_config, 1)["modules_to_not_convert"]
    assert set(said) == {"lm_head", *(f"model.layers.{n}.{name}" for n in (0, 11) for name in DENSE)}


def test_an_engine_leaves_out_the_same_modules(folder: Path) -> None:
    """Read as SGLang reads it: whole names, of every part of a fused linear."""
    moe = {**read(folder / "qwen3_moe")[0], "num_hidden_layers": 12}
    for hf_config in ({**read(folder / "qwen3")[0], "num_hidden_layers": 12}, moe):
        said = quantization_config(hf_config, 2)["modules_to_not_convert"]
        experts = "num_experts" in hf_config
        for layer in range(12):
            mlp = ["mlp.experts"] if experts else list(DENSE[4:])
            found = [f"model.layers.{layer}.{name}" in said for name in (*KINDS, *mlp)]
            assert set(found) == {layer in (0, 1, 10, 11)}
            assert (f"model.layers.{layer}.mlp.gate" in said) == experts


def test_what_config_json_says(folder: Path) -> None:
    said = quantization_config(read(folder / "qwen3")[0], 0)
    assert said == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head"],
    }
    assert KEY == "quantization_config"


def trainers_own(path: Path, tensor_ranks: int) -> dict[str, Tensor]:
    """Codes and scales of the ranks' local weights, as their products have them, under Hugging Face names."""
    hf_config, exact = read(path)
    in_blocks = {**hf_config, "head_dim": hf_config["head_dim"] // BLOCK}
    found: dict[str, Tensor] = {}
    for tensors in names.parameters(hf_config).values():
        if not is_quantized(tensors[0].name, hf_config["num_hidden_layers"], 0):
            continue
        codes, scales = [], []
        for rank in range(tensor_ranks):
            local = names.read_shard(exact, tensors, hf_config, rank, tensor_ranks)
            its_codes, its_scales = quantized_blocks(local)
            codes.append(names.split(tensors, its_codes.view(torch.uint8), hf_config))
            scales.append(names.split(tensors, its_scales, in_blocks))
        for i, tensor in enumerate(tensors):
            found[tensor.name] = names.join(tensor, [pieces[i] for pieces in codes]).view(CODES)
            found[scale_name(tensor.name)] = names.join(tensor, [pieces[i] for pieces in scales])
    return found


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("tensor_ranks", [1, 2])
def test_the_trainer_multiplies_by_the_same_codes(folder: Path, name: str, tensor_ranks: int) -> None:
    sent, own = published(folder / name), trainers_own(folder / name, tensor_ranks)
    assert {key for key, tensor in sent.items() if tensor.dtype == CODES} == {k for k in own if k.endswith(".weight")}
    for key, tensor in own.items():
        there = sent[key]
        assert there.dtype == tensor.dtype
        assert torch.equal(there.view(torch.uint8), tensor.contiguous().view(torch.uint8)), key


def test_narrow_heads_have_other_blocks(folder: Path) -> None:
    """Half of a key head and half of a value head are one block of the trainer's, two key heads one of an engine's."""
    hf_config, exact = read(folder / "narrow")
    (tensors,) = (
        t for t in names.parameters(hf_config).values() if t[0].name == "model.layers.0.self_attn.q_proj.weight"
    )
    codes, scales = quantized_blocks(names.read_shard(exact, tensors, hf_config, 0, 1))
    own = names.split(tensors, of_blocks(codes, scales), hf_config)
    sent = published(folder / "narrow")
    differing = []
    for tensor, ours in zip(tensors, own, strict=True):
        theirs = of_blocks(sent[tensor.name], sent[scale_name(tensor.name)])
        assert (ours - theirs).abs().max() <= exact[tensor.name].abs().max() / 8
        differing.append(not torch.equal(ours, theirs))
    assert any(differing)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bucket_of_bytes_can_be_viewed(dtype: torch.dtype) -> None:
    """As SGLang takes it apart; odd numbers of codes and of halves before others would put those out of place."""
    hf_config = {"num_hidden_layers": 1}
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    linear = "model.layers.0.self_attn.o_proj.weight"
    pairs: Tensors = [
        (linear, weight),
        ("model.norm.weight", torch.ones(3, dtype=dtype)),
        ("lm_head.weight", 2 * weight),
        ("model.layers.0.mlp.up_proj.weight", 3 * weight),
    ]
    sent = quantized(hf_config, 0, pairs)
    flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in sent])
    begin = 0
    for name, tensor in sent:
        there = flat[begin : begin + tensor.nbytes].view(tensor.dtype).reshape(tensor.shape)  # raises when out of place
        assert torch.equal(there.view(torch.uint8), tensor.view(torch.uint8)), name
        begin += tensor.nbytes
    assert len(sent) == 6 and dict(sent)[linear].dtype == CODES
