"""A plan in words, for the console."""

from collections.abc import Sequence
from dataclasses import fields

from megatron_sdpo.config import layout_name
from megatron_sdpo.scaling.assumed import Reach
from megatron_sdpo.scaling.engines import RESIDUE, SHARE, Sharing
from megatron_sdpo.scaling.planner import USABLE, Plan

_ITEMS = {
    "weights": "weights",
    "quantised": "FP8 copies of weights",
    "gradients": "gradients, fp32",
    "optimizer": "optimizer",
    "teacher": "teacher",
    "scores": "scores kept until training",
    "activations": "activations",
    "head": "head, or one layer's backward pass",
    "swap": "teacher's copy, instead of activations",
    "scoring": "a layer's scoring pass, beside that copy",
}
_PHASES = {
    "generate": "generation",
    "score_student": "scoring as student",
    "score_teacher": "scoring as teacher",
    "train": "training passes",
    "exchange": "gradients, optimizer",
    "sync": "weights to engines",
}
_FP8_ENGINES = "FP8 engines: published rollouts gain 1.1 to 1.4 times, less than the bytes read say"
_COMPUTED = ("score_student", "score_teacher", "train")


def page(plan: Plan, nodes: int, reach: Reach, changes: Sequence[str]) -> str:
    """Everything that is predicted of one layout, and the verdict."""
    config, gb = plan.config, 1e9
    lines = [
        f"{config.name}: {config.layout.world_size} trainer ranks ({layout_name(config.layout)}) and"
        f" {config.engine.count} engine(s) of {config.engine.tensor_parallel}: {plan.gpus} of {nodes * 8}"
        f" {plan.gpu.name}",
        f"assumed: prompts of {plan.lengths.prompt} tokens, responses of {plan.lengths.response}, teacher prompts of"
        f" {plan.lengths.teacher_prompt}",
        f"reached: {reach.training:.0%} of the bf16 peak in training, {reach.scoring:.0%} in scoring,"
        f" {reach.experts:.0%} with experts, {reach.fp8:.0%} of the FP8 peak, {reach.memory:.0%} of memory bandwidth,"
        f" {reach.links:.0%} of links",
        *_sharing_lines(plan),
        "",
        f"a trainer rank of pipeline rank {plan.stage}, the fullest, GB",
        *(f"  {words:42} {getattr(plan.rank, key) / gb:8.2f}" for key, words in _ITEMS.items()),
        f"  {'at the peak':42} {plan.rank.total / gb:8.2f} of {plan.room / gb:.2f} ({USABLE:.0%} of the GPU)",
        *_engine_lines(plan),
        "a step, PFLOP on all trainer ranks",
        *(f"  {_PHASES[key]:42} {getattr(plan.flops, key).total / 1e15:8.1f}" for key in _COMPUTED),
        "a step, seconds: predicted, not yet compared with a run on GPUs",
        *(f"  {words:42} {getattr(plan.time, key):8.2f}" for key, words in _PHASES.items()),
        f"  {'all' + (' (generation runs ahead)' if plan.time.staleness else ''):42} {plan.time.total:8.2f}",
        *(["  " + _FP8_ENGINES] if config.engine.fp8 != "off" else []),
        f"  weights to engines: {plan.sync_bytes / gb:.2f} GB to each of {config.engine.count}",
        "",
    ]
    if plan.fits:
        lines.append("it fits")
    else:
        lines.append(f"it does not fit: {_lacking(plan)}")
        lines += [f"  would fit: {change}" for change in changes] or ["  no single change makes it fit; see --suggest"]
    assert {field.name for field in fields(plan.rank)} == set(_ITEMS)
    return "\n".join(lines)


def _sharing_lines(plan: Plan) -> list[str]:
    if plan.sharing is Sharing.SEPARATE:
        return []
    return [
        "colocated: engines and trainer ranks take turns on the same GPUs, as engine.release_memory and"
        " publish.backend=ipc have them do on one node; more nodes are a plan only. An engine is assumed to keep"
        f" {RESIDUE / 1e9:.0f} GB while the trainer works"
    ]


def _engine_lines(plan: Plan) -> list[str]:
    """Of one GPU of an engine, and of what the engine holds."""
    engine, gb = plan.engine, 1e9
    mean = plan.lengths.prompt + plan.lengths.response
    beside = [f"  {'what the trainer keeps':42} {engine.beside / gb:8.2f}"] if engine.beside else []
    return [
        "a GPU of an engine, GB",
        f"  {'weights':42} {engine.weights / gb:8.2f}",
        *beside,
        f"  {'room for keys and values':42} {engine.cache / gb:8.2f} ({SHARE:.0%} of the GPU, less the above)",
        f"  an engine holds {engine.tokens} tokens: {engine.sequences} sequences of the mean length {mean} at once",
    ]


def _lacking(plan: Plan) -> str:
    missing = plan.rank.total - plan.room
    if missing > 0:
        return f"a trainer rank lacks {missing / 1e9:.1f} GB"
    return (
        f"an engine has room for {plan.engine.tokens} tokens, and one sequence may have model.max_length"
        f" {plan.config.model.max_length}; set engine.tensor_parallel higher"
    )


def ranking(plans: Sequence[Plan], most: int) -> str:
    """The best layouts, a line each; where none fits, the smallest."""
    if not plans:
        return "no layout of so many trainer ranks divides the model"
    fitting = sum(plan.fits for plan in plans)
    words = f"{fitting} of {len(plans)} layouts fit into {plans[0].room / 1e9:.1f} GB" if fitting else "none fits"
    lines = [f"{'layout':34} {'recompute':10} {'GB':>7} {'step s':>8} {'trainer s':>10}"]
    lines += [
        f"{layout_name(p.config.layout):34} {p.config.layout.recompute:10} {p.rank.total / 1e9:7.1f}"
        f" {p.time.total:8.1f} {p.time.trainer:10.1f}"
        for p in plans[: min(most, fitting) or most]
    ]
    return "\n".join([*lines, words])
