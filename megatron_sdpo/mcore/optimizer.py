"""Megatron's DDP and AdamW around the model, and the learning-rate curve."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_sdpo.config import LayoutConfig, OptimConfig
from megatron_sdpo.fused import Head
from megatron_sdpo.mcore.model import HiddenStatesModel, Model, chunks_of
from megatron_sdpo.mcore.weights import DividedWeights, Weights, WholeWeights


def wrap(model: Model, config: OptimConfig, layout: LayoutConfig) -> tuple[list[DistributedDataParallel], Any, Weights]:
    """The loaded model -> (DDP around each of its stages, optimizer, weights).

    Gradients are fp32 sums over all ranks with the same weights, never means.
    """
    model.config.calculate_per_token_loss = True  # DDP then sums, and forward_backward leaves the sum as it is
    wrapped = [_wrapped(chunk, layout, first=i == 0) for i, chunk in enumerate(chunks_of(model))]
    modules: Any = wrapped
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=model.config.bf16,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=layout.overlap_param_gather,
        ),
        modules,
    )
    set_rates(optimizer, config.lr, config.weight_decay)
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.grad_scale_func = optimizer.scale_loss
    if layout.overlap_grad_reduce:
        no_sync: Any = [ddp.no_sync for ddp in wrapped]
        model.config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    weights = DividedWeights(model, wrapped, parts(optimizer)) if layout.distributed_optimizer else WholeWeights(model)
    if layout.overlap_param_gather:
        for chunk, ddp in zip(chunks_of(model), wrapped, strict=True):
            _gather_head(chunk, ddp)
        weights.gather()  # what is there already: whoever reads before the first step need not wait for anything
    return wrapped, optimizer, weights


def _wrapped(chunk: HiddenStatesModel, layout: LayoutConfig, first: bool) -> DistributedDataParallel:
    return DistributedDataParallel(
        chunk.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            # Megatron's own check for NaN raises on the rank that has it and leaves the others waiting; see finite.py.
            check_for_nan_in_grad=False,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_grad_reduce=layout.overlap_grad_reduce,
            overlap_param_gather=layout.overlap_param_gather,
            bucket_size=layout.overlap_bucket_elements,  # without overlap Megatron makes a single one
        ),
        chunk,
        disable_bucketing=not first,  # of an interleaved pipeline: later stages are their own buckets
    )


def _gather_head(chunk: HiddenStatesModel, ddp: DistributedDataParallel) -> None:
    """Wait for the head's new weights with the final norm: it is used outside the module that Megatron watches."""
    if not chunk.post_process:
        return
    group = ddp.param_to_bucket_group[chunk.head()]
    norm: Any = chunk.decoder.final_layernorm
    norm.register_forward_pre_hook(lambda *_: group.finish_param_sync())


def into_buffer(head: Head) -> Head:
    """The head of a training pass, whose gradient goes straight to where DDP adds it up, if that is in fp32."""
    buffer: Tensor | None = getattr(head.weight_VH, "main_grad", None)
    return replace(head, main_grad_VH=buffer) if buffer is not None and buffer.dtype == torch.float32 else head


def count_as_added(head: Head, loss: Tensor) -> None:
    """Have DDP count a gradient that is in its buffer already, when the backward pass of ``loss`` comes to the head.

    Where it exchanges gradients during the backward pass it waits for one of each weight. One that is the embedding
    too has one, which is to be added.
    """
    weight_VH: Any = head.weight_VH
    if head.main_grad_VH is None or getattr(weight_VH, "zero_out_wgrad", False):
        return

    def stand_in(_: Tensor) -> None:
        weight_VH.grad, weight_VH.grad_added_to_main_grad = weight_VH.detach().new_zeros(()).expand_as(weight_VH), True

    loss.register_hook(stand_in)


def parts(optimizer: Any) -> list[Any]:
    """Megatron's optimizers around one of torch's each."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def moments(optimizer: Any, masters: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Adam's moments of ``masters``, by their names in its state; an optimizer that has not stepped gets zeros."""
    states = {}
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            for master in group["params"]:
                states[master] = part.optimizer.state[master]
                if not states[master]:
                    count = {"step": torch.tensor(0.0)} if _counts_by_weight(part) else {}
                    states[master].update(count, exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
    return {name: [states[master][name] for master in masters] for name in ("exp_avg", "exp_avg_sq")}


def steps(optimizer: Any) -> float:
    """How many steps it has made, with which Adam corrects its bias. A rank without a weight to step says 0."""
    counts: set[float] = set()
    for part in parts(optimizer):
        counts |= {float(state["step"]) for state in part.optimizer.state.values() if "step" in state}
        counts |= {float(group["step"]) for group in part.optimizer.param_groups if "step" in group}
    if len(counts) > 1:
        raise RuntimeError(f"the weights have made different numbers of optimizer steps: {sorted(counts)}")
    return counts.pop() if counts else 0.0


def set_steps(optimizer: Any, count: float) -> None:
    """The inverse of ``steps``, after ``moments``. Each weight counts for itself: one tensor would count for all."""
    for part in parts(optimizer):
        if _counts_by_weight(part):
            for state in part.optimizer.state.values():
                state["step"] = torch.tensor(count)
        else:
            for group in part.optimizer.param_groups:
                group["step"] = int(count)


def _counts_by_weight(part: Any) -> bool:
    """As torch's Adam; the fused ones count by parameter group."""
    return isinstance(part.optimizer, torch.optim.Adam)


def reset(optimizer: Any, config: OptimConfig) -> None:
    """As ``wrap`` made it, for the weights that the model has now: no moments, master weights copied from the model."""
    for part in parts(optimizer):
        part.optimizer.state.clear()
        for group in part.optimizer.param_groups:
            group.pop("step", None)  # fused optimizers count here
    optimizer.reload_model_params()
    set_rates(optimizer, config.lr, config.weight_decay)


def gradient_norm(optimizer: Any) -> float:
    """Norm of the whole gradient before clipping, on every rank: the first half of Megatron's ``optimizer.step()``.

    Whoever looks between the two halves can still leave the weights as they are: ``step`` is the other.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def step(optimizer: Any, norm: float) -> None:
    """The weights after a step along the gradient, clipped by its ``norm``, which ``gradient_norm`` has just found."""
    for part in parts(optimizer):
        weights, config = part.get_parameters(), part.config
        if weights and config.clip_grad > 0.0:
            decoupled = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(weights, config.clip_grad, norm, decoupled)
    optimizer.step_with_ready_grads()


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of the batch ``step`` (from 0) of ``steps``: linear warm-up, then constant, linear or cosine decay."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_decay == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    left = 1.0 - done if config.lr_decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)


def rate(optimizer: Any) -> float:
    """The learning rate that ``set_rates`` last set."""
    return max(group["lr"] / group["lr_mult"] for group in optimizer.param_groups)


def set_rates(optimizer: Any, rate: float, weight_decay: float) -> None:
    """Learning rate and weight decay of the next step; norms and biases do not decay.

    Megatron's parameter groups only carry the multipliers: its own scheduler, not used here, would apply them.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]
