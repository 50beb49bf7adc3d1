"""A process that cannot outlive the one that started it, however that one ends (Linux).

A parent which is killed outright (``kill -9``, out of memory, a lost node step) cannot clean up, and
an engine left behind keeps its port and its GPU memory. The kernel does the cleaning instead.
"""

import ctypes
import os
import signal
import sys
from multiprocessing import resource_tracker

PARENT = "MEGATRON_SDPO_PARENT"
"""Environment variable: the process id of the parent to which the new process is tied."""

KEEP_BLOCKED = "MEGATRON_SDPO_KEEP_BLOCKED"
"""Environment variable: leave signals blocked that the parent had blocked. Slurm sends its warnings to every process of
a step; the one that is meant blocks them for all the others, whatever handlers those install."""

_PR_SET_PDEATHSIG = 1


def tie_to_parent() -> None:
    """Have the kernel kill this process when its parent ends, if the parent asked for it through ``PARENT``.

    The processes that this one starts inherit the request, with this process as their parent. The
    kernel watches the parent's *thread* that made this process: start children from a thread that
    lives as long as they should. A process started by hand, without the variable, is not tied
    itself, but its children are. Signals that the parent had blocked for itself are let through again, unless
    ``KEEP_BLOCKED`` is set.
    """
    if os.environ.get(KEEP_BLOCKED) is None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    else:  # starting its helper process, multiprocessing lets these signals through again, whoever had blocked them
        resource_tracker._IGNORED_SIGNALS = ()  # pyright: ignore[reportAttributeAccessIssue]
    parent = os.environ.get(PARENT)
    if parent is not None:
        end_with(int(parent))
    os.environ[PARENT] = str(os.getpid())


def end_with(parent: int) -> None:
    """Have the kernel kill this process when the process ``parent``, which must be its parent, ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)
