"""What is refused before a program is executed: settings, and machines that cannot isolate."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sdpo.config import Config, ConfigError, ModelConfig, TaskConfig, apply_overrides, check
from megatron_sdpo.sandbox import Program, check_local, seccomp
from megatron_sdpo.sandbox.pool import LocalSandbox
from megatron_sdpo.sandbox.records import SandboxError
from tests.sandbox_setup import CONFIG, skip_without_sandbox

VERSION = '[ "$1" = --version ] && echo bubblewrap 0.9.0 && exit'
BASE = Config(name="run", run_dir="r", steps=4, model=ModelConfig(path="model"), task=TaskConfig(name="minipipe"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["sandbox.workers=0"], "sandbox.workers is 0; it must be at least 1"),
        (["sandbox.limits.cpu_s=0"], "sandbox.limits.cpu_s is 0.0; set it above 0"),
        (["sandbox.limits.wall_s=2"], "sandbox.limits.wall_s 2 ends programs before sandbox.limits.cpu_s 6 can"),
        (["sandbox.limits.memory_bytes=1000"], "sandbox.limits.memory_bytes is 1000; set it to 67108864 or more"),
        (["sandbox.backend=remote"], "set sandbox.url and .token_file"),
        (["sandbox.url=http://x"], "set sandbox.backend=remote, or leave them out"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides: Sequence[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(apply_overrides(BASE, overrides))
    assert sentence in str(error.value)


def _script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_machine_without_bubblewrap_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"install the package bubblewrap.*sandbox.backend=remote"):
        check_local(replace(CONFIG, bwrap="no-such-program"))
    with pytest.raises(ConfigError, match=r"is bubblewrap 0\.6\.1; version 0\.8 or newer"):
        check_local(replace(CONFIG, bwrap=_script(tmp_path / "old", "echo bubblewrap 0.6.1")))


def test_a_machine_that_forbids_namespaces_is_refused_with_what_bubblewrap_said() -> None:
    tmp = Path("/tmp") / f"bwrap-of-a-test-{os.getpid()}"  # where any user may reach it
    text = f"{VERSION}\necho bwrap: No permissions to create a namespace >&2; exit 1"
    try:
        with pytest.raises(ConfigError, match=r"No permissions to create a namespace\); allow unprivileged user"):
            check_local(replace(CONFIG, bwrap=_script(tmp, text)))
    finally:
        tmp.unlink()


def test_a_sandbox_that_isolates_nothing_is_refused() -> None:
    """A bubblewrap that merely starts the program: every fact of the self-test is then wrong."""
    tmp = Path("/tmp") / f"bwrap-of-a-test-{os.getpid()}"
    script = Path(f"{tmp}.py")
    find = 'while [ "$1" != -- ]; do [ "$1" = --ro-bind-data ] && inside=$2; shift; done'
    text = f'{VERSION}\n{find}\ncat <&$inside >{script}\nexec "$2" "$3" "$4" "$5" {script}'
    try:
        with pytest.raises(ConfigError, match=r"does not hold on this machine \(user is .*no network is False"):
            check_local(replace(CONFIG, bwrap=_script(tmp, text), python="/usr/bin/python3", packages=()))
    finally:
        tmp.unlink()
        script.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"python": "/no/such/python"}, "sandbox.python /no/such/python cannot be started"),
        ({"python": "/bin/false"}, "is no Python interpreter"),
        ({"packages": ("no_such_package",)}, "'no_such_package', which this environment does not have"),
    ],
)
def test_an_interpreter_or_package_that_is_not_there_is_refused(setting: dict[str, str], words: str) -> None:
    skip_without_sandbox()
    with pytest.raises(ConfigError, match=words):
        check_local(replace(CONFIG, **setting))  # pyright: ignore[reportArgumentType]


def test_unsafe_is_said_aloud_and_still_limits(caplog: pytest.LogCaptureFixture) -> None:
    config = replace(CONFIG, backend="unsafe-none", warm=1)
    check_local(config)
    assert "WITHOUT ISOLATION" in caplog.text
    with LocalSandbox(config) as sandbox:
        run = sandbox.run_blocking
        assert run(Program("print(int(input()) + 1)", (b"1", b"2"), limits=CONFIG.limits))[1].stdout == b"3\n"
        endings = ("while True: pass", "x = bytearray(10**10)", "print('y' * 10**8)", "def", "import os\nos.abort()")
        kinds = [run(Program(source, limits=CONFIG.limits))[0].kind for source in endings]
        assert kinds == ["time_limit", "memory_limit", "output_limit", "syntax_error", "runtime_error"]


@pytest.mark.parametrize(
    ("interpreter", "words"), [(("/bin/false", ()), "no sandbox could be started"), ((), "index out of range")]
)
def test_sandboxes_that_stop_working_are_no_verdict(interpreter: tuple[object, ...], words: str) -> None:
    with LocalSandbox(replace(CONFIG, backend="unsafe-none", warm=1)) as sandbox:
        program = Program("print(1)", limits=CONFIG.limits)
        assert sandbox.run_blocking(program)[0].kind == "ok"
        sandbox._isolation.interpreter = interpreter  # pyright: ignore[reportAttributeAccessIssue]
        for _ in range(2):  # every time, not only the first
            with pytest.raises(SandboxError, match=words):
                for _ in range(4):  # those started ahead still work
                    sandbox.run_blocking(program)


def _decide(machine: str, number: int, arguments: Sequence[int] = (0, 0, 0, 0), architecture: int = 0) -> int:
    """What the filter answers: a reading of the instructions as the kernel reads them."""
    own = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    data = {0: number, 4: architecture or own, **{16 + 8 * i: value for i, value in enumerate(arguments)}}
    program, place, value = seccomp.instructions(machine), 0, 0
    while True:
        operation, if_true, if_false, operand = program[place]
        if operation == 0x06:
            return operand
        if operation == 0x20:
            value, step = data[operand], 0
        else:
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[operation]
            step = if_true if holds else if_false
        place += 1 + step


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_lets_through_what_is_on_the_list_and_nothing_else(machine: str) -> None:
    allow, fail = 0x7FFF0000, 0x00050000
    calls = seccomp.allowed_calls(machine)
    names = {number: name for name, number in calls.items()}
    assert len(names) == len(calls)
    for number in range(600):
        guarded = names.get(number) == "ioctl"
        expected = allow if number in names and not guarded else fail | (25 if guarded else 1 if number < 424 else 38)
        assert _decide(machine, number) == expected, names.get(number, number)
    assert _decide(machine, calls["clone"], (0x00020011, 0)) == fail | 1
    assert _decide(machine, calls["clone"], (0x003D0F00, 0)) == allow  # a thread
    assert _decide(machine, calls["prlimit64"], (1, 0)) == fail | 1
    assert _decide(machine, calls["ioctl"], (0, 0x5421)) == allow
    assert _decide(machine, calls["ioctl"], (0, 0x5412)) == fail | 25  # typing into a terminal
    for flags, answer in ((0x21, fail | 1), (0x23, fail | 1), (0x22, allow), (0x01, allow), (0x4022, allow)):
        assert _decide(machine, calls["mmap"], (0, 4096, 3, flags)) == answer  # shared memory of no file
    assert _decide(machine, calls["read"] | 1 << 30) != allow
    assert _decide(machine, calls["read"], architecture=0x40000003) == 0x80000000
    assert {"socket", "connect", "ptrace", "mount", "unshare", "setns", "bpf", "memfd_create", "setsockopt"}.isdisjoint(
        calls
    )


def test_a_machine_without_a_table_of_calls_is_refused() -> None:
    with pytest.raises(SandboxError, match="no system-call filter for riscv64"):
        seccomp.filter_program("riscv64")
