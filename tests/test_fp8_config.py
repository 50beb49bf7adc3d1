"""What FP8 can be asked for: refused at start, with a sentence, before anything is loaded."""

from dataclasses import replace

import pytest

from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, ConfigError, Fp8Config, LayoutConfig, ObjectiveConfig, apply_overrides
from megatron_sdpo.hf_config import check_model, read_hf_config
from megatron_sdpo.launch.planning import PUBLISHED
from recipes import recipe


def config(*overrides: str) -> Config:
    return apply_overrides(recipe("minipipe"), list(overrides))


def refusal(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        configuration.check(config)
    return str(caught.value)


def model_refusal(fp8: Fp8Config, layout: LayoutConfig, name: str = "Qwen3-8B", **changes: int) -> str | None:
    base = config("model.dtype=bfloat16")
    asked = replace(base, fp8=fp8, layout=layout, model=replace(base.model, max_length=128))
    try:
        check_model(asked, {**read_hf_config(PUBLISHED / name), **changes})
    except ConfigError as error:
        return str(error)
    return None


def test_off_is_the_default_and_one_kind_serves_both() -> None:
    assert config().fp8.kinds == ()
    both = config("model.dtype=bfloat16", "fp8.student=blockwise", "fp8.teacher=blockwise")
    assert both.fp8.kinds == ("blockwise",)
    configuration.check(both)


def test_one_model_has_one_kind_of_linears() -> None:
    words = refusal(config("model.dtype=bfloat16", "fp8.student=blockwise", "fp8.teacher=tensorwise"))
    assert "fp8.student=blockwise and fp8.teacher=tensorwise" in words and "set both to the same kind" in words


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"fp8\.student.*'delayed'"):
        config("fp8.student=delayed")


def test_fp8_stands_beside_bfloat16_only() -> None:
    assert "set model.dtype=bfloat16" in refusal(config("fp8.student=blockwise"))
    configuration.check(config("fp8.student=emulated"))  # plain torch, in any dtype


def test_settings_of_what_is_off_are_refused() -> None:
    assert "fp8.high_precision_layers is about FP8" in refusal(config("fp8.high_precision_layers=1"))
    assert "fp8.floor_limit is about FP8" in refusal(config("fp8.floor_limit=0.1"))


def test_a_teacher_in_fp8_needs_a_teacher() -> None:
    asked = replace(config("fp8.teacher=emulated"), objective=ObjectiveConfig(kind="grpo"))
    assert "has no teacher; set fp8.teacher=off" in refusal(asked)


def test_blocks_must_fit_every_rank() -> None:
    both = Fp8Config(student="blockwise", teacher="blockwise")
    assert model_refusal(both, LayoutConfig(tensor_parallel=8, world_size=8)) is None
    words = model_refusal(both, LayoutConfig(), intermediate_size=12_224)
    assert words is not None and "blocks of 128, but a rank holds 12224 MLP units" in words
    assert "tensor_parallel" not in words, "no number of ranks makes blocks of it"
    # 2 key-value heads of 64 on 2 ranks: half a block each
    narrow = {"num_key_value_heads": 2, "head_dim": 64, "num_attention_heads": 32}
    assert model_refusal(both, LayoutConfig(), **narrow) is None
    words = model_refusal(both, LayoutConfig(tensor_parallel=2, world_size=2), **narrow)
    assert words is not None and "64 rows of keys; set a smaller layout.tensor_parallel" in words


def test_layers_kept_out_leave_some() -> None:
    fp8 = Fp8Config(student="blockwise", high_precision_layers=18)
    words = model_refusal(fp8, LayoutConfig())
    assert words is not None and "leave none of the model's 36 layers" in words
    assert model_refusal(replace(fp8, high_precision_layers=17), LayoutConfig()) is None


def test_experts_are_cut_by_their_own_ranks() -> None:
    fp8 = Fp8Config(student="blockwise")
    whole = LayoutConfig(
        tensor_parallel=4, sequence_parallel=True, expert_parallel=4, expert_tensor_parallel=1, world_size=4
    )
    assert model_refusal(fp8, whole, "Qwen3-30B-A3B") is None
    sliced = LayoutConfig(tensor_parallel=4, world_size=4)  # 768 units: 192 a rank
    words = model_refusal(fp8, sliced, "Qwen3-30B-A3B")
    assert words is not None and "192 MLP units" in words
