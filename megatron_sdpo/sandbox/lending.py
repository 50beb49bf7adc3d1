"""From the configuration to the sandbox that a task uses, and the refusal when there is none."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from megatron_sdpo.config.sandbox import SandboxConfig
from megatron_sdpo.sandbox.pool import LocalSandbox
from megatron_sdpo.sandbox.records import Sandbox
from megatron_sdpo.sandbox.remote import RemoteSandbox
from megatron_sdpo.sandbox.selftest import check_local


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
