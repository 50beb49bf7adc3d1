"""What an engine holds and how fast it generates: weights, keys and values, how many sequences at once, seconds.

Engines have GPUs of their own. ``Sharing.COLOCATED`` plans engines and trainer ranks that take turns on the same GPUs
(engine.release_memory, on one node): the trainer keeps what it holds between its passes, the engines give back weights
and cache while it trains. No number here has been compared with an engine on a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Any

from megatron_sdpo.config import Config
from megatron_sdpo.flops import Tokens, forward_flops, layer_parameters
from megatron_sdpo.fp8_format import BLOCK, is_quantized
from megatron_sdpo.mcore import names
from megatron_sdpo.scaling.assumed import Lengths, Reach
from megatron_sdpo.scaling.hardware import Gpu
from megatron_sdpo.scaling.memory import BYTES, fp8_layers

SHARE = 0.85
"""Of a GPU that an engine's weights and cache may take; SGLang leaves about so much to its passes and CUDA graphs."""
WEIGHT_BYTES = 1 + 4 / BLOCK**2
"""Of a weight in block FP8, with its part of a scale."""
RESIDUE = 2_000_000_000
"""Bytes that a colocated engine keeps of a GPU while the trainer works: its context and graphs. An assumption."""


class Sharing(Enum):
    """Whether engines have GPUs of their own."""

    SEPARATE = "separate"
    COLOCATED = "colocated"


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """One GPU of an engine, in bytes, and what the engine can hold at once."""

    weights: int
    cache: int
    """Room for keys and values."""
    beside: int
    """Of a colocated trainer rank, which stays while the engine generates."""
    tokens: int
    """Whose keys and values an engine holds: the room, or engine.max_total_tokens if that is less."""
    sequences: int
    """Of the mean length, at once: as many as the tokens allow, at most engine.max_running_requests."""


def model_bytes(hf_config: Mapping[str, Any], width: int) -> int:
    """Of all weights, as the checkpoint has them."""
    return round(sum(_weight_bytes(hf_config, width)))


def engine_bytes(config: Config, hf_config: Mapping[str, Any]) -> int:
    """Of all weights, as engines hold them and are sent them."""
    return round(sum(_engine_weights(config, hf_config)))


def _engine_weights(config: Config, hf_config: Mapping[str, Any]) -> tuple[float, float]:
    kept = config.fp8.high_precision_layers if config.engine.fp8 == "blockwise" else None
    return _weight_bytes(hf_config, BYTES[config.model.dtype], kept)


def _weight_bytes(hf_config: Mapping[str, Any], width: int, kept: int | None = None) -> tuple[float, float]:
    """Of the weights that every token meets, and of the experts.

    With ``kept`` the linears of all but so many layers at each end are in block FP8.
    """
    met, experts, layers = 0.0, 0.0, hf_config["num_hidden_layers"]
    for tensor in names.hf_layout({**hf_config, "num_hidden_layers": 1}).values():  # all layers are alike
        count = 1 if tensor.layer is None else layers
        in_fp8 = 0 if kept is None or not is_quantized(tensor.name, 1, 0) else max(0, layers - 2 * kept)
        size = prod(tensor.shape) * ((count - in_fp8) * width + in_fp8 * WEIGHT_BYTES)
        if tensor.expert is None:
            met += size
        else:
            experts += size
    return met, experts


def _read(config: Config, hf_config: Mapping[str, Any], sequences: int) -> float:
    """Bytes of weights that a decoding step reads: of the experts those that a token of some sequence goes to."""
    met, experts = _engine_weights(config, hf_config)
    if experts:
        passed_by = (1 - hf_config["num_experts_per_tok"] / hf_config["num_experts"]) ** sequences
        experts *= 1 - passed_by
    return met + experts


def _fp8_share(config: Config, hf_config: Mapping[str, Any]) -> float:
    """Of the products with the layers' weights, those that are faster in FP8."""
    layers = hf_config["num_hidden_layers"]
    if config.engine.fp8 == "off" or "num_experts" in hf_config:
        return 0.0
    return fp8_layers(config, hf_config, range(layers)) / layers


def kv_bytes(hf_config: Mapping[str, Any], width: int, tensor_parallel: int = 1) -> int:
    """Of one token in all layers, on one GPU; with fewer key-value heads than GPUs several hold the same one."""
    heads = -(-names.key_value_heads(hf_config) // tensor_parallel)
    return 2 * hf_config["num_hidden_layers"] * heads * names.head_dim(hf_config) * width


def engine_memory(
    config: Config, hf_config: Mapping[str, Any], gpu: Gpu, lengths: Lengths, beside: int = 0
) -> EngineMemory:
    """``beside``: bytes of the GPU that are not the engine's."""
    engine, width = config.engine, BYTES[config.model.dtype]
    weights = engine_bytes(config, hf_config) // engine.tensor_parallel
    cache = max(0, int(gpu.memory_gb * 1e9 * SHARE) - weights - beside)
    tokens = cache // kv_bytes(hf_config, width, engine.tensor_parallel)
    if engine.max_total_tokens is not None:
        tokens = min(tokens, engine.max_total_tokens)
    sequences = min(tokens // (lengths.prompt + lengths.response), engine.max_running_requests)
    return EngineMemory(weights, cache, beside, tokens, sequences)


def generation_seconds(
    config: Config, hf_config: Mapping[str, Any], gpu: Gpu, lengths: Lengths, reach: Reach, sequences: int
) -> float:
    """Prefill of every question once, decoding of an average response by full engines, then of the longest by few.

    A decoding step reads the weights that its tokens are multiplied by, and the keys and values of all sequences, or
    computes, whichever takes longer. With ``engine.fp8`` it reads codes, and its products with the layers' weights run
    at the share of the FP8 peak that the trainer's do (of experts at bf16's, as there). Published rollouts gain less
    from FP8 than the bytes say: 1.12 to 1.18 times with 8B (verl's documentation), up to 1.44 (arXiv 2601.18150).
    ``sequences``: at once in an engine, at most.
    """
    engine, rollout, width = config.engine, config.rollout, BYTES[config.model.dtype]
    each = -(-rollout.prompts_per_step * rollout.attempts_per_prompt // engine.count)
    at_once = max(1, min(each, sequences))
    waves = each / at_once  # one that ends makes room for the next
    speed = engine.tensor_parallel * gpu.memory_gb_s * 1e9 * reach.memory
    of_a_token = 2 * hf_config["num_hidden_layers"] * layer_parameters(hf_config)
    cached = engine.tensor_parallel * kv_bytes(hf_config, width, engine.tensor_parallel)

    def computing(linear: float, rest: float) -> float:
        codes = _fp8_share(config, hf_config) * linear
        plain = gpu.bf16_tflops * reach.scoring
        quantised = (gpu.fp8_tflops or gpu.bf16_tflops) * reach.fp8
        return (codes / quantised + (linear - codes + rest) / plain) / (engine.tensor_parallel * 1e12)

    def decoding(sequences: int, context: float) -> float:
        read = _read(config, hf_config, sequences) + sequences * context * cached
        return max(read / speed, computing(sequences * of_a_token, 0.0))

    prompts = rollout.prompts_per_step
    asked = Tokens(prompts * lengths.prompt, prompts * lengths.prompt * (lengths.prompt + 1) // 2, 0)
    linear = asked.tokens * of_a_token
    prefill = computing(linear, forward_flops(hf_config, asked) - linear) / engine.count
    average = waves * lengths.response * decoding(at_once, lengths.prompt + lengths.response / 2)
    longest = max(0, rollout.max_new_tokens - lengths.response) * decoding(1, lengths.prompt + rollout.max_new_tokens)
    return prefill + average + longest
