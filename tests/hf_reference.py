"""What transformers computes from a checkpoint directory: the independent reference of the model tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def reference(path: Path, documents: Sequence[Tensor], weights_TV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits ``[T, V]`` of the documents, each run alone, end to end; the gradients of ``(logits * weights).sum()``."""
    model = _load(path)
    logits_TV = torch.cat([model(document[None]).logits[0] for document in documents])
    (logits_TV * weights_TV).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return logits_TV.detach(), _experts_apart(gradients)


def unallocated(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the checkpoint that transformers would save, from config.json alone."""
    _torchvision_schemas()
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    tensors = _experts_apart(dict(model.named_parameters()))  # a tied one once
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _experts_apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers joins all experts of a layer in memory; in a checkpoint each has tensors of its own."""
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, experts, part = name.rpartition(".experts.")
        if not experts:
            apart[name] = tensor
        for n, of_expert in enumerate(tensor if experts else ()):
            keys = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
            for key, piece in zip(keys, of_expert.chunk(len(keys)), strict=True):
                apart[f"{prefix}.experts.{n}.{key}.weight"] = piece
    return apart


def rotary_frequencies(path: Path) -> Tensor:
    """fp32 ``[head_dim / 2]``, as transformers computes them from config.json."""
    _torchvision_schemas()
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config: Any = AutoConfig.from_pretrained(path)
    return LlamaRotaryEmbedding(config).inv_freq


def _load(path: Path) -> torch.nn.Module:
    _torchvision_schemas()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    assert model.model.rotary_emb.inv_freq[0] == 1.0  # a torch whose factories are wrapped can leave it unset
    return model


def _torchvision_schemas() -> None:
    """A torchvision built for another torch fails at import for want of two schemas that nothing here calls."""
    schemas = {
        "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    }
    for name, signature in schemas.items():
        try:
            torch.library.define(f"torchvision::{name}", signature)
        except RuntimeError:  # torchvision itself, or an earlier call, has defined it
            continue
