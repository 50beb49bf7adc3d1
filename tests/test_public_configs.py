"""Published configurations at full size, without allocating: every name and shape as transformers builds it."""

import json
from math import prod
from pathlib import Path

import pytest

from megatron_sdpo.config import Config, ConfigError, LayoutConfig, ModelConfig, TaskConfig
from megatron_sdpo.hf_config import check_model, read_hf_config
from megatron_sdpo.mcore import names
from tests.hf_reference import unallocated
from tests.public_configs import DENSE, EXPERTS, OLMO3

MODELS = DENSE | EXPERTS


def written(folder: Path, name: str) -> Path:
    (folder / "config.json").write_text(json.dumps(MODELS[name][0]))
    return folder


def layout(tp: int, pp: int) -> Config:
    return Config(
        name="test",
        run_dir="unused",
        steps=1,
        model=ModelConfig(path="unused"),
        task=TaskConfig(name="none"),
        layout=LayoutConfig(tensor_parallel=tp, pipeline_parallel=pp, world_size=tp * pp),
    )


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_total_are_those_of_the_published_model(tmp_path: Path, name: str) -> None:
    table = {tensor.name: tensor.shape for tensor in names.hf_layout(read_hf_config(written(tmp_path, name))).values()}
    assert table == unallocated(tmp_path)
    assert sum(map(prod, table.values())) == MODELS[name][1]


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [
        ("Qwen3-0.6B", 8, 1),
        ("Qwen3-14B", 8, 5),
        ("Qwen3-32B", 8, 8),
        ("Qwen2.5-7B", 4, 7),
        ("Qwen2.5-72B", 8, 16),
        ("Llama-3.1-8B", 8, 4),
        ("Llama-3.3-70B", 8, 10),
        ("Qwen3-30B-A3B", 4, 8),
    ],
)
def test_a_layout_that_divides_the_model_cuts_every_parameter(tmp_path: Path, name: str, tp: int, pp: int) -> None:
    hf = read_hf_config(written(tmp_path, name))
    check_model(layout(tp, pp), hf)
    per_stage = hf["num_hidden_layers"] // pp
    held = 0
    for stage in range(pp):
        layers = range(stage * per_stage, (stage + 1) * per_stage)
        for local, tensors in names.stage_parameters(hf, layers, stage == 0, stage == pp - 1).items():
            shape = names.local_shape(tensors, tp)
            copies = 1 if names.tp_axis(local) is None else tp
            assert prod(shape) * copies == sum(prod(tensor.shape) for tensor in tensors), local
            copy_of_tied = local == names.HEAD and hf["tie_word_embeddings"]
            held += 0 if copy_of_tied else prod(shape) * copies
    assert held == MODELS[name][1]


@pytest.mark.parametrize(
    ("name", "tp", "pp", "words"),
    [
        ("Qwen3-0.6B", 3, 1, "tensor_parallel 3 does not divide the model's 16 attention heads"),
        ("Qwen3-0.6B", 16, 1, "tensor_parallel 16 does not divide the model's 8 key-value heads"),
        ("Qwen2.5-7B", 8, 1, "tensor_parallel 8 does not divide the model's 28 attention heads"),
        ("Qwen3-14B", 8, 3, "pipeline_parallel 3 does not divide the model's 40 layers"),
        ("Llama-3.1-8B", 32, 1, "tensor_parallel 32 does not divide the model's 8 key-value heads"),
        ("Qwen3-30B-A3B", 8, 1, "tensor_parallel 8 does not divide the model's 4 key-value heads"),
        ("Qwen2.5-72B", 8, 32, "pipeline_parallel 32 does not divide the model's 80 layers"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(
    tmp_path: Path, name: str, tp: int, pp: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_model(layout(tp, pp), read_hf_config(written(tmp_path, name)))


def test_olmo3_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OLMO3))
    with pytest.raises(ConfigError, match=r"no norms on the outputs of attention and MLP .* over all heads together"):
        read_hf_config(tmp_path)


def test_olmo3_has_what_megatrons_layer_lacks(tmp_path: Path) -> None:
    """The sentence above is about these tensors: no norm before attention or MLP, and one as wide as all heads."""
    (tmp_path / "config.json").write_text(json.dumps(OLMO3))
    layer = {name.removeprefix("model.layers.0."): shape for name, shape in unallocated(tmp_path).items()}
    assert "input_layernorm.weight" not in layer
    assert layer["post_feedforward_layernorm.weight"] == layer["self_attn.q_norm.weight"] == (4096,)
