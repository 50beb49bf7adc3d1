"""Whether the sandbox holds on this machine, asked of the sandbox itself before a run relies on it."""

import json
import logging
from dataclasses import replace

from megatron_sdpo.config import ConfigError
from megatron_sdpo.config.sandbox import SandboxConfig
from megatron_sdpo.sandbox.pool import LocalSandbox
from megatron_sdpo.sandbox.records import Program, SandboxError

_MOST_FORKS = 8
_PROBE = f"""
import json, os, socket, time
facts = {{"user": os.getuid(), "variables": len(os.environ)}}
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
facts |= {{"no new privileges": status["NoNewPrivs"].strip(), "filter": status["Seccomp"].strip()}}
facts["capabilities"] = int(status["CapEff"], 16)
facts["processes in sight"] = sum(name.isdigit() for name in os.listdir("/proc"))
def fails(act):
    try:
        act()
    except OSError:
        return True
    return False
facts["no network"] = fails(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
places = ("/", "/usr", "/etc", "/dev", "/dev/shm")
facts["read-only system"] = all(fails(lambda: open(place + "/probe", "w")) for place in places)
forks = 0
try:
    for forks in range({_MOST_FORKS}):
        if os.fork() == 0:
            time.sleep(2)
            os._exit(0)
    forks = {_MOST_FORKS}
except OSError:
    pass
facts["limit on processes"] = forks < {_MOST_FORKS}
facts["processes below the limit"] = forks > 0
print(json.dumps(facts))
"""
_EXPECTED = {
    "user": 1000,
    "no new privileges": "1",
    "filter": "2",
    "capabilities": 0,
    "processes in sight": 2,
    "no network": True,
    "read-only system": True,
    "limit on processes": True,
    "processes below the limit": True,  # before Linux 5.14 all processes of the user are counted
}
_ADVICE = "set sandbox.backend=remote and sandbox.url to a service on a machine that allows it"
_LOG = logging.getLogger(__name__)


def check_local(config: SandboxConfig) -> None:
    """Execute a program that says what it can do; ConfigError unless it is what it should be."""
    if config.backend == "unsafe-none":
        _LOG.warning(
            "sandbox.backend=unsafe-none: programs that the model writes are executed WITHOUT ISOLATION, with all"
            " rights of this user"
        )
        return
    limits = replace(config.limits, processes=4, cpu_s=10.0, wall_s=30.0)
    try:
        with LocalSandbox(replace(config, workers=1, warm=1, limits=limits)) as sandbox:
            (outcome,) = sandbox.run_blocking(Program(_PROBE, limits=limits))
    except SandboxError as error:
        raise ConfigError(
            f"this machine does not let bubblewrap make a sandbox ({error}); allow unprivileged user namespaces, or"
            f" {_ADVICE}"
        ) from error
    if outcome.kind != "ok":
        raise ConfigError(f"the sandbox's own test ended with {outcome.kind} {outcome.error!r}; {_ADVICE}")
    facts = json.loads(outcome.stdout)
    weak = [f"{name} is {facts.get(name)!r}" for name, value in _EXPECTED.items() if facts.get(name) != value]
    if weak:
        raise ConfigError(f"the sandbox does not hold on this machine ({', '.join(weak)}); {_ADVICE}")
