"""The system calls that a program may make: an allow-list, as the filter program that bubblewrap loads.

Written by hand rather than with libseccomp: the filter is one list and four tests of an argument, its encoding is
thirty lines that the tests run for real, and libseccomp would be one more system library to install on every machine.

What is on the list is what Python, its standard library and numpy use. What is not answers EPERM, or ENOSYS where the
C library then falls back to an older call. So there is no network (``socket``), no new namespace, no mount, no
``ptrace``, no memory that escapes the limits (``memfd_create``, System V shared memory, shared mappings of no file,
larger buffers of sockets), no keyring, BPF, io_uring or performance counter. The numbers are the kernel's tables
(unistd.h). The table of aarch64 is not yet run on one.
"""

import errno
import platform
import struct

from megatron_sdpo.sandbox.records import SandboxError

_X86_64 = """
access=21 alarm=37 arch_prctl=158 brk=12 capget=125 chdir=80 chmod=90 chown=92 clock_getres=229 clock_gettime=228
clock_nanosleep=230 clone=56 close=3 close_range=436 copy_file_range=326 creat=85 dup=32 dup2=33 dup3=292
epoll_create=213 epoll_create1=291 epoll_ctl=233 epoll_pwait=281 epoll_pwait2=441 epoll_wait=232 eventfd=284
eventfd2=290 execve=59 execveat=322 exit=60 exit_group=231 faccessat=269 faccessat2=439 fadvise64=221 fallocate=285
fchdir=81 fchmod=91 fchmodat=268 fchown=93 fchownat=260 fcntl=72 fdatasync=75 flock=73 fork=57 fstat=5 fstatfs=138
fsync=74 ftruncate=77 futex=202 futex_waitv=449 get_robust_list=274 getcpu=309 getcwd=79 getdents=78 getdents64=217
getegid=108 geteuid=107 getgid=104 getgroups=115 getitimer=36 getpeername=52 getpgid=121 getpgrp=111 getpid=39
getppid=110 getpriority=140 getrandom=318 getresgid=120 getresuid=118 getrlimit=97 getrusage=98 getsid=124
getsockname=51 getsockopt=55 gettid=186 gettimeofday=96 getuid=102 ioctl=16 kill=62 lchown=94 link=86 linkat=265
lseek=8 lstat=6 madvise=28 membarrier=324 mincore=27 mkdir=83 mkdirat=258 mmap=9 mprotect=10 mremap=25 msync=26
munmap=11 nanosleep=35 newfstatat=262 open=2 openat=257 openat2=437 pause=34 pidfd_open=434 pipe=22 pipe2=293
poll=7 ppoll=271 prctl=157 pread64=17 preadv=295 prlimit64=302 pselect6=270 pwrite64=18 pwritev=296 read=0
readlink=89 readlinkat=267 readv=19 recvfrom=45 recvmsg=47 rename=82 renameat=264 renameat2=316 restart_syscall=219
rmdir=84 rseq=334 rt_sigaction=13 rt_sigpending=127 rt_sigprocmask=14 rt_sigreturn=15 rt_sigsuspend=130
rt_sigtimedwait=128 sched_get_priority_max=146 sched_get_priority_min=147 sched_getaffinity=204 sched_getparam=143
sched_getscheduler=145 sched_yield=24 select=23 sendfile=40 sendmsg=46 sendto=44 set_robust_list=273
set_tid_address=218 setitimer=38 setpgid=109 setrlimit=160 setsid=112 shutdown=48 sigaltstack=131
signalfd=282 signalfd4=289 socketpair=53 splice=275 stat=4 statfs=137 statx=332 symlink=88 symlinkat=266
sync_file_range=277 sysinfo=99 tee=276 tgkill=234 time=201 timer_create=222 timer_delete=226 timer_getoverrun=225
timer_gettime=224 timer_settime=223 timerfd_create=283 timerfd_gettime=287 timerfd_settime=286 times=100 tkill=200
truncate=76 umask=95 uname=63 unlink=87 unlinkat=263 utime=132 utimensat=280 utimes=235 vfork=58 wait4=61
waitid=247 write=1 writev=20
"""

_AARCH64 = """
brk=214 capget=90 chdir=49 clock_getres=114 clock_gettime=113 clock_nanosleep=115 clone=220 close=57
close_range=436 copy_file_range=285 dup=23 dup3=24 epoll_create1=20 epoll_ctl=21 epoll_pwait=22 epoll_pwait2=441
eventfd2=19 execve=221 execveat=281 exit=93 exit_group=94 faccessat=48 faccessat2=439 fadvise64=223 fallocate=47
fchdir=50 fchmod=52 fchmodat=53 fchown=55 fchownat=54 fcntl=25 fdatasync=83 flock=32 fstat=80 fstatfs=44 fsync=82
ftruncate=46 futex=98 futex_waitv=449 get_robust_list=100 getcpu=168 getcwd=17 getdents64=61 getegid=177
geteuid=175 getgid=176 getgroups=158 getitimer=102 getpeername=205 getpgid=155 getpid=172 getppid=173
getpriority=141 getrandom=278 getresgid=150 getresuid=148 getrlimit=163 getrusage=165 getsid=156 getsockname=204
getsockopt=209 gettid=178 gettimeofday=169 getuid=174 ioctl=29 kill=129 linkat=37 lseek=62 madvise=233
membarrier=283 mincore=232 mkdirat=34 mmap=222 mprotect=226 mremap=216 msync=227 munmap=215 nanosleep=101
newfstatat=79 openat=56 openat2=437 pidfd_open=434 pipe2=59 ppoll=73 prctl=167 pread64=67 preadv=69 prlimit64=261
pselect6=72 pwrite64=68 pwritev=70 read=63 readlinkat=78 readv=65 recvfrom=207 recvmsg=212 renameat=38
renameat2=276 restart_syscall=128 rseq=293 rt_sigaction=134 rt_sigpending=136 rt_sigprocmask=135 rt_sigreturn=139
rt_sigsuspend=133 rt_sigtimedwait=137 sched_get_priority_max=125 sched_get_priority_min=126 sched_getaffinity=123
sched_getparam=121 sched_getscheduler=120 sched_yield=124 sendfile=71 sendmsg=211 sendto=206 set_robust_list=99
set_tid_address=96 setitimer=103 setpgid=154 setrlimit=164 setsid=157 shutdown=210 sigaltstack=132
signalfd4=74 socketpair=199 splice=76 statfs=43 statx=291 symlinkat=36 sync_file_range=84 sysinfo=179 tee=77
tgkill=131 timer_create=107 timer_delete=111 timer_getoverrun=109 timer_gettime=108 timer_settime=110
timerfd_create=85 timerfd_gettime=87 timerfd_settime=86 times=153 tkill=130 truncate=45 umask=166 uname=160
unlinkat=35 utimensat=88 wait4=260 waitid=95 write=64 writev=66
"""

_ARCHITECTURES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}
"""Machine -> its number in the kernel's audit.h, its table."""

_NEW_NAMESPACES = 0x7E020000
"""The CLONE_NEW* flags of clone."""
_TERMINAL_REQUESTS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""ioctl: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""
_SHARED, _ANONYMOUS = 0x01, 0x20
"""MAP_SHARED (which MAP_SHARED_VALIDATE includes), MAP_ANONYMOUS."""
_FIRST_RECENT = 424
"""From here on the calls of all architectures have one numbering, and the C library knows to do without them."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENT_0, _ARGUMENT_1, _ARGUMENT_3 = 0, 4, 16, 24, 40
"""Where struct seccomp_data holds them; of an argument the low half, on these little-endian machines."""

Instruction = tuple[int, int, int, int]
"""Operation, how many instructions to skip if true, if false, operand."""


def allowed_calls(machine: str) -> dict[str, int]:
    """Name -> number; a machine without a table raises SandboxError."""
    if machine not in _ARCHITECTURES:
        raise SandboxError(f"there is no system-call filter for {machine}, only for {', '.join(_ARCHITECTURES)}")
    pairs = (entry.split("=") for entry in _ARCHITECTURES[machine][1].split())
    return {name: int(number) for name, number in pairs}


def instructions(machine: str) -> list[Instruction]:
    """The filter of an architecture, instruction by instruction."""
    calls = allowed_calls(machine)
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine][0]),
        (_RETURN, 0, 0, _KILL),  # another architecture's calls have other numbers
        (_LOAD, 0, 0, _NUMBER),
    ]
    guarded = {
        "clone": [(_LOAD, 0, 0, _ARGUMENT_0), (_ANY_BIT, 0, 1, _NEW_NAMESPACES), *_fails(errno.EPERM)],
        "prlimit64": [(_LOAD, 0, 0, _ARGUMENT_0), (_EQUAL, 1, 0, 0), *_fails(errno.EPERM)],  # of no other process
        "mmap": [  # shared memory of no file would count in the limit of no process
            (_LOAD, 0, 0, _ARGUMENT_3),
            (_ANY_BIT, 0, 2, _ANONYMOUS),
            (_ANY_BIT, 0, 1, _SHARED),
            *_fails(errno.EPERM),
        ],
        "ioctl": [
            (_LOAD, 0, 0, _ARGUMENT_1),
            *((_EQUAL, len(_TERMINAL_REQUESTS) - i, 0, request) for i, request in enumerate(_TERMINAL_REQUESTS)),
            *_fails(errno.ENOTTY),
        ],
    }
    for name, body in guarded.items():
        body = [*body, (_RETURN, 0, 0, _ALLOW)]
        program += [(_EQUAL, 0, len(body), calls[name]), *body]
    for name, number in calls.items():
        if name not in guarded:
            program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    return [*program, (_AT_LEAST, 0, 1, _FIRST_RECENT), *_fails(errno.ENOSYS), *_fails(errno.EPERM)]


def _fails(error: int) -> list[Instruction]:
    return [(_RETURN, 0, 0, _FAIL | error)]


def filter_program(machine: str | None = None) -> bytes:
    """The filter as ``bwrap --seccomp FD`` reads it; of this machine, or of another."""
    return b"".join(struct.pack("<HBBI", *one) for one in instructions(machine or platform.machine()))
