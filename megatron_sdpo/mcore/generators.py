"""The generators that a rank could draw from, as a checkpoint keeps them."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def states() -> dict[str, Any]:
    """The states of every generator that this process could draw from."""
    kind, keys, *rest = np.random.get_state()
    tracker: Any = get_cuda_rng_tracker()
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "tracker": {name: state.clone() for name, state in tracker.get_states().items()},
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_states(states: Any) -> None:
    """The inverse of ``states``."""
    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    tracker: Any = get_cuda_rng_tracker()
    tracker.set_states(states["tracker"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
