"""From the configuration to the sandbox that a task uses, and the refusal when there is none."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from megatron_sdpo.config.sandbox import SandboxConfig
from megatron_sdpo.sandbox.pool import LocalSandbox
from megatron_sdpo.sandbox.records import Sandbox
from megatron_sdpo.sandbox.remote import RemoteSandbox
from megatron_sdpo.sandbox.selftest import check_local

_LOG = logging.getLogger(__name__)


@runtime_checkable
class ExecutesPrograms(Protocol):
    """A task whose verifier needs a sandbox: it has this method."""

    def use_sandbox(self, sandbox: Sandbox) -> None: ...


def open_sandbox(config: SandboxConfig) -> Sandbox:
    """The sandbox of a configuration; the caller closes it."""
    return RemoteSandbox(config) if config.backend == "remote" else LocalSandbox(config)


def check_sandbox(task: object, config: SandboxConfig) -> None:
    """Refuse (ConfigError) a task that executes programs where the sandbox does not hold; nothing for other tasks."""
    if not isinstance(task, ExecutesPrograms):
        return
    if config.backend != "remote":
        check_local(config)
        return
    sandbox = RemoteSandbox(config)
    try:
        sandbox.check()
    finally:
        sandbox.close()


def say_uneven_workers(task: object, config: SandboxConfig, verify_workers: int) -> None:
    """Warn where threads that judge wait for sandboxes, or sandboxes have nobody who uses them; no verdict changes."""
    if not isinstance(task, ExecutesPrograms) or config.workers == verify_workers:
        return
    fewer, effect = ("sandbox.workers", "the others wait for a sandbox")
    if verify_workers < config.workers:
        fewer, effect = ("rollout.verify_workers", "the other sandboxes stay unused")
    _LOG.warning(
        "sandbox.workers is %d and rollout.verify_workers %d: only %d programs run at one time, %s; raise %s to %d on a"
        " machine with as many cores",
        *(config.workers, verify_workers, min(config.workers, verify_workers)),
        *(effect, fewer, max(config.workers, verify_workers)),
    )


@contextmanager
def lent(task: object, config: SandboxConfig) -> Iterator[None]:
    """While this lasts, a task that executes programs has a sandbox, tested first; nothing happens for other tasks."""
    if not isinstance(task, ExecutesPrograms):
        yield
        return
    check_sandbox(task, config)
    sandbox = open_sandbox(config)
    try:
        task.use_sandbox(sandbox)
        yield
    finally:
        sandbox.close()
