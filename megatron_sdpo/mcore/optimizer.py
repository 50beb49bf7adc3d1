"""Megatron's DDP and AdamW around the model, and the learning-rate curve."""

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from megatron_sdpo.config import OptimConfig
from megatron_sdpo.mcore.model import HiddenStatesModel


def wrap(model: HiddenStatesModel, config: OptimConfig) -> tuple[DistributedDataParallel, Any]:
    """The loaded model -> (DDP module, optimizer). Gradients are fp32 sums over data ranks, never means."""
    model.config.calculate_per_token_loss = True  # DDP then sums, and forward_backward leaves the sum as it is
    ddp = DistributedDataParallel(
        model.config,
        # Megatron's own check for NaN raises on the rank that has it and leaves the others waiting; see finite.py.
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, check_for_nan_in_grad=False),
        model,
    )
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
        ),
        [ddp],
    )
    set_rates(optimizer, config.lr, config.weight_decay)
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.grad_scale_func = optimizer.scale_loss
    return ddp, optimizer


def reset(optimizer: Any, config: OptimConfig) -> None:
    """As ``wrap`` made it, for the weights that the model has now: no moments, master weights copied from the model."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.optimizer.state.clear()
        for group in part.optimizer.param_groups:
            group.pop("step", None)  # fused optimizers count here
    optimizer.reload_model_params()
    set_rates(optimizer, config.lr, config.weight_decay)


def gradient_norm(optimizer: Any) -> float:
    """Norm of the whole gradient before clipping, on every rank, without a step.

    The step itself computes it again: Megatron has no place to look between the norm and the new weights.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def masters(model: torch.nn.Module) -> list[Tensor]:
    """The fp32 weights that the optimizer steps: the parameters themselves, or their fp32 copies under bf16."""
    return [getattr(parameter, "main_param", parameter) for parameter in model.parameters()]


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of the batch ``step`` (from 0) of ``steps``: linear warm-up, then constant, linear or cosine decay."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_decay == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    left = 1.0 - done if config.lr_decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)


def set_rates(optimizer: Any, rate: float, weight_decay: float) -> None:
    """Learning rate and weight decay of the next step; norms and biases do not decay.

    Megatron's parameter groups only carry the multipliers: its own scheduler, not used here, would apply them.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]
