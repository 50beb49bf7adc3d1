"""Who gives the nodes their orders: ``python -m megatron_sdpo.launch.cluster.conductor RECIPE [key=value ...]``.

Started by the first node's process. It refuses what cannot work, looks at the nodes, starts the roles, watches, and
writes how the attempt ended into ``RUN_DIR/status.json``, by which slurm/job.sh knows whether to start again.
"""

import json
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.launch.cluster.attempt import Attempt
from megatron_sdpo.launch.cluster.facts import Facts, facts_of
from megatron_sdpo.launch.cluster.health import Measured, Unfit, judge_facts, judge_measured
from megatron_sdpo.launch.cluster.node import role_commands, role_environment, run_order
from megatron_sdpo.launch.cluster.site import Job, Site, read_job, read_site
from megatron_sdpo.launch.cluster.split import Plan, split
from megatron_sdpo.launch.preflight import check_run
from megatron_sdpo.launch.roles import POLL_S
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.status import (
    State,
    Status,
    has_stopped,
    newest_checkpoint,
    read_status,
    stop_requested,
    write_status,
)
from megatron_sdpo.rollout import lifeline
from megatron_sdpo.rollout.ports import port_range, take_ports
from megatron_sdpo.timeline import write_timeline
from recipes import recipe

MEASURE_S = 180.0


class Failed(Exception):
    """The attempt has failed. ``is_worth_a_retry``: the same may go well next time, perhaps elsewhere."""

    def __init__(self, sentence: str, is_worth_a_retry: bool, unfit: Sequence[Unfit] = ()) -> None:
        super().__init__(sentence)
        self.is_worth_a_retry, self.unfit = is_worth_a_retry, unfit


class StoppedEarly(Exception):
    """Asked to stop before there was a trainer that could."""


@dataclass(slots=True)
class Life:
    """When a node last showed another count."""

    ticks: int
    at: float


class Conductor:
    """One attempt."""

    def __init__(self, job: Job, site: Site) -> None:
        self._job, self._site = job, site
        self._run_dir = RunDir(job.run_dir)
        self._attempt = Attempt(self._run_dir.slurm / job.attempt)
        self._lives: dict[str, Life] = {}
        self._facts: dict[str, Facts] = {}
        self._retries, self._began_at = 0, newest_checkpoint(self._run_dir)

    def conduct(self, arguments: Sequence[str]) -> Status:
        """How the attempt ended; the nodes have been told that it has."""
        before = read_status(self._run_dir)
        if before is not None and self._job.is_restart:
            self._retries = before.retries
        try:
            if before is not None and before.state == "running" and self._job.is_restart:
                self._count_attempt(before.step, f"{before.attempt} ended without a word; was its first node lost?")
            status = self._attempted(arguments, before)
        except ConfigError as error:
            status = self._status("failed", str(error))
        except Failed as failure:
            status = self._after(failure)
        except StoppedEarly as stopped:
            status = self._to_be_continued(str(stopped))
        write_status(self._run_dir, status)
        self._attempt.write("end", status.state)
        return status

    def _attempted(self, arguments: Sequence[str], before: Status | None) -> Status:
        config = self._config(arguments)
        if before is not None and before.state == "finished" and before.step >= config.steps:
            return replace(before, attempt=self._job.attempt)
        plan = split(config, self._job.groups, self._site)
        if not self._site.dry_run:
            check_run(config)
            self._run_dir.check_kind(discovery=False)
            self._run_dir.check_resumable(config)
            write_status(self._run_dir, self._status("running", ""))
        self._say(f"{config.name}: {config.steps} steps, {self._job.attempt} on {', '.join(self._job.nodes)}")
        self._look_at_nodes()
        if self._site.dry_run:
            self._attempt.write("plan.json", rendered(plan, self._facts, self._run_dir))
            print(json.dumps(rendered(plan, self._facts, self._run_dir), indent=2), flush=True)
            return self._status("planned", "nothing was started")
        with self._run_dir.locked():
            self._run_dir.prepare(config)
            if self._site.measure and len(self._job.nodes) > 1:
                self._measure()
            self._attempt.write("plan.json", rendered(plan, self._facts, self._run_dir))
            self._attempt.write("orders/run.json", run_order(plan.nodes, self._rendezvous()))
            self._watch(plan)
            write_timeline(self._run_dir.path)
        if has_stopped(self._run_dir):
            return self._to_be_continued(stop_requested(self._run_dir) or "asked to stop")
        self._report()
        return self._status("finished", "")

    def _config(self, arguments: Sequence[str]) -> Config:
        if not arguments:
            raise ConfigError("no recipe was named; give run_job one")
        wrong = [argument for argument in arguments[1:] if "=" not in argument or argument.startswith("-")]
        if wrong:
            raise ConfigError(f"{wrong[0]!r} is not key=value; what follows the recipe are configuration keys")
        overrides = [*arguments[1:], f"run_dir={self._run_dir.path}"]
        config = configuration.apply_overrides(recipe(arguments[0]), overrides)
        configuration.check(config)
        return config

    def _look_at_nodes(self) -> None:
        """The nodes' facts; Failed, naming nodes, when they are not fit."""
        canary = secrets.token_hex(8)
        self._attempt.write("canary", canary)
        nodes = self._job.nodes

        def all_there() -> bool:
            self._facts = {node: facts_of(value) for node, value in self._attempt.read_all("facts").items()}
            return len(self._facts) == len(nodes)

        self._wait(all_there, self._site.start_timeout_s)
        self._judge(judge_facts(self._facts, nodes, canary, self._site))
        self._say(f"preflight: {len(nodes)} nodes see each other's files, have the same versions{self._gpu_words()}")

    def _measure(self) -> None:
        self._attempt.write("orders/measure.json", {"rendezvous": self._rendezvous()})
        measured: dict[str, Measured] = {}

        def all_there() -> bool:
            found = self._attempt.read_all("measured")
            measured.update({node: Measured(**value) for node, value in found.items()})
            return len(measured) == len(self._job.nodes)

        self._wait(all_there, MEASURE_S)
        self._note_preflight(measured)
        self._judge(judge_measured(measured, self._job.nodes, self._site))
        slowest = min((rate for m in measured.values() for rate in m.pairs.values()), default=0.0)
        self._say(f"preflight: the slowest all-reduce between neighbours has {slowest:.3g} GB/s")

    def _note_preflight(self, measured: Mapping[str, Measured]) -> None:
        folder = self._run_dir.path / "preflight"
        folder.mkdir(exist_ok=True)
        for node in self._job.nodes:
            facts, numbers = self._facts.get(node), measured.get(node)
            told = {
                "facts": asdict(facts) if facts else None,
                "all_reduce_gb_s": asdict(numbers) if numbers else None,
                "gpus": "checked" if self._site.gpus_per_node else "no GPUs requested",
            }
            (folder / f"{node}.json").write_text(json.dumps(told, indent=2))

    def _judge(self, unfit: Sequence[Unfit]) -> None:
        if unfit:
            self._note_preflight({})
            raise Failed("preflight: " + "; ".join(map(str, unfit)), is_worth_a_retry=True, unfit=unfit)

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Until it holds or the time is over; StoppedEarly when the run is asked to stop."""
        deadline = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline:
            if why := stop_requested(self._run_dir):
                raise StoppedEarly(why)
            time.sleep(POLL_S)

    def _watch(self, plan: Plan) -> None:
        """Until all trainers have ended well; Failed otherwise."""
        trainers = {node.name for node in plan.trainers}
        while not trainers <= self._attempt.read_all("done").keys():
            failed = self._attempt.read_all("failed")
            silent = self._silent()
            if failed and not silent:
                silent = self._silent_after_failure()
            if silent:
                raise Failed(f"node {', '.join(silent)} was lost: it shows no life", is_worth_a_retry=True)
            if failed:
                raise Failed(self._first_cause(failed), is_worth_a_retry=self._has_got_on())
            if self._run_dir.hung.exists() and (why := self._run_dir.failure_of("trainer")):
                raise Failed(f"trainer hung.\n{why}", is_worth_a_retry=self._has_got_on())
            time.sleep(POLL_S)

    def _first_cause(self, failed: Mapping[str, Mapping[str, str]]) -> str:
        """A role's own words rather than those of one that noticed its end."""
        causes = sorted(failed.values(), key=lambda failure: failure["role"].startswith("trainer"))
        return causes[0]["sentence"]

    def _has_got_on(self) -> bool:
        """A failure that comes at the same place again would come for ever."""
        return newest_checkpoint(self._run_dir) > self._began_at

    def _silent(self) -> list[str]:
        """Nodes that have shown no life for ``node_timeout_s``."""
        now = time.monotonic()
        for node, ticks in self._attempt.read_all("alive").items():
            if node not in self._lives or self._lives[node].ticks != ticks:
                self._lives[node] = Life(ticks, now)
        timeout_s = self._site.node_timeout_s
        return [n for n in self._job.nodes if n in self._lives and now - self._lives[n].at > timeout_s]

    def _silent_after_failure(self) -> list[str]:
        """Whether a node has gone is known only when each has, or has not, shown life again."""
        began = {node: life.ticks for node, life in self._lives.items()}
        while not (silent := self._silent()):
            if all(self._lives[node].ticks != ticks for node, ticks in began.items()):
                return []
            time.sleep(POLL_S)
        return silent

    def _after(self, failure: Failed) -> Status:
        if failure.unfit:
            names = sorted({unfit.node for unfit in failure.unfit})
            with (self._run_dir.path / "excluded-nodes").open("a") as file:
                file.writelines(f"{name}\n" for name in names)
        if not failure.is_worth_a_retry:
            return self._status("failed", str(failure))
        return self._to_be_continued(str(failure))

    def _to_be_continued(self, sentence: str) -> Status:
        try:
            self._count_attempt(self._began_at, sentence)
        except Failed as last:
            return self._status("failed", str(last))
        return self._status("interrupted", sentence)

    def _count_attempt(self, began_at: int, sentence: str) -> None:
        """An attempt that began at step ``began_at`` has ended; Failed after too many that got nowhere."""
        self._retries = 0 if newest_checkpoint(self._run_dir) > began_at else self._retries + 1
        if self._retries > self._site.retries:
            raise Failed(f"{sentence}; {self._retries} attempts in a row got nowhere (SDPO_RETRIES)", False)

    def _rendezvous(self) -> str:
        address = self._facts[self._job.node].address
        (port,) = take_ports(address, 0, 1)
        return f"{address}:{port}"

    def _status(self, state: State, sentence: str) -> Status:
        step = newest_checkpoint(self._run_dir)
        return Status(state, self._job.attempt, sentence, step, self._retries)

    def _gpu_words(self) -> str:
        count = self._site.gpus_per_node
        return f" and {count} sound GPUs each" if count else " (no GPUs requested)"

    def _report(self) -> None:
        from megatron_sdpo.report import write_report  # loads matplotlib

        self._say(f"report {write_report(self._run_dir.path)}")

    def _say(self, words: str) -> None:
        print(words, flush=True)


def rendered(plan: Plan, facts: Mapping[str, Facts], run_dir: RunDir) -> dict[str, object]:
    """Who runs where, by which command, with which variables; ports are taken when the roles start."""
    trainers = [node.name for node in plan.trainers]
    rendezvous = f"{facts[trainers[0]].address}:PORT"
    ports = port_range()
    nodes = [
        {
            "node": node.name,
            "address": facts[node.name].address,
            "trainer_ranks": f"{node.ranks.start}-{node.ranks.stop - 1}" if node.ranks else "none",
            "engines": [f"engine-{i}" for i in node.engines],
            "has_coordinator_and_router": node.is_coordinator,
            "commands": {
                name: shlex.join(command)
                for name, command in role_commands(node, trainers, rendezvous, run_dir).items()
            },
            "environment": role_environment(node, facts[node.name]),
        }
        for node in plan.nodes
    ]
    return {"ports": f"{ports.start}-{ports.stop - 1}", "nodes": nodes}


def main() -> None:
    lifeline.tie_to_parent()  # it leaves the signals blocked that the node's process has blocked
    status = Conductor(read_job(), read_site()).conduct(sys.argv[1:])
    if status.state == "failed":
        print(f"error: {status.sentence}", flush=True)
    else:
        why = f": {status.sentence}" if status.sentence else ""
        print(f"{status.attempt} {status.state} at step {status.step}{why}", flush=True)


if __name__ == "__main__":
    main()
