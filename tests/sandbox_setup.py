"""What tests of the sandbox share: small limits, and whether this machine can make sandboxes at all."""

import functools

import pytest

from megatron_sdpo.config import ConfigError
from megatron_sdpo.config.sandbox import Limits, SandboxConfig
from megatron_sdpo.sandbox import check_local

SMALL = Limits(
    cpu_s=0.6,
    wall_s=20.0,
    memory_bytes=256 * 1024**2,
    processes=16,
    file_bytes=4 * 1024**2,
    output_bytes=1024**2,
)
CONFIG = SandboxConfig(workers=2, warm=2, limits=SMALL)


@functools.cache
def why_not() -> str | None:
    """Why this machine makes no sandbox, or None."""
    try:
        check_local(CONFIG)
    except ConfigError as error:
        return str(error)
    return None


def skip_without_sandbox() -> None:
    """Skip a test where no sandbox can be made, with the reason."""
    if (reason := why_not()) is not None:
        pytest.skip(f"no sandbox on this machine: {reason}")
