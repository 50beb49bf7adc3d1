"""GPUs by name, as their makers state them. What a run reaches of it is in assumed.py."""

from dataclasses import dataclass

from megatron_sdpo.config import ConfigError


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU in a node of eight. Bytes are 10^9; TFLOP/s dense, without sparsity."""

    name: str
    memory_gb: float
    """Of the whole device."""
    bf16_tflops: float
    fp8_tflops: float | None
    """None: it has no FP8 matrix products."""
    memory_gb_s: float
    """Bandwidth of its own memory."""
    link_gb_s: float
    """To the other GPUs of the node, in one direction."""
    network_gb_s: float
    """To other nodes, in one direction, of the usual eight-GPU server with one adapter a GPU."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-80gb", 85.9, 312.0, None, 2039.0, 300.0, 25.0),
        Gpu("h100-80gb", 85.9, 989.4, 1978.9, 3350.0, 450.0, 50.0),
        Gpu("h200-141gb", 151.0, 989.4, 1978.9, 4800.0, 450.0, 50.0),
        Gpu("b200-180gb", 193.0, 2250.0, 4500.0, 7700.0, 900.0, 50.0),
    )
}
"""80 GB devices have 80 GiB, 85.9 * 10^9 bytes."""


def gpu_of(name: str) -> Gpu:
    """ConfigError for a name that is not known."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name} is not known; known are {', '.join(GPUS)}")
    return GPUS[name]
