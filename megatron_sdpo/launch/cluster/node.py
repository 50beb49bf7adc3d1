"""One node's process: ``python -m megatron_sdpo.launch.cluster.node RECIPE [key=value ...]``, once on every node.

It says what the node is, measures when told to, starts the node's roles when told to, shows that it lives, and ends
with them when the attempt has ended. What went wrong it writes down for the conductor; its exit code means nothing.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict

from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.launch.cluster.attempt import Attempt
from megatron_sdpo.launch.cluster.facts import Facts, find_facts
from megatron_sdpo.launch.cluster.site import Job, Site, read_job, read_site
from megatron_sdpo.launch.cluster.split import NodePlan
from megatron_sdpo.launch.roles import HOST, POLL_S, Role, environment, start_role, stop_roles, words_of_end
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.status import request_stop
from megatron_sdpo.rollout import lifeline
from megatron_sdpo.rollout.fleet import Fleet, Share
from megatron_sdpo.rollout.fleet_files import log_tail

TICK_S = 1.0
WARNINGS = {signal.SIGTERM: "preempted or out of time (SIGTERM)", signal.SIGUSR1: "the time limit is near (SIGUSR1)"}
LEAVE_S = 20.0
"""How long a node may need to notice that the attempt has ended, e.g. while it waits for its engines."""


class Node:
    """From construction, when the node shows itself, to the end of ``run``."""

    def __init__(self, job: Job, site: Site, recipe: Sequence[str]) -> None:
        """``recipe``: its name and overrides, for the conductor."""
        self._job, self._site = job, site
        self._run_dir = RunDir(job.run_dir)
        self._attempt = Attempt(self._run_dir.slurm / job.attempt)
        self._roles: list[Role] = []
        self._fleet: Fleet | None = None
        self._measuring: subprocess.Popen[bytes] | None = None
        self._told: set[str] = set()
        self._facts: Facts | None = None
        self._conductor: subprocess.Popen[bytes] | None = None
        if job.is_first:
            os.environ[lifeline.PARENT] = str(os.getpid())
            command = [sys.executable, "-m", "megatron_sdpo.launch.cluster.conductor", *recipe]
            self._conductor = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def run(self) -> None:
        """Until the attempt has ended."""
        threading.Thread(target=self._show_life, name="life", daemon=True).start()
        try:
            self._show_itself()
            while not self._attempt.ended() and self._conductor_lives():
                try:
                    self._obey()
                    self._look_after_roles()
                except Exception as error:  # whatever it is, the conductor must hear of it
                    traceback.print_exc()
                    self._fail("node", f"{str(error) or repr(error)}; {self._where()}")
                time.sleep(POLL_S)
        finally:
            stop_roles(self._roles, grace_s=0.0)  # they do not hear SIGTERM
            if self._fleet is not None:
                self._fleet.stop(grace_s=0.0)
            if self._measuring is not None:
                self._measuring.kill()
            if self._conductor is not None:
                self._conductor.wait()

    def _conductor_lives(self) -> bool:
        """One that has ended without ending the attempt has failed, in the job's output; nobody is left to decide."""
        return self._conductor is None or self._conductor.poll() is None or self._attempt.ended()

    def _show_life(self) -> None:
        """A count that goes on; warnings of Slurm, which this process has blocked, become a request to stop."""
        ticks, ended_at = 0, None
        while True:
            ticks += 1
            with suppress(OSError):  # a file system that hesitates: the node only looks silent meanwhile
                self._attempt.write(f"alive/{self._job.node}", ticks)
                for number in WARNINGS.keys() & signal.sigpending():
                    request_stop(self._run_dir, WARNINGS[signal.Signals(number)])
                if self._attempt.ended():
                    ended_at = ended_at or time.monotonic()
            if ended_at is not None and time.monotonic() - ended_at > LEAVE_S:
                os._exit(0)  # the kernel ends the roles with this process
            time.sleep(TICK_S)

    def _show_itself(self) -> None:
        """Facts, once the conductor's canary is there, or without it when the time is over."""
        deadline = time.monotonic() + self._site.start_timeout_s / 2
        while (canary := self._attempt.read("canary")) is None and time.monotonic() < deadline:
            if self._attempt.ended() or not self._conductor_lives():
                return
            time.sleep(POLL_S)
        facts = find_facts(self._job.node, self._site, canary)
        os.environ.update(facts.environment)
        self._attempt.write(f"facts/{self._job.node}.json", asdict(facts))
        self._facts = facts

    def _obey(self) -> None:
        for name in ("measure", "run"):
            order = None if name in self._told else self._attempt.read(f"orders/{name}.json")
            if order is not None:
                self._told.add(name)
                (self._measure if name == "measure" else self._start)(order)

    def _measure(self, order: dict[str, str]) -> None:
        ranks = self._site.gpus_per_node or 1
        where = torchrun(self._job.nodes, self._job.node, ranks, order["rendezvous"])
        command = [*where, "megatron_sdpo.launch.cluster.bandwidth", str(self._attempt.path)]
        with (self._run_dir.logs / f"bandwidth-{self._job.node}.log").open("ab") as log:
            own = {**os.environ, lifeline.PARENT: str(os.getpid())}
            self._measuring = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=own)

    def _start(self, order: dict[str, object]) -> None:
        assert self._facts is not None
        if self._measuring is not None:
            self._measuring.wait()
        config = configuration.load(self._run_dir.config)
        own, trainers = plan_of(order, self._job.node)
        commands = role_commands(own, trainers, str(order["rendezvous"]), self._run_dir)
        os.environ[lifeline.PARENT] = str(os.getpid())
        variables = environment(config) | role_environment(own, self._facts)
        for name, command in commands.items():
            role = start_role(name, command, self._run_dir, variables, speaks=0 in own.ranks)
            self._roles.append(role)
        if own.engines:
            self._start_fleet(config, own)

    def _start_fleet(self, config: Config, own: NodePlan) -> None:
        assert self._facts is not None
        share = Share(own.engines, self._facts.address, own.is_coordinator)
        self._fleet = Fleet(config, self._run_dir.path, self._run_dir.token(), share)
        self._fleet.start()

    def _look_after_roles(self) -> None:
        for ended in self._fleet.tend() if self._fleet else ():
            self._fail(ended.name, words_of_end(ended.name, ended.exit_code, self._where(), ended.log_tail))
        for role in self._roles:
            code, kind = role.process.poll(), role.name.partition("-")[0]
            if code is None and (why := self._run_dir.failure_of(kind)):
                # torchrun may need half a minute to end ranks that do not hear SIGTERM; what there is to say is said
                self._fail(role.name, f"{role.name} failed; {self._where()}.\n{why}")
            elif code == 0 and role.name.startswith("trainer"):
                self._attempt.write(f"done/{self._job.node}", True)
            elif code is not None:
                why = self._run_dir.failure_of(kind) or log_tail(role.log)
                self._fail(role.name, words_of_end(role.name, code, self._where(), why))

    def _where(self) -> str:
        return f"it ran on node {self._job.node}"

    def _fail(self, role: str, sentence: str) -> None:
        """Once: what comes after a first failure is its consequence."""
        if "failed" not in self._told:
            self._told.add("failed")
            self._attempt.write(f"failed/{self._job.node}.json", {"role": role, "sentence": sentence})


def plan_of(order: dict[str, object], node: str) -> tuple[NodePlan, tuple[str, ...]]:
    """(what the node runs, the names of all trainer nodes) of an order to run, as ``run_order`` writes it."""
    plans = order["nodes"]
    assert isinstance(plans, list)
    found = [
        NodePlan(plan["name"], range(*plan["ranks"]), range(*plan["engines"]), plan["is_coordinator"]) for plan in plans
    ]
    return next(plan for plan in found if plan.name == node), tuple(p.name for p in found if p.has_trainers)


def run_order(nodes: Sequence[NodePlan], rendezvous: str) -> dict[str, object]:
    """JSON that ``plan_of`` reads."""
    return {
        "rendezvous": rendezvous,
        "nodes": [
            {
                "name": node.name,
                "ranks": [node.ranks.start, node.ranks.stop],
                "engines": [node.engines.start, node.engines.stop],
                "is_coordinator": node.is_coordinator,
            }
            for node in nodes
        ],
    }


def role_commands(own: NodePlan, trainers: Sequence[str], rendezvous: str, run_dir: RunDir) -> dict[str, list[str]]:
    """The commands of a node's roles by name; engines and router are the fleet's."""
    commands: dict[str, list[str]] = {}
    if own.is_coordinator:
        commands["coordinator"] = [sys.executable, "-m", "megatron_sdpo.launch.coordinator", str(run_dir.path)]
    if own.has_trainers:
        where = torchrun(trainers, own.name, len(own.ranks), rendezvous)
        name = "trainer" if len(trainers) == 1 else f"trainer-{own.name}"
        commands[name] = [*where, "megatron_sdpo.launch.trainer", str(run_dir.path)]
    return commands


def role_environment(own: NodePlan, facts: Facts) -> dict[str, str]:
    """What a node's roles get because of where they run."""
    # Megatron counts on kernels to start in the order in which they are launched.
    in_order = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if own.has_trainers and facts.gpus else {}
    return {**facts.environment, HOST: facts.address, **in_order}


def torchrun(nodes: Sequence[str], node: str, ranks: int, rendezvous: str) -> list[str]:
    """Up to the module that ``ranks`` ranks of this node run; ``rendezvous`` is host:port on the first of ``nodes``."""
    host, _, port = rendezvous.rpartition(":")
    return [
        *(sys.executable, "-m", "megatron_sdpo.launch.torchrun"),
        *(f"--nnodes={len(nodes)}", f"--node-rank={list(nodes).index(node)}", f"--nproc-per-node={ranks}"),
        *(f"--master-addr={host}", f"--master-port={port}", "-m"),
    ]


def main() -> None:
    # Slurm sends its warnings to every process of a step. This one hears them for all, and for those that it starts.
    signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS.keys())
    os.environ[lifeline.KEEP_BLOCKED] = "1"
    try:
        job, site = read_job(), read_site()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    Node(job, site, sys.argv[1:]).run()


if __name__ == "__main__":
    main()
