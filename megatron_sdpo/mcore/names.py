"""Hugging Face names <-> Megatron parameters and their shards, as pure functions of the model's config.

Megatron fuses what a Hugging Face checkpoint keeps apart, and cuts it over tensor ranks:

* ``linear_qkv``: for each key-value head its query heads, its key, its value; a rank holds whole key-value heads;
* ``linear_fc1``: ``[gate; up]`` *of each rank*, so the gathered matrix is ``[gate0; up0; gate1; up1; ...]``; of each
  expert, where a layer has experts.

The part of a Hugging Face tensor that a tensor rank holds is therefore always one slice along one axis
(``HfTensor.slices``), and a rank can turn its local parameter into such slices alone (``split``).

A vocabulary that the tensor ranks do not divide is padded with rows of zeros, in Megatron only: the ranks' shares are
equal (``padded_vocabulary``), a Hugging Face tensor never has such rows (``join``), and the head makes no logits of
them (``fused.Head``).

Megatron numbers layers within a pipeline stage; names here say so: *parameter* is a Megatron name with the layer
number of the whole model, *local* one with the number in its stage. It also numbers experts within those that a rank
holds; here they always have the number of the whole layer. Nothing here needs megatron or a device.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Part = Literal["whole", "q", "k", "v", "gate", "up"]

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"

# Transformer Engine's grouped linears keep their experts' weights as weight0, weight1, ...
_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$")
_EXPERT = re.compile(r"local_experts\.(\d+)\.")
_NUMBER = re.compile(r"^decoder\.layers\.(\d+)\.")
# Transformer Engine keeps a norm inside the linear that follows it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


class Sliceable(Protocol):
    """A tensor, or one still on disk: all that is asked of it is its shape and a slice."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, slices: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class HfTensor:
    """One tensor of a Hugging Face checkpoint, and where a Megatron model keeps it.

    Example: ``HfTensor("model.layers.2.mlp.up_proj.weight", (176, 96), "decoder.layers.2.mlp.linear_fc1.weight",
    "up", 0, 2, 4)`` is the second part of a fused parameter of layer 2 of 4, cut over tensor ranks by rows.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    """Megatron name, layer counted over the whole model."""
    part: Part
    tp_axis: int | None
    """Axis that tensor ranks divide; None: every rank holds the whole."""
    layer: int | None
    n_layers: int
    n_experts: int = 0
    """Of a layer; 0 in a dense model."""

    @property
    def expert(self) -> int | None:
        """The number in its layer of the expert that it belongs to."""
        match = _EXPERT.search(self.parameter)
        return int(match[1]) if match else None

    def expert_rank(self, ep_size: int) -> int | None:
        """The expert rank that holds it; None: it belongs to no expert, and all of them hold it."""
        return None if self.expert is None else self.expert // (self.n_experts // ep_size)

    def stage(self, pp_size: int) -> int:
        """The pipeline rank that holds it (a tied embedding is also copied to the last stage)."""
        if self.layer is not None:
            return self.layer // (self.n_layers // pp_size)
        return 0 if self.parameter == EMBEDDING else pp_size - 1

    def local(self, pp_size: int) -> str:
        """The parameter's name inside its stage."""
        return local_name(self.parameter, self.stage(pp_size) * (self.n_layers // pp_size))

    @property
    def of_vocabulary(self) -> bool:
        """Its rows are vocabulary entries, which are padded where tensor ranks do not divide them."""
        return self.parameter in (EMBEDDING, HEAD)

    def share(self, tp_size: int) -> int:
        """Rows (or columns) that each tensor rank holds, padding included."""
        assert self.tp_axis is not None
        step, rest = divmod(self.shape[self.tp_axis], tp_size)
        if rest and not self.of_vocabulary:
            raise ValueError(
                f"{self.name} of shape {self.shape} cannot be cut into {tp_size} along axis {self.tp_axis}"
            )
        return step + (rest > 0)

    def slices(self, tp_rank: int, tp_size: int) -> tuple[slice, ...]:
        """The slice of this tensor that a tensor rank holds; the ranks' slices are disjoint and cover it."""
        if self.tp_axis is None:
            return (slice(None),) * len(self.shape)
        step, size = self.share(tp_size), self.shape[self.tp_axis]
        cut = slice(min(tp_rank * step, size), min((tp_rank + 1) * step, size))
        return tuple(cut if axis == self.tp_axis else slice(None) for axis in range(len(self.shape)))


def hf_layout(hf_config: Mapping[str, Any]) -> dict[str, HfTensor]:
    """Every tensor of the checkpoint by name, in the order of a forward pass; a tied head is not among them."""
    n_layers, width, vocab = (hf_config[k] for k in ("num_hidden_layers", "hidden_size", "vocab_size"))
    tensors = [HfTensor("model.embed_tokens.weight", (vocab, width), EMBEDDING, "whole", 0, None, n_layers)]
    for layer in range(n_layers):
        tensors += [
            HfTensor(
                f"model.layers.{layer}.{name}",
                shape,
                f"decoder.layers.{layer}.{inner}",
                part,
                axis,
                layer,
                n_layers,
                hf_config.get("num_experts", 0),
            )
            for name, shape, inner, part, axis in _layer(hf_config)
        ]
    tensors.append(HfTensor("model.norm.weight", (width,), FINAL_NORM, "whole", None, None, n_layers))
    if not hf_config.get("tie_word_embeddings"):
        tensors.append(HfTensor("lm_head.weight", (vocab, width), HEAD, "whole", 0, None, n_layers))
    return {tensor.name: tensor for tensor in tensors}


def parameters(hf_config: Mapping[str, Any]) -> dict[str, tuple[HfTensor, ...]]:
    """Every Megatron parameter (layers counted over the whole model) -> the tensors it is made of, in order."""
    made: dict[str, tuple[HfTensor, ...]] = {}
    for tensor in hf_layout(hf_config).values():
        made[tensor.parameter] = (*made.get(tensor.parameter, ()), tensor)
    return made


def canonical(local: str, first_expert: int = 0) -> str:
    """A parameter's name as used here, whichever layer spec built the model (Transformer Engine's fuses norms and
    groups experts), on a rank whose experts begin at ``first_expert``."""
    local = _GROUPED.sub(r"mlp.experts.local_experts.\2.\1.weight", local)
    if first_expert:
        local = _EXPERT.sub(lambda match: f"local_experts.{int(match[1]) + first_expert}.", local)
    for fused, plain in _FUSED_NORMS.items():
        if local.endswith(fused):
            return local.removesuffix(fused) + plain
    return local


def local_name(parameter: str, layer_offset: int) -> str:
    """``decoder.layers.5.x`` with offset 4 -> ``decoder.layers.1.x``; the inverse is a negative offset."""
    return _NUMBER.sub(lambda match: f"decoder.layers.{int(match[1]) - layer_offset}.", parameter)


def tp_axis(name: str) -> int | None:
    """The axis along which tensor ranks cut a Megatron parameter; None: replicated. Unknown names raise ValueError."""
    inner = _EXPERT.sub("local_experts.0.", _NUMBER.sub("", canonical(name)))
    if inner in (EMBEDDING, HEAD):
        return 0
    if inner == FINAL_NORM:
        return None
    for _, _, known, _, axis in _layer(_EVERYTHING):
        if inner == known:
            return axis
    raise ValueError(f"unknown Megatron parameter {name!r}")


def stage_parameters(
    hf_config: Mapping[str, Any], layers: range, first: bool, last: bool
) -> dict[str, tuple[HfTensor, ...]]:
    """Local name -> the tensors it is made of, of the stage that holds ``layers`` (numbers of the whole model)."""
    stage: dict[str, tuple[HfTensor, ...]] = {}
    for parameter, tensors in parameters(hf_config).items():
        layer = tensors[0].layer
        here = layer in layers if layer is not None else (first if parameter == EMBEDDING else last)
        if here:
            stage[local_name(parameter, layers.start)] = tensors
    if last and not first and hf_config.get("tie_word_embeddings"):
        stage[HEAD] = (hf_layout(hf_config)["model.embed_tokens.weight"],)  # Megatron's copy on the last stage
    return stage


def to_megatron(
    hf_tensors: Mapping[str, Sliceable],
    hf_config: Mapping[str, Any],
    tp_rank: int,
    tp_size: int,
    layers: range,
    first: bool,
    last: bool,
) -> dict[str, Tensor]:
    """Local name -> local shard of every parameter of one stage; raises ValueError on unknown or missing names."""
    check_names(hf_tensors, hf_config)
    stage = stage_parameters(hf_config, layers, first, last)
    return {local: read_shard(hf_tensors, made_of, hf_config, tp_rank, tp_size) for local, made_of in stage.items()}


def read_shard(
    hf_tensors: Mapping[str, Sliceable],
    tensors: tuple[HfTensor, ...],
    hf_config: Mapping[str, Any],
    tp_rank: int,
    tp_size: int,
) -> Tensor:
    """One parameter's local shard from the tensors it is made of; a tensor of another shape raises ValueError."""
    pieces = []
    for tensor in tensors:
        source = hf_tensors[tensor.name]
        _check_shape(tensor, source)
        piece = source[tensor.slices(tp_rank, tp_size)]
        if tensor.of_vocabulary and (missing := tensor.share(tp_size) - len(piece)):
            piece = F.pad(piece, (0, 0, 0, missing))
        pieces.append(piece)
    return fuse(tensors, pieces, hf_config)


def local_shape(tensors: tuple[HfTensor, ...], tp_size: int) -> tuple[int, ...]:
    """Shape of one rank's shard of the parameter made of ``tensors``, padding included."""
    axis, shape = tensors[0].tp_axis, list(tensors[0].shape)
    shape[0] = sum(tensor.shape[0] for tensor in tensors)
    if axis is not None:
        shape[axis] = sum(tensor.share(tp_size) for tensor in tensors)
    return tuple(shape)


def check_names(names: Iterable[str], hf_config: Mapping[str, Any]) -> None:
    """Raise ValueError that names a tensor the model has no place for, or one that is not there."""
    known, given = hf_layout(hf_config).keys(), set(names)
    for kind, wrong in {"unknown": given - known, "missing": known - given}.items():
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ValueError(f"{kind} tensor {min(wrong)!r}{more} in a {hf_config['model_type']} checkpoint")


def check_shapes(hf_tensors: Mapping[str, Sliceable], hf_config: Mapping[str, Any]) -> None:
    """Raise ValueError that names a tensor of another shape than the config says."""
    for tensor in hf_layout(hf_config).values():
        _check_shape(tensor, hf_tensors[tensor.name])


def _check_shape(tensor: HfTensor, found: Sliceable) -> None:
    if tuple(found.shape) != tensor.shape:
        raise ValueError(f"{tensor.name} has the shape {tuple(found.shape)}, its config says {tensor.shape}")


def fuse(tensors: tuple[HfTensor, ...], pieces: list[Tensor], hf_config: Mapping[str, Any]) -> Tensor:
    """One rank's slices of ``tensors`` -> its local parameter."""
    if tensors[0].part == "q":
        groups = pieces[1].shape[0] // head_dim(hf_config)
        return torch.cat([piece.unflatten(0, (groups, -1)) for piece in pieces], 1).flatten(0, 1)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def split(tensors: tuple[HfTensor, ...], local: Tensor, hf_config: Mapping[str, Any]) -> list[Tensor]:
    """The inverse of ``fuse``: one rank's local parameter -> its slice of each of ``tensors``, contiguous."""
    if tensors[0].part == "q":
        d = head_dim(hf_config)
        per_group = hf_config["num_attention_heads"] // key_value_heads(hf_config)
        grouped = local.unflatten(0, (-1, (per_group + 2) * d))
        return [piece.flatten(0, 1).contiguous() for piece in grouped.split([per_group * d, d, d], 1)]
    return [piece.contiguous() for piece in local.chunk(len(tensors))]


def join(tensor: HfTensor, pieces: Sequence[Tensor]) -> Tensor:
    """The tensor ranks' pieces of ``tensor``, from ``split`` -> the whole, without padding."""
    if tensor.tp_axis is None:
        return pieces[0]
    whole = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), tensor.tp_axis)
    return whole[: tensor.shape[0]] if tensor.of_vocabulary else whole


def megatron_to_hf(
    name: str, full: Tensor, hf_config: Mapping[str, Any], tp_size: int = 1, layer_offset: int = 0
) -> list[tuple[str, Tensor]]:
    """A parameter of one stage, gathered over tensor ranks -> (HF name, tensor) pairs.

    ``full`` is the ``tp_size`` ranks' shards concatenated along ``tp_axis(name)``;
    ``layer_offset`` is the number of layers in earlier stages; the tied head of a last stage gives no pair.
    """
    parameter = local_name(canonical(name), -layer_offset)
    if parameter == HEAD and hf_config.get("tie_word_embeddings"):
        return []
    tensors = parameters(hf_config).get(parameter)
    if tensors is None:
        raise ValueError(f"unknown Megatron parameter {name!r} (layer offset {layer_offset})")
    axis = tp_axis(name)
    if axis is None:
        return [(tensors[0].name, full)]
    shards = [split(tensors, shard, hf_config) for shard in full.chunk(tp_size, axis)]
    whole = [(tensor, join(tensor, pieces)) for tensor, pieces in zip(tensors, zip(*shards, strict=True), strict=True)]
    for tensor, value in whole:
        if tuple(value.shape) != tensor.shape:
            raise ValueError(f"{name} gives {tensor.name} the shape {tuple(value.shape)}, expected {tensor.shape}")
    return [(tensor.name, value) for tensor, value in whole]


def padded_vocabulary(hf_config: Mapping[str, Any], tp_size: int) -> int:
    """Entries that Megatron's embedding and head have over all tensor ranks: the next multiple of their number."""
    return -(-hf_config["vocab_size"] // tp_size) * tp_size


def head_dim(hf_config: Mapping[str, Any]) -> int:
    return hf_config.get("head_dim") or hf_config["hidden_size"] // hf_config["num_attention_heads"]


def key_value_heads(hf_config: Mapping[str, Any]) -> int:
    return hf_config.get("num_key_value_heads") or hf_config["num_attention_heads"]


_Row = tuple[str, tuple[int, ...], str, Part, int | None]


def _layer(hf: Mapping[str, Any]) -> list[_Row]:
    """One layer: (HF name, shape, Megatron name, part, tensor-parallel axis), names without their layer prefix."""
    width, d = hf["hidden_size"], head_dim(hf)
    rows = {"q": hf["num_attention_heads"] * d, "k": key_value_heads(hf) * d, "v": key_value_heads(hf) * d}
    family = hf["model_type"]
    qkv: tuple[Part, ...] = ("q", "k", "v")
    table: list[_Row] = [("input_layernorm.weight", (width,), "input_layernorm.weight", "whole", None)]
    for x in qkv:
        table.append((f"self_attn.{x}_proj.weight", (rows[x], width), "self_attention.linear_qkv.weight", x, 0))
    if family in ("qwen2", "*"):
        for x in qkv:
            table.append((f"self_attn.{x}_proj.bias", (rows[x],), "self_attention.linear_qkv.bias", x, 0))
    if family in ("qwen3", "qwen3_moe", "*"):
        for x in "qk":
            table.append((f"self_attn.{x}_norm.weight", (d,), f"self_attention.{x}_layernorm.weight", "whole", None))
    table += [
        ("self_attn.o_proj.weight", (width, rows["q"]), "self_attention.linear_proj.weight", "whole", 1),
        ("post_attention_layernorm.weight", (width,), "pre_mlp_layernorm.weight", "whole", None),
    ]
    if family in ("qwen3_moe", "*"):
        table.append(("mlp.gate.weight", (hf["num_experts"], width), "mlp.router.weight", "whole", None))
        for n in range(hf["num_experts"]):
            inner = f"mlp.experts.local_experts.{n}."
            table += _gated(f"mlp.experts.{n}.", inner, width, hf["moe_intermediate_size"])
    if family != "qwen3_moe":
        table += _gated("mlp.", "mlp.", width, hf["intermediate_size"])
    return table


def _gated(prefix: str, inner: str, width: int, units: int) -> list[_Row]:
    """A gated MLP, or one expert."""
    return [
        (f"{prefix}gate_proj.weight", (units, width), f"{inner}linear_fc1.weight", "gate", 0),
        (f"{prefix}up_proj.weight", (units, width), f"{inner}linear_fc1.weight", "up", 0),
        (f"{prefix}down_proj.weight", (width, units), f"{inner}linear_fc2.weight", "whole", 1),
    ]


# A config for the questions that do not depend on sizes: the union of all families.
_SIZES = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_experts")
_EVERYTHING = {"model_type": "*", **dict.fromkeys(_SIZES, 1)}
