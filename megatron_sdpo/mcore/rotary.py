"""Rotary frequencies, in one place for every way of attending.

Megatron's own formula for Llama 3 is this one, but with all numbers except the factor fixed.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_sdpo.mcore.names import head_dim


def inverse_frequencies(hf_config: Mapping[str, Any]) -> Tensor:
    """Radians per position of each pair of dimensions, fp32 ``[head_dim / 2]``, of a config of ``read_hf_config``.

    Example: ``rope_theta`` 10000 and ``head_dim`` 4 give ``[1.0, 0.01]``.
    """
    d = head_dim(hf_config)
    plain_F = 1.0 / (hf_config["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float32) / d))
    scaling = hf_config.get("rope_scaling")
    return plain_F if scaling is None else _llama3(plain_F, scaling)


def _llama3(plain_F: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Long waves stretched by ``factor``, short ones as they were, and a ramp between the two."""
    factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = scaling["original_max_position_embeddings"]
    wavelength_F = 2 * math.pi / plain_F
    ramp_F = (context / wavelength_F - low) / (high - low)
    between_F = (1 - ramp_F) * plain_F / factor + ramp_F * plain_F
    longer_F = torch.where(wavelength_F > context / low, plain_F / factor, between_F)
    return torch.where(wavelength_F < context / high, plain_F, longer_F)
