"""A layout's name and its keys are each other's inverse."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_sdpo.config import (
    Config,
    ConfigError,
    LayoutConfig,
    ModelConfig,
    TaskConfig,
    apply_overrides,
    check,
    layout_name,
    layout_overrides,
)

SIZES = st.sampled_from((1, 2, 3, 4, 8, 16))


def config(layout: LayoutConfig) -> Config:
    return Config(
        name="x", run_dir="x", steps=1, model=ModelConfig(path="x"), task=TaskConfig(name="minipipe"), layout=layout
    )


def read(name: str, before: LayoutConfig | None = None) -> LayoutConfig:
    return apply_overrides(config(before or LayoutConfig()), layout_overrides(name)).layout


@st.composite
def layouts(draw: st.DrawFn) -> LayoutConfig:
    tensor, pipeline, context, copies = draw(SIZES), draw(SIZES), draw(SIZES), draw(SIZES)
    layout = LayoutConfig(
        tensor_parallel=tensor,
        sequence_parallel=draw(st.booleans()),
        pipeline_parallel=pipeline,
        virtual_pipeline=draw(SIZES),
        context_parallel=context,
        expert_parallel=draw(SIZES),
        expert_tensor_parallel=draw(st.sampled_from((None, 1))) if tensor > 1 else None,
        world_size=tensor * pipeline * context * copies,
        distributed_optimizer=draw(st.booleans()),
    )
    try:
        check(config(layout))
    except ConfigError:
        assume(False)
    return layout


@settings(deadline=None)
@given(layouts(), layouts())
def test_a_name_says_the_whole_layout_whatever_it_replaces(layout: LayoutConfig, before: LayoutConfig) -> None:
    assert read(layout_name(layout), before) == layout


@settings(deadline=None)
@given(layouts())
def test_a_printed_name_is_printed_again(layout: LayoutConfig) -> None:
    name = layout_name(layout)
    assert layout_name(read(name)) == name


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("tp1", "tp1pp1dp1"),
        ("tp2sp", "tp2sppp1dp1"),
        ("pp2vp2cp2dp3do", "tp1pp2vp2cp2dp3do"),
        ("tp2spep2et1", "tp2sppp1ep2et1dp1"),
        ("ep4", "tp1pp1ep4dp4"),
    ],
)
def test_what_a_short_name_is_printed_as(name: str, printed: str) -> None:
    assert layout_name(read(name)) == printed


@pytest.mark.parametrize("name", ["", "fast", "cp2tp2", "tp", "dp2vp2", "tp2 pp2", "tp-1"])
def test_what_is_no_layout_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a layout; write tp2"):
        layout_overrides(name)
