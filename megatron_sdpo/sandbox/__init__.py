"""Programs that a model wrote, executed where they can do no harm; no torch.

===============  =======================================================================================
records.py       Program -> Outcome
seccomp.py       the system calls that a program may make
isolation.py     the command that makes a sandbox: bubblewrap, namespaces, what is mounted
inside.py        the first process inside, which limits, watches and ends the program
process.py       one sandbox from outside
pool.py          sandboxes started ahead, and the queue of programs
selftest.py      whether all of it holds on this machine
service.py       the same over HTTP, for machines that cannot isolate
remote.py        the client of the service
lending.py       which of them a task gets, and the refusal at the start of a run
===============  =======================================================================================

**What is held, and by what.** Every program gets a fresh sandbox, used once: user, process, mount, network, IPC, host
name and cgroup namespaces of its own, no capability, no new privileges, an allow-list of system calls, a read-only
system and an empty ``/tmp``. Of the ``Limits``,

* processor time: RLIMIT_CPU for each process; of all together, looked at every 20 ms, and exactly at the end;
* clock: by the first process inside, and 10 s later by the side outside;
* memory: RLIMIT_AS for each process; that of all together is looked at every 20 ms, swapped out or not. Memory that
  belongs to no process cannot be had: no shared mapping but of files, no memfd, no System V segments; sockets count as
  if they were full, and what pipes hold the kernel bounds for each user (64 MB). No control group is used, so that
  between two looks memory_bytes * processes is the firm bound;
* processes and threads: RLIMIT_NPROC, counted in the sandbox's own user namespace (Linux 5.14 or newer);
* files: the size of ``/tmp``, RLIMIT_FSIZE, and 2000 files;
* output: what is beyond the limit is not read, and the program is killed.

With ``unsafe-none`` nothing of the isolation holds, and of the limits all but the number of processes and files, for
the program's first process.

**What a program can learn** is its own text, one input, and what every user may read below ``/usr``. Expected answers
stay outside, where they are compared. A program that writes success words, ends early, or changes the interpreter
around it can only change what it answers.
"""

from megatron_sdpo.config.sandbox import Limits, SandboxConfig
from megatron_sdpo.sandbox.lending import check_sandbox, lent, open_sandbox, say_uneven_workers
from megatron_sdpo.sandbox.pool import LocalSandbox
from megatron_sdpo.sandbox.records import Outcome, OutcomeKind, Program, Sandbox, SandboxError
from megatron_sdpo.sandbox.remote import RemoteSandbox
from megatron_sdpo.sandbox.selftest import check_local

__all__ = [
    "Limits",
    "LocalSandbox",
    "Outcome",
    "OutcomeKind",
    "Program",
    "RemoteSandbox",
    "Sandbox",
    "SandboxConfig",
    "SandboxError",
    "check_local",
    "check_sandbox",
    "lent",
    "open_sandbox",
    "say_uneven_workers",
]
