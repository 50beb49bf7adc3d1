"""Engines in FP8: what is refused at start, and what SGLang is told."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, ConfigError, DebugConfig, LayoutConfig, apply_overrides
from megatron_sdpo.fp8_format import KEY, check_device, quantization_config
from megatron_sdpo.fp8_format import check_engines as check_in_fp8
from megatron_sdpo.hf_config import check_model, read_hf_config
from megatron_sdpo.launch.planning import PUBLISHED
from megatron_sdpo.launch.preflight import check_engines, check_run
from megatron_sdpo.rollout import cpu_fp8
from megatron_sdpo.rollout.fleet_arguments import fp8_arguments
from recipes import recipe
from tests.tiny_model import write_byte_checkpoint

FP8 = "engine.fp8=blockwise"
SIZES = {"hidden_size": 128, "heads": 4, "kv_heads": 2, "head_dim": 128, "intermediate_size": 256, "layers": 2}


def config(*overrides: str) -> Config:
    return apply_overrides(recipe("minipipe"), list(overrides))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_byte_checkpoint(tmp_path / "model", 1, family="qwen3", **SIZES)


@pytest.fixture
def in_fp8(tmp_path: Path) -> Path:
    """The same, as far as its config.json is concerned."""
    path = write_byte_checkpoint(tmp_path / "in-fp8", 1, family="qwen3", **SIZES)
    said = json.loads((path / "config.json").read_text())
    said[KEY] = quantization_config(read_hf_config(path), 0)
    (path / "config.json").write_text(json.dumps(said))
    return path


def words_of(check: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check(*arguments, **named)
    return str(caught.value)


def test_it_stands_alone_or_with_any_trainer() -> None:
    assert config().engine.fp8 == "off"
    for more in ([], ["fp8.student=emulated"], ["fp8.student=blockwise"], ["fp8.teacher=tensorwise"]):
        configuration.check(config(FP8, "model.dtype=bfloat16", *more))
    configuration.check(config(FP8, "fp8.high_precision_layers=1"))
    assert "set fp8.student or fp8.teacher" in words_of(configuration.check, config(FP8, "fp8.floor_limit=0.1"))
    with pytest.raises(ConfigError, match=r"engine\.fp8.*'tensorwise'"):
        config("engine.fp8=tensorwise")


@pytest.mark.parametrize("argument", ["--json-model-override-args={}", "--load-format=auto", "--quantization"])
def test_arguments_that_it_sets_itself(argument: str) -> None:
    given = f"engine.extra_args={json.dumps([argument, 'fp8'])}"
    configuration.check(config(given))
    words = words_of(configuration.check, config(FP8, given))
    assert words.startswith(f"engine.extra_args has {argument.partition('=')[0]}, which engine.fp8=blockwise sets")


def asked(*overrides: str) -> Config:
    base = config(FP8, "model.dtype=bfloat16", *overrides)
    return replace(base, layout=LayoutConfig(), model=replace(base.model, max_length=128))


def published(name: str, **changes: int) -> dict[str, Any]:
    return {**read_hf_config(PUBLISHED / name), **changes}


def test_an_engines_ranks_hold_whole_blocks() -> None:
    check_model(asked("engine.tensor_parallel=8"), published("Qwen3-8B"))
    check_model(asked("engine.tensor_parallel=16"), published("Qwen3-8B"))  # copies of 8 key-value heads
    words = words_of(check_model, asked("engine.tensor_parallel=4"), published("Qwen3-30B-A3B"))
    assert "would hold 192 MLP units; set a smaller engine.tensor_parallel or engine.fp8=off" in words
    check_model(asked("engine.tensor_parallel=2"), published("Qwen3-30B-A3B"))
    narrow = published("Qwen3-8B", head_dim=64, num_key_value_heads=2)
    check_model(asked(), narrow)
    assert "would hold 64 rows of keys" in words_of(check_model, asked("engine.tensor_parallel=2"), narrow)
    words = words_of(check_model, asked(), published("Qwen3-8B", hidden_size=4000))
    assert words.endswith("would hold 4000 hidden units; set engine.fp8=off")
    check_model(replace(asked(), engine=config().engine), published("Qwen3-8B", hidden_size=4000))


def test_llamas_scales_reach_no_engine() -> None:
    llama = {**published("Qwen3-8B"), "model_type": "llama"}
    assert "leaves out the scales of LlamaForCausalLM" in words_of(check_model, asked(), llama)
    check_model(replace(asked(), engine=config().engine), llama)


def test_layers_kept_out_leave_some() -> None:
    words = words_of(check_model, asked("fp8.high_precision_layers=18"), published("Qwen3-8B"))
    assert "leave none of the model's 36 layers" in words
    check_model(asked("fp8.high_precision_layers=17"), published("Qwen3-8B"))


def test_a_gpu_wants_bfloat16(in_fp8: Path) -> None:
    plain, hf_config = config(), read_hf_config(in_fp8, fp8=True)
    assert "set model.dtype=bfloat16" in words_of(check_device, config(FP8), {}, has_gpu=True)
    assert "set model.dtype=bfloat16" in words_of(check_device, plain, hf_config, has_gpu=True)
    check_device(config(FP8), {}, has_gpu=False)
    check_device(plain, {}, has_gpu=True)
    check_device(asked(), hf_config, has_gpu=True)


def of(path: Path, *overrides: str) -> Config:
    return config(f"model.path={path}", "model.max_length=256", "rollout.max_new_tokens=64", *overrides)


def test_engines_without_a_trainer_need_a_model_in_fp8(model: Path, in_fp8: Path, tmp_path: Path) -> None:
    run = f"run_dir={tmp_path / 'run'}"
    words = words_of(check_engines, of(model, FP8, run))
    assert f"megatron-sdpo convert --fp8 {model} OUT and set model.path (--model) to OUT" in words
    assert "convert --fp8" in words_of(check_run, of(model, FP8, run), must_evaluate=True)
    alone = replace(of(model, FP8, run, "evaluation.every=0"), debug=DebugConfig(rollout_only=True))
    assert "convert --fp8" in words_of(check_run, alone)
    check_engines(of(in_fp8, FP8, run))
    check_engines(of(in_fp8, run))


def test_a_trainer_needs_full_precision(in_fp8: Path, tmp_path: Path) -> None:
    words = words_of(check_run, of(in_fp8, FP8, f"run_dir={tmp_path / 'run'}"))
    assert "is of a checkpoint in FP8, which engines alone can use (evaluate, serve); set model.path to the" in words
    assert words == words_of(read_hf_config, in_fp8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "gptq"}, "quant_method': 'gptq'"),
        ({"weight_block_size": [1, 32]}, "use the checkpoint in full precision, or one in FP8 with weight_block_size"),
        ({"activation_scheme": "static"}, "activation_scheme dynamic"),
    ],
)
def test_other_quantizations_are_refused_by_name(in_fp8: Path, change: dict[str, Any], words: str) -> None:
    file = in_fp8 / "config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, KEY: {**said[KEY], **change}}))
    assert words in words_of(read_hf_config, in_fp8, fp8=True)
    del said[KEY]["weight_block_size"]
    file.write_text(json.dumps(said))
    assert "does not say weight_block_size" in words_of(read_hf_config, in_fp8, fp8=True)


def test_what_an_engine_is_told(model: Path, in_fp8: Path) -> None:
    assert fp8_arguments(of(model)) == []
    assert fp8_arguments(of(in_fp8, FP8)) == [], "its config.json says it"
    override, load = fp8_arguments(of(model, FP8, "fp8.high_precision_layers=1"))
    assert load == "--load-format=dummy"
    name, _, said = override.partition("=")
    assert name == "--json-model-override-args"
    assert json.loads(said) == {"quantization_config": quantization_config(read_hf_config(model), 1)}


def test_an_engine_on_a_cpu_sees_that_it_is_in_fp8(model: Path, in_fp8: Path) -> None:
    told = fp8_arguments(of(model, FP8))
    assert cpu_fp8.is_asked_for([f"--model-path={model}", *told, "--skip-tokenizer-init"])
    assert cpu_fp8.is_asked_for([f"--model-path={in_fp8}"])
    assert not cpu_fp8.is_asked_for([f"--model-path={model}", "--skip-tokenizer-init"])
    assert not cpu_fp8.is_asked_for([])


def test_blocks_of_a_model_in_fp8_whatever_the_recipe_says(in_fp8: Path) -> None:
    hf_config = read_hf_config(in_fp8, fp8=True)
    check_in_fp8(of(in_fp8, "engine.tensor_parallel=2"), hf_config)
    assert "MLP units" in words_of(check_in_fp8, of(in_fp8, "engine.tensor_parallel=4"), hf_config)
