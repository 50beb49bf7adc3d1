"""Programs that try to get out, to use too much, or to lie; each is small enough to do no harm if it succeeds.

``Attack.source`` prints "contained" when nothing that it tried worked, and names what did otherwise.
"""

# ruff: noqa: E501  (the programs stand in strings)

import secrets
from dataclasses import dataclass

DAEMON = f"daemon-of-{secrets.token_hex(8)}"
"""As one of the attacks calls a process that it leaves behind: other tests may run beside these."""
TOOLS = """
import os, sys, time
def refused(name, act):
    try:
        found = act()
    except (OSError, ValueError):
        return
    print("BREACH", name, repr(found)[:200])
"""


@dataclass(frozen=True)
class Attack:
    name: str
    kinds: tuple[str, ...]
    source: str
    output: str | None = None
    """What it prints."""
    error: str = ""
    """Part of its error."""
    wall_s: float = 20.0
    """Its limit on the clock: short only where that is what ends it, because other tests may keep the machine busy."""


def contained(name: str, source: str) -> Attack:
    return Attack(name, ("ok",), TOOLS + source + "\nprint('contained')", "contained\n")


ATTACKS = (
    # using too much
    Attack(
        "fork bomb",
        ("runtime_error",),
        "import os, time\nfor _ in range(200):\n    if os.fork() == 0:\n        time.sleep(5)\n        os._exit(0)",
        error="BlockingIOError",
    ),
    Attack(
        "fork bomb that does not give up",
        ("time_limit",),
        "import os, time\nend = time.time() + 60\nforks = 0\n"
        "while time.time() < end and forks < 60:\n"
        "    try:\n        forks += os.fork() != 0\n    except OSError:\n        pass",
    ),
    Attack(
        "thread bomb",
        ("runtime_error",),
        "import threading, time\n"
        "for _ in range(200):\n    threading.Thread(target=time.sleep, args=(5,), daemon=True).start()",
        error="can't start new thread",
    ),
    Attack("memory bomb", ("memory_limit",), "kept = []\nwhile len(kept) < 100:\n    kept.append(bytearray(10**7))"),
    Attack("memory at once", ("memory_limit",), "x = bytearray(2 * 10**9)"),
    Attack(
        "memory bomb of many processes",
        ("memory_limit",),
        "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        x = b'x' * (90 * 10**6)\n"
        "        time.sleep(3)\n        os._exit(0)\ntime.sleep(3)",
    ),
    Attack(
        "memory of processes that are each just below the limit",
        ("memory_limit",),
        "import ctypes, os, time\nfor _ in range(4):\n    if os.fork() == 0:\n"
        "        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # not dumpable\n        kept = []\n"
        "        for _ in range(20):\n            kept.append(b'x' * 10**7)\n            time.sleep(0.02)\n"
        "        time.sleep(3)\n        os._exit(0)\ntime.sleep(6)",
    ),
    Attack(
        "memory that no process is charged for",
        ("runtime_error",),
        "import mmap\nkept = []\nwhile len(kept) < 10:\n    shared = mmap.mmap(-1, 10**7)\n    shared.write(b'x' * 10**7)\n"
        "    shared.madvise(mmap.MADV_DONTNEED)\n    kept.append(shared)",
        error="PermissionError",
    ),
    Attack(
        "memory of the kernel, in sockets that are not read",
        ("memory_limit",),
        "import os, socket, time\nfor _ in range(8):\n    pid = os.fork()\n    if pid == 0: break\nkept = []\n"
        "for _ in range(50):\n    kept += socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "    for end in kept[-2:]:\n        end.setblocking(False)\n        try:\n            while True: end.send(b'x' * 100_000)\n"
        "        except OSError: pass\n"
        "    time.sleep(0.005)\ntime.sleep(5)",
    ),
    Attack(
        "disk fill",
        ("runtime_error",),
        "with open('/tmp/big', 'wb') as f:\n    for _ in range(64):\n        f.write(bytes(10**6))",
        error="OSError",
    ),
    Attack(
        "disk fill by many files",
        ("runtime_error",),
        "for i in range(64):\n    with open(f'/tmp/{i}', 'wb') as f:\n        f.write(bytes(10**6))",
        error="No space left",
    ),
    Attack(
        "empty files without end",
        ("output_limit",),
        "import time\nfor i in range(5000):\n    open(f'/tmp/{i}', 'w').close()\ntime.sleep(2)",
    ),
    Attack("endless output", ("output_limit",), "for _ in range(64):\n    print('y' * 10**6)"),
    Attack("endless errors", ("output_limit",), "import sys\nfor _ in range(64):\n    print('y' * 10**6, file=sys.stderr)"),
    Attack("endless words on every descriptor", ("output_limit",), "import os\nfor _ in range(64):\n    os.write(3, b'y' * 10**6)"),
    Attack("busy loop", ("time_limit",), "import time\nend = time.time() + 60\nwhile time.time() < end:\n    pass"),
    Attack(
        "busy processes",
        ("time_limit",),
        "import os, time\nend = time.time() + 60\nfor _ in range(3):\n    os.fork()\nwhile time.time() < end:\n    pass",
    ),
    Attack("sleep", ("time_limit",), "import time\ntime.sleep(20)", wall_s=1.0),
    Attack("waiting for input that does not come", ("runtime_error",), "input()\ninput()", error="EOFError"),
    Attack(
        "deep recursion",
        ("runtime_error", "memory_limit", "time_limit"),
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return [f(x + 1)]\nf(0)",
    ),
    # looking around
    contained(
        "files of others",
        "import glob\n"
        "for path in ('/etc/passwd', '/etc/shadow', '/root/.ssh', '/root/.bashrc', '/home', '/work', '/sys', '/run',\n"
        "             '/var', '/boot', '/mnt', '/opt', '/proc/kcore', '/proc/1/environ', '/proc/1/mem', '/dev/mem',\n"
        "             '/dev/vda', '/dev/sda', '/dev/tty', '/dev/pts'):\n"
        "    refused(path, lambda: os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read(10))\n"
        "for folder in ('/proc/1/cwd', '/proc/1/root', '/proc/1/fd'):\n    refused(folder, lambda: os.listdir(folder))",
    ),
    contained(
        "processes of others",
        "others = [n for n in os.listdir('/proc') if n.isdigit() and int(n) not in (1, os.getpid())]\n"
        "if others: print('BREACH', others)",
    ),
    contained(
        "network",
        "import socket\n"
        "for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET):\n"
        "    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):\n"
        "        refused(family, lambda: socket.socket(family, kind))\n"
        "refused('name', lambda: socket.getaddrinfo('example.org', 80))",
    ),
    # reaching out
    contained(
        "signals",
        "import signal\n"
        "for pid in [*range(3, 400), *range(30000, 30400), 99999]:\n"
        "    if pid != os.getpid(): refused(pid, lambda: os.kill(pid, 0))\n"
        "for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGSEGV, signal.SIGUSR1):\n"
        "    os.kill(1, number)\n    os.kill(os.getppid(), number)\n"
        "time.sleep(0.1)",
    ),
    contained(
        "system calls",
        "import ctypes, platform\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(name, *arguments):\n"
        "    if getattr(libc, name)(*arguments) != -1: print('BREACH', name)\n"
        "call('ptrace', 16, 1, 0, 0)\n"
        "call('ptrace', 0, 0, 0, 0)\n"
        "call('process_vm_readv', 1, 0, 0, 0, 0, 0)\n"
        "call('mount', b'none', b'/tmp', b'tmpfs', 0, 0)\n"
        "call('umount2', b'/proc', 2)\n"
        "call('setuid', 0), call('setgid', 0), call('setresuid', 0, 0, 0)\n"
        "call('chroot', b'/tmp'), call('unshare', 0x10000000), call('unshare', 0x40000000), call('setns', 0, 0)\n"
        "call('mknod', b'/tmp/x', 0o60666, 0x801), call('memfd_create', b'x', 0), call('shmget', 0, 4096, 0o1600)\n"
        "if libc.mmap(0, 4096, 3, 0x21, -1, 0) != -1: print('BREACH shared memory')\n"
        "refused('zero', lambda: open('/dev/zero', 'r+b'))\n"
        "call('sethostname', b'x', 1), call('klogctl', 10, 0, 0), call('swapon', b'/tmp', 0), call('reboot', 0)\n"
        "if platform.machine() == 'x86_64':\n"
        "    for number in (250, 248, 321, 298, 425, 323, 304, 175, 246, 438, 424, 434 + (1 << 30), 1 << 30):\n"
        "        if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1: print('BREACH', number)\n"
        "    for flags in (0x10000000, 0x40000000, 0x20000000, 0x00020000, 0x02000000):\n"
        "        if libc.syscall(56, flags | 17, 0, 0, 0, 0) != -1: print('BREACH clone', flags)",
    ),
    contained(
        "the process that watches",
        "import resource\n"
        "refused('limits', lambda: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)))\n"
        "refused('memory', lambda: open('/proc/1/mem', 'r+b'))\n"
        "refused('score', lambda: open('/proc/1/oom_score_adj', 'w').write('0'))\n"
        "refused('priority', lambda: os.setpriority(os.PRIO_PROCESS, 1, 19))\n"
        "for limit in (resource.RLIMIT_NPROC, resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):\n"
        "    refused(limit, lambda: resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)))",
    ),
    contained(
        "programs with more rights",
        "import subprocess\n"
        "for program in ('/usr/bin/su', '/usr/bin/sudo', '/usr/bin/mount', '/usr/bin/passwd', '/usr/bin/unshare'):\n"
        "    if os.path.exists(program):\n"
        "        arguments = {'/usr/bin/unshare': ['-U', 'true'], '/usr/bin/mount': ['-t', 'tmpfs', 'x', '/tmp']}\n"
        "        done = subprocess.run([program, *arguments.get(program, ['-c', 'id'])], capture_output=True, input=b'')\n"
        "        if done.returncode == 0: print('BREACH', program, done)",
    ),
    # leaving traces
    contained(
        "writing to the system and the interpreter",
        "for path in (sys.executable, os.__file__, '/usr/bin/x', '/usr/lib/x', '/bin/x', '/x', '/etc/x', '/dev/x', '/dev/shm/x',\n"
        "             '/packages/x', '/proc/sys/kernel/hostname', '/proc/sysrq-trigger', '/proc/1/comm', '/root/x'):\n"
        "    refused(path, lambda: open(path, 'ab'))\n"
        "refused('remove', lambda: os.remove(os.__file__))\n"
        "refused('rename', lambda: os.rename(os.__file__, '/tmp/os.py'))\n"
        "refused('rights', lambda: os.chmod(sys.executable, 0o777))",
    ),
    contained(
        "links",
        "os.symlink('/etc/shadow', '/tmp/a')\nrefused('symlink', lambda: open('/tmp/a').read())\n"
        "os.symlink('../../../../../../root', '/tmp/b')\nrefused('up', lambda: open('/tmp/b/x', 'w'))\n"
        "refused('hardlink', lambda: os.link(sys.executable, '/tmp/c'))\n"
        "os.symlink(os.__file__, '/tmp/d')\nrefused('through', lambda: open('/tmp/d', 'a'))",
    ),
    contained(
        "an archive that climbs out",
        "import zipfile\n"
        "with zipfile.ZipFile('/tmp/a.zip', 'w') as z: z.writestr('../../usr/lib/slipped', 'x'), z.writestr('../slipped', 'x')\n"
        "for name in zipfile.ZipFile('/tmp/a.zip').namelist(): refused(name, lambda: open('/tmp/' + name, 'w'))",
    ),
    Attack("a daemon", ("ok",), f"import os, time\nDAEMON = '{DAEMON}'\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
           "        os.execv('/usr/bin/sleep', [DAEMON, '30'])\n    os._exit(0)\ntime.sleep(0.2)\nprint('left')", "left\n"),
    # lying
    Attack("success words", ("ok",), "import os, sys\nprint('All tests passed')\nsys.exit(0)", "All tests passed\n"),
    Attack(
        "words of the sandbox",
        ("ok",),
        "import os, struct, json\nframe = json.dumps({'status': 0, 'stopped': None, 'lengths': [0, 0, 0]}).encode()\n"
        "for descriptor in range(1, 50):\n"
        "    try: os.write(descriptor, struct.pack('<I', len(frame)) + frame)\n    except OSError: pass",
    ),
    Attack("changing the interpreter", ("ok",), "import json, os, builtins\njson.dumps = lambda *a, **k: '{}'\nprint(1)", "1\n"),
    Attack("closing everything", ("ok",), "import os\nos.closerange(0, 100)\nos._exit(0)", ""),
    # ends
    Attack("exit code", ("ok",), "import sys\nprint(1)\nsys.exit(3)", "1\n"),
    Attack("hard exit", ("runtime_error",), "import os\nos._exit(3)"),
    Attack("abort", ("runtime_error",), "import os\nos.abort()"),
    Attack("crash", ("runtime_error",), "import ctypes\nctypes.string_at(0)"),
    Attack("killing itself", ("runtime_error",), "import os\nos.kill(os.getpid(), 9)"),
    Attack("killing everything", ("runtime_error",), "import os\nos.kill(0, 9)"),
    Attack("an exception that cannot be shown", ("runtime_error",), "class E(Exception):\n    def __str__(self): 1 / 0\nraise E"),
    Attack("an endless exit", ("time_limit",), "import atexit, threading, time\n"
           "threading.Thread(target=lambda: time.sleep(20)).start()", wall_s=1.0),
    # texts
    Attack("a NUL byte", ("syntax_error",), "print(1)\0"),
    Attack("half a character", ("syntax_error",), "print('\udc80')"),
    Attack("deep nesting", ("syntax_error", "runtime_error"), "(" * 100_000),
    Attack("deep brackets", ("syntax_error", "runtime_error", "memory_limit"), "x = " + "-" * 200_000 + "1"),
    Attack("a text that is too long", ("source_limit",), "#" * (10 * 1024**2)),
    Attack("nothing", ("ok",), "", ""),
    Attack("output that is no text", ("ok",), "import os\nos.write(1, b'\\xff\\xfe\\x00\\n')"),
)  # fmt: skip
