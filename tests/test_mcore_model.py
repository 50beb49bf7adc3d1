"""The Megatron model against transformers, on every layout: logits, gradients, neighbours in a packed row, export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_sdpo.config import ConfigError, LayoutConfig
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore.hf import HfCheckpoint
from megatron_sdpo.mcore.model import transformer_config
from megatron_sdpo.mcore.modules import CausalAttention, packed_rows
from recipes.minipipe import BASE_MODEL
from tests.hf_reference import reference
from tests.launch import run_ranks
from tests.tiny_model import write_tiny_checkpoint

LENGTHS = (5, 17, 1, 40)
VOCABULARY = 104
CHECKPOINTS = ("llama", "llama3", "qwen3", "qwen3-tied", "qwen2", "qwen3-moe")
# The longest document is longer than the original context.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of each kind, and the inputs that all layouts share."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_checkpoint(folder / "llama", seed=1)
    write_tiny_checkpoint(folder / "llama3", seed=1)
    _edit(folder / "llama3", rope_scaling=LLAMA3)
    for name in ("qwen3", "qwen3-tied", "qwen2"):
        write_tiny_checkpoint(folder / name, seed=2, family="qwen3", kv_heads=2)
    write_tiny_checkpoint(folder / "qwen3-moe", seed=3, family="qwen3_moe", kv_heads=2)
    _tie(folder / "qwen3-tied")
    make_qwen2(folder / "qwen2")
    generator = torch.Generator().manual_seed(5)
    # never token 0: transformers gives the padding token's embedding no gradient
    documents = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    perturbed = [documents[0], (documents[1] + 1) % VOCABULARY, *documents[2:]]
    weights_TV = torch.randn(sum(LENGTHS), VOCABULARY, generator=generator)
    torch.save({"documents": documents, "perturbed": perturbed, "weights_TV": weights_TV}, folder / "inputs.pt")
    return folder


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    inputs = torch.load(folder / "inputs.pt")
    return {name: reference(folder / name, inputs["documents"], inputs["weights_TV"]) for name in CHECKPOINTS}


def _tie(path: Path) -> None:
    _edit(path, tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def make_qwen2(path: Path) -> None:
    _edit(path, architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name in [name for name in tensors if name.endswith(("q_norm.weight", "k_norm.weight"))]:
        del tensors[name]
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        tensors[name.replace("weight", "bias")] = torch.randn(len(tensors[name]), generator=generator)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _edit(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def _tensors(path: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_layout_equals_transformers(
    folder: Path, references: dict[str, tuple[Tensor, dict[str, Tensor]]], tp: int, pp: int
) -> None:
    run_ranks("dist_model.py", tp * pp, [str(tp), str(pp), str(folder), *CHECKPOINTS], timeout=200)
    for name in CHECKPOINTS:
        out = folder / f"tp{tp}pp{pp}" / name
        expected_TV, expected_gradients = references[name]
        logits_TV = torch.load(out / "logits.pt")
        # packed with its neighbours, each document is as if alone
        torch.testing.assert_close(logits_TV, expected_TV, atol=1e-4, rtol=0)
        # an expert multiplies the tokens of all documents together, and how many there are moves the last bit
        _check_neighbours(logits_TV, torch.load(out / "perturbed.pt"), 1e-5 if name == "qwen3-moe" else 0.0)
        _check_export(folder / name, out / "export")
        gradients = _tensors(out / "gradients")
        assert gradients.keys() == expected_gradients.keys()
        for parameter, gradient in gradients.items():
            expected = expected_gradients[parameter]
            difference = (gradient - expected).abs().max() / expected.abs().max()
            assert difference < 1e-4, f"{name} {parameter}"


def _check_neighbours(logits_TV: Tensor, perturbed_TV: Tensor, tolerance: float) -> None:
    """Other words in the second document change nothing, with tolerance 0 not one bit, in the others."""
    same = ((logits_TV - perturbed_TV).abs() <= tolerance).all(1)
    second = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    assert not same[second].any()
    same[second] = True
    assert same.all()


def _check_export(source: Path, export: Path) -> None:
    before, after = _tensors(source), _tensors(export)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert len(list(export.glob("*.safetensors"))) > 1
    assert read_hf_config(export) == read_hf_config(source)
    assert (export / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert [path.name for path in export.parent.iterdir() if path.name.startswith(".")] == []


def test_a_head_beside_a_tied_embedding_must_equal_it(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "model", seed=1)
    _edit(path, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs from its embedding"):
        HfCheckpoint(path, read_hf_config(path))
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    with HfCheckpoint(path, read_hf_config(path)) as checkpoint:
        assert checkpoint.keys() == tensors.keys() - {"lm_head.weight"}


@pytest.mark.parametrize("lengths", [(40, 1, 2, 17, 2, 33, 16, 15), (3, 4), (9, 9, 1, 9)])
def test_padding_puts_every_token_in_its_place(lengths: tuple[int, ...]) -> None:
    padding = packed_rows(lengths, torch.device("cpu")).padding
    total = sum(lengths)
    assert not padding.none
    assert torch.equal(padding.source_P[padding.target_T], torch.arange(total))
    assert sum(n * width for n, width in padding.blocks) == len(padding.source_P) < 2 * total


@pytest.mark.parametrize(
    ("lengths", "blocks"),
    [((3,), ((1, 3),)), ((1, 1, 1), ((3, 1),)), ((70, 70, 65, 32, 32), ((2, 70), (1, 65), (2, 32)))],
)
def test_runs_of_one_length_are_blocks_as_they_stand(
    lengths: tuple[int, ...], blocks: tuple[tuple[int, int], ...]
) -> None:
    padding = packed_rows(lengths, torch.device("cpu")).padding
    assert padding.none and padding.blocks == blocks


def test_both_ways_of_attending_agree() -> None:
    """Runs as blocks against the same sequences among short ones, which are padded."""
    hf = read_hf_config(BASE_MODEL)
    config = transformer_config(hf, LayoutConfig(), torch.float32)
    attention, generator = CausalAttention(config, 1, None, "self"), torch.Generator().manual_seed(0)
    lengths, short = (70, 70, 65, 64), (3, 2, 5, 4, 3)
    heads, d = hf["num_attention_heads"], hf["head_dim"]
    total = sum(lengths)
    qkv = [torch.randn(total, heads, d, generator=generator, requires_grad=True) for _ in range(3)]
    more = [torch.randn(sum(short), heads, d, generator=generator) for _ in range(3)]
    table = torch.randn(80, d // 2, generator=generator).repeat(1, 2)

    def attended(lengths: tuple[int, ...], *parts: Tensor) -> Tensor:
        rows = packed_rows(lengths, torch.device("cpu"))
        rows.set_rotary(table.cos(), table.sin())
        return attention(*parts, packed_seq_params=rows)

    assert packed_rows(lengths, torch.device("cpu")).padding.none
    assert not packed_rows((*lengths, *short), torch.device("cpu")).padding.none
    alone = attended(lengths, *qkv)
    among = attended((*lengths, *short), *(torch.cat(pair) for pair in zip(qkv, more, strict=True)))[:total]
    torch.testing.assert_close(alone, among, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(alone.shape, generator=generator)
    for ours, theirs in zip(*(torch.autograd.grad(x, qkv, upstream) for x in (alone, among)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [(), (3, 0)])
def test_an_empty_sequence_is_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        packed_rows(lengths, torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture 'MambaForCausalLM'"),
        ({"model_type": "qwen2"}, "model_type 'qwen2'"),
        ({"hidden_size": None}, "does not say hidden_size"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"sliding_window": 128}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"'llama3' with the keys \['factor'\]; it needs"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor that is not below"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary scaling rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, r"'default' with the keys \['factor'\]"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta twice"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "a part of each head"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3}, "which differ"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"logit_softcap": 30.0}, "logit_softcap=30.0, which this package does not know"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write_tiny_checkpoint(tmp_path / "model", seed=1)
    _edit(path, **change)
    with pytest.raises(ConfigError, match=words):
        read_hf_config(path)


def test_rotary_scaling_moves_the_logits(references: dict[str, tuple[Tensor, dict[str, Tensor]]]) -> None:
    """The two checkpoints share their weights: that each layout meets both references says something."""
    difference_T = (references["llama"][0] - references["llama3"][0]).abs().amax(1)
    assert (difference_T[-24:] > 0.1).all()


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "model", seed=1)
    config = json.loads((path / "config.json").read_text())
    for key in ("rope_theta", "head_dim", "num_key_value_heads", "tie_word_embeddings"):
        del config[key]
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "use_sliding_window": False}
    (path / "config.json").write_text(json.dumps(config | {"sliding_window": 4096, "output_attentions": False}))
    hf = read_hf_config(path)
    assert (hf["rope_theta"], hf["head_dim"], hf["num_key_value_heads"], hf["tie_word_embeddings"]) == (
        5e5,
        24,
        4,
        False,
    )
