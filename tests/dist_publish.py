"""Worker of test_publish.py: trainer ranks that publish to a real engine, and what goes wrong on the way.

Arguments: layout (tp2pp2) folder scenarios. Reads folder/setup.pt (written by the test: where the
engine is, which checkpoints there are, what transformers makes of the probes); the scenarios are the functions of
``SCENARIOS``, run in their order. Prints the time of its end.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_sdpo.config import LayoutConfig, PublishConfig
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore.groups import ParallelGroups, initialize, shutdown
from megatron_sdpo.mcore.hf import canonical_parameters, load_hf
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.mcore.model import build_model
from megatron_sdpo.reshard.gather import gather, is_sender
from megatron_sdpo.reshard.plan import plan
from megatron_sdpo.reshard.publish import Publisher, PublishError
from megatron_sdpo.reshard.transport import LEAVE_S, StageTransport
from megatron_sdpo.rollout.control import EngineControl, EngineError
from megatron_sdpo.types import EngineAddress
from tests.dist_learner import parse
from tests.faulty_control import FaultyControl
from tests.learner_setup import make_config

TOLERANCE = 1e-4


@dataclass
class Ranks:
    """What all scenarios of one run share."""

    setup: dict[str, Any]
    layout: LayoutConfig
    groups: ParallelGroups
    learner: Learner
    out: Path
    engines: list[FaultyControl] = field(default_factory=list)

    def load(self, name: str) -> None:
        """The trainer's weights become those of a checkpoint, in place, as an optimizer changes them."""
        load_hf(self.learner.model, self.setup["checkpoints"][name], self.groups, self.layout)

    def publisher(self, release_memory: bool = False, **settings: Any) -> Publisher:
        """A new one, with new controls, whose timeout is the configuration's as in a real trainer."""
        own = canonical_parameters(self.learner.model, self.groups)
        config = replace(PublishConfig(timeout_s=30.0), **settings)
        known = zip_longest(self.setup["engines"], self.setup["leaders"])
        self.engines = [FaultyControl(a, self.setup["token"], config.timeout_s, leader) for a, leader in known]
        probe = self.learner.log_probs
        return Publisher(
            config,
            self.learner.hf_config,
            self.groups,
            own,
            self.engines,
            "127.0.0.1",
            probe,
            release_memory=release_memory,
        )

    def everywhere(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.groups.world_size
        dist.all_gather_object(values, value, group=self.groups.world)
        return values

    def refused(self, publisher: Publisher, version: int) -> str:
        """The words of PublishError, which every rank must raise alike."""
        try:
            publisher.publish(version)
        except PublishError as error:
            words = self.everywhere(str(error))
            assert set(words) == {words[0]}, words
            return words[0]
        raise AssertionError(f"rank {self.groups.rank} published version {version}")

    def assert_serves(self, stamp: str, name: str) -> None:
        """The engines generate, under this stamp, with the weights of this checkpoint; asked by a plain control."""
        if self.groups.rank == 0:
            for i in range(len(self.engines)):
                control = self.plain(i, timeout_s=20.0)
                assert control.weight_stamp() == stamp, (control.weight_stamp(), stamp)
                for ids, expected in zip(self.setup["probes"], self.setup["log_probs"][name], strict=True):
                    gap = (torch.tensor(control.probe_log_probs(ids)) - expected).abs().max()
                    assert gap <= TOLERANCE, f"{control.address.name} does not serve {name}: {gap}"
        self.everywhere(None)

    def assert_paused(self) -> None:
        """Of the first engine: it is alive, and does not generate."""
        if self.groups.rank == 0:
            control = self.plain(0, timeout_s=1.0)
            control.model_info()
            try:
                control.probe_log_probs([3, 4, 5])
            except EngineError as error:
                assert "timed out" in str(error), error
            else:
                raise AssertionError("the engine generates")
        self.everywhere(None)

    def disarm(self) -> None:
        for engine in self.engines:
            engine.fail(None)

    def plain(self, i: int, timeout_s: float) -> EngineControl:
        return EngineControl(self.engines[i].address, self.setup["token"], timeout_s)


# --- scenarios ---


def gathers(ranks: Ranks) -> None:
    """What each rank's buckets hold, as files; for every model and two bucket sizes."""
    for name, path in ranks.setup["models"].items():
        hf = read_hf_config(path)
        if hf["num_hidden_layers"] % ranks.groups.stages:
            continue
        model = build_model(hf, ranks.layout, ranks.groups, torch.float32)
        load_hf(model, path, ranks.groups, ranks.layout)
        for bucket_bytes in (20_000, 1 << 30):
            held: dict[str, torch.Tensor] = {}
            for bucket in plan(hf, ranks.groups.pipeline_size, 4, bucket_bytes, ranks.groups.virtual_size):
                pairs = gather(bucket, canonical_parameters(model, ranks.groups), hf, ranks.groups)
                assert [n for n, _ in pairs] == ([t.name for t in bucket.tensors] if _sends(ranks, bucket.rank) else [])
                assert not held.keys() & dict(pairs).keys()
                held |= {n: tensor.clone() for n, tensor in pairs}
            file = ranks.out / f"{name}-{bucket_bytes}" / f"{ranks.groups.rank}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(held, file)


def versions(ranks: Ranks) -> None:
    """Two versions through the same group, then one in many buckets by another trainer's publisher."""
    publisher = ranks.publisher()
    stamps = {}
    group = None
    for version, name in enumerate(("a", "b", "a"), 1):
        if version == 3:
            publisher.close()
            publisher = ranks.publisher(bucket_bytes=20_000)
            assert len(publisher.buckets) > 10 * ranks.groups.pipeline_size
        ranks.load(name)
        metrics = publisher.publish(version)
        assert metrics.keys() == {"sync/bytes", "sync/probe_gap", "sync/seconds"}
        assert metrics["sync/bytes"] == ranks.setup["bytes"]
        assert 0 <= metrics["sync/probe_gap"] <= TOLERANCE
        assert metrics["sync/seconds"] > 0
        assert publisher.served is not None
        stamps[version] = publisher.served.stamp
        ranks.assert_serves(stamps[version], name)
        assert (publisher.transport is not None) == is_sender(ranks.groups)
        name_now = publisher.transport.name if isinstance(publisher.transport, StageTransport) else None
        assert version != 2 or name_now == group
        group = name_now
    publisher.close()
    ranks.assert_serves(stamps[3], "a")
    if ranks.groups.rank == 0:
        torch.save(stamps, ranks.out / "stamps.pt")


def handles(ranks: Ranks) -> None:
    """From shared memory, into engines that gave theirs back before; and what fails there."""
    publisher = ranks.publisher(release_memory=True, backend="ipc", bucket_bytes=20_000)
    stamps = []
    for version, name in enumerate(("a", "b"), 1):
        ranks.load(name)
        metrics = publisher.publish(version)
        assert metrics["sync/bytes"] == ranks.setup["bytes"] and metrics["sync/released_bytes"] == 0
        assert 0 <= metrics["sync/probe_gap"] <= TOLERANCE
        assert publisher.served is not None
        stamps.append(publisher.served.stamp)
        ranks.assert_serves(stamps[-1], name)
        publisher.release()
    ranks.load("a")
    if _sends(ranks, -1 % ranks.groups.pipeline_size):
        ranks.engines[0].fail("update_weights_from_tensor", nth=3)
    said = ranks.refused(publisher, 3)
    assert "refused on purpose" in said and said.endswith("; the fleet serves version 2 again"), said
    ranks.assert_serves(stamps[1], "b")
    publisher.publish(3)
    if ranks.groups.rank == 0:
        made = [
            call for call in ranks.engines[0].made if call in ("release_memory", "resume_memory", "end_weight_update")
        ]
        once = ["release_memory", "resume_memory"]
        assert made == ["end_weight_update", *once, "end_weight_update", *once, *["end_weight_update"] * 2], made
        assert "update_weights_from_distributed" not in ranks.engines[0].made
    ranks.disarm()
    for call, words in (
        ("release_memory", "did not give its memory back"),
        ("resume_memory", "did not get its memory"),
    ):
        if ranks.groups.rank == 0:
            ranks.engines[0].fail(call, how="late")
        try:
            publisher.release()
            publisher.publish(4)
        except PublishError as error:
            assert words in str(error) and "failed on purpose, late" in str(error), error
        else:
            raise AssertionError(f"{call} failed and nobody said so")
        if ranks.groups.rank == 0 and call == "release_memory":
            ranks.plain(0, 20.0).resume_memory()
    publisher.close()


BUCKET = "update_weights_from_distributed"
FAULTS: dict[str, tuple[int, dict[str, Any], str]] = {  # what: (pipeline stage whose sender sees it, fault, words)
    "the engine does not join": (-1, {"call": "init_weights_update_group"}, "refused on purpose"),
    "the first bucket is refused": (0, {"call": BUCKET}, "refused on purpose"),
    "a middle bucket is refused": (0, {"call": BUCKET, "nth": 5}, "refused on purpose"),
    "the last stage's second bucket is refused": (-1, {"call": BUCKET, "nth": 2}, "refused on purpose"),
    "a bucket fails after its bytes have gone": (-1, {"call": BUCKET, "nth": 3, "how": "late"}, "on purpose, late"),
    "the engine does not pause": (0, {"call": "pause_generation"}, "refused on purpose"),
    "the session does not open": (0, {"call": "begin_weight_update"}, "refused on purpose"),
    "the session stays open": (0, {"call": "end_weight_update"}, "refused on purpose"),
    "the session closes but says it failed": (0, {"call": "end_weight_update", "how": "late"}, "on purpose, late"),
    "the cache is not flushed": (0, {"call": "flush_cache"}, "refused on purpose"),
    "the engine goes on but says it failed": (0, {"call": "continue_generation", "how": "late"}, "on purpose, late"),
    "the stamp is another": (0, {"call": "weight_stamp", "how": "lie"}, "engine-0 says it serves 2-"),
    "the log-probs are others": (0, {"call": "probe_log_probs", "how": "lie"}, "log-probs differ by 0.01 from the"),
}


def faults(ranks: Ranks) -> None:
    """Whatever fails once: every rank says so, and the engine serves the version before."""
    publisher, stamp = _published(ranks)
    for what, (stage, fault, words) in FAULTS.items():
        if fault["call"] == "init_weights_update_group":
            publisher.close()
        if _sends(ranks, stage % ranks.groups.pipeline_size):
            ranks.engines[0].fail(**fault)
        began = time.monotonic()
        said = ranks.refused(publisher, 2)
        assert time.monotonic() - began < LEAVE_S, f"{what}: somebody was left waiting"
        assert said.startswith("version 2 was not published: "), (what, said)
        assert words in said, (what, said)
        assert said.endswith("; the fleet serves version 1 again"), (what, said)
        ranks.assert_serves(stamp, "a")
    ranks.disarm()
    publisher.publish(2)
    assert publisher.served is not None
    ranks.assert_serves(publisher.served.stamp, "b")
    publisher.close()


def not_finite(ranks: Ranks) -> None:
    """Refused before any engine hears of it; the way back is not taken."""
    publisher, stamp = _published(ranks)
    own = canonical_parameters(ranks.learner.model, ranks.groups)
    if ranks.groups.rank == ranks.groups.world_size - 1:
        with torch.no_grad():
            own["decoder.layers.0.mlp.linear_fc1.weight"].view(-1)[7] = float("nan")
    ranks.engines[0].made.clear()
    said = ranks.refused(publisher, 2)
    assert "mlp.gate_proj.weight holds values that are not finite" in said, said
    assert said.endswith("; nothing was sent, the fleet still serves version 1"), said
    assert not ranks.engines[0].made
    assert ranks.refused(ranks.publisher(), 2).endswith("; nothing was sent, and no earlier version was published")
    ranks.assert_serves(stamp, "a")
    publisher.close()


def no_way_back(ranks: Ranks) -> None:
    """The engines are paused when nothing, or nothing that works, can be served again; a later publish helps."""
    publisher = ranks.publisher(bucket_bytes=20_000)
    ranks.load("b")
    if ranks.groups.rank == 0:
        ranks.engines[0].fail(BUCKET, 3)
    said = ranks.refused(publisher, 1)
    assert said.endswith("; no earlier version was published, so the engines are paused"), said
    ranks.assert_paused()
    publisher, _ = _published(ranks)
    if _sends(ranks, ranks.groups.pipeline_size - 1):
        ranks.engines[0].fail(BUCKET, times=1000)
    said = ranks.refused(publisher, 2)
    assert "; going back to version 1 failed too (engines could not load weights: engine-0" in said, said
    assert said.endswith("refused on purpose), so the engines are paused"), said
    ranks.assert_paused()
    ranks.disarm()
    publisher.publish(2)
    assert publisher.served is not None
    ranks.assert_serves(publisher.served.stamp, "b")
    publisher.close()


def hanging(ranks: Ranks) -> None:
    """An engine that takes a bucket's announcement and never answers: bounded by the timeout, and no thread is waited
    for when the process ends."""
    publisher, stamp = _published(ranks, timeout_s=2.0)
    if _sends(ranks, ranks.groups.pipeline_size - 1):
        ranks.engines[0].fail(BUCKET, how="hang")
    began = time.monotonic()
    said = ranks.refused(publisher, 2)
    assert "engines did not load weights within 2 s (publish.timeout_s)" in said, said
    assert said.endswith("; the fleet serves version 1 again"), said
    assert 2 < time.monotonic() - began < 2 + LEAVE_S + 5
    ranks.assert_serves(stamp, "a")


def dying(ranks: Ranks) -> None:
    """The trainer is killed between two buckets."""
    publisher, _ = _published(ranks)
    ranks.engines[0].fail(BUCKET, 3, "die")
    publisher.publish(2)


def under_load(ranks: Ranks) -> None:
    """Requests that run while weights travel are answered, by the versions they say."""
    publisher, _ = _published(ranks)
    answers: list[Any] = []

    def generate() -> None:
        body = {
            "input_ids": [[5, 17, 80, 33]] * 16,
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 450, "ignore_eos": True},
        }
        answers.extend(ranks.plain(0, timeout_s=60.0)._call("POST", "/generate", body))

    thread = threading.Thread(target=generate)
    thread.start()
    while ranks.plain(0, timeout_s=5.0)._call("GET", "/v1/loads")["loads"][0]["num_running_reqs"] < 16:
        assert thread.is_alive()
    publisher.publish(2)
    assert not answers
    thread.join()
    assert len(answers) == 16
    for answer in answers:
        assert len(answer["output_ids"]) == 450
        spans = answer["meta_info"]["weight_versions"]
        assert [span["version"].partition("-")[0] for span in spans] == ["1", "2"], spans
    publisher.close()


def two_engines(ranks: Ranks) -> None:
    """One of two engines refuses, hangs, dies."""
    publisher, stamp = _published(ranks, timeout_s=5.0)
    refusing = ranks.engines[1]
    for how in ("refuse", "late"):
        if ranks.groups.rank == 0:
            refusing.fail(BUCKET, 2, how)
        assert ranks.refused(publisher, 2).endswith("; the fleet serves version 1 again")
        ranks.assert_serves(stamp, "a")
    _stop_and_continue(ranks, publisher)
    publisher.publish(3)
    assert publisher.served is not None
    ranks.assert_serves(publisher.served.stamp, "b")
    if _sends(ranks, ranks.groups.pipeline_size - 1):
        refusing.fail(BUCKET, 2, "kill")
    began = time.monotonic()
    said = ranks.refused(publisher, 4)
    assert time.monotonic() - began < 5, said
    assert "engine-1 /update_weights_from_distributed: no answer" in said, said
    assert "; going back to version 3 failed too (engine-1 " in said, said
    assert said.endswith("so the engines are paused, except engine-1: no answer"), said
    ranks.assert_paused()


class KnownFleet:
    """Engines whose controls exist already (reshard.publish.Fleet)."""

    def __init__(self, engines: list[FaultyControl]) -> None:
        self.there = [engine.address for engine in engines]
        self.confirmed: list[tuple[str, list[str]]] = []
        self._known = {engine.address: engine for engine in engines}

    def engines(self) -> list[EngineAddress]:
        return self.there

    def control(self, address: EngineAddress) -> EngineControl:
        return self._known[address]

    def confirm(self, stamp: str, engines: Sequence[EngineAddress]) -> None:
        self.confirmed.append((stamp, [address.name for address in engines]))


def left_out(ranks: Ranks) -> None:
    """Of two engines one is killed while weights travel: the other gets this version, and the next."""
    publisher, _ = _published(ranks)
    publisher.fleet = fleet = KnownFleet(ranks.engines)
    if _sends(ranks, ranks.groups.pipeline_size - 1):
        ranks.engines[1].fail(BUCKET, 2, "kill")
    stamps = []
    for version, name in ((2, "b"), (3, "a")):
        ranks.load(name)
        publisher.publish(version)
        assert publisher.served is not None and publisher.served.number == version
        stamps.append(publisher.served.stamp)
        ranks.engines = ranks.engines[:1]
        ranks.assert_serves(stamps[-1], name)
        fleet.there = fleet.there[:1]
    if ranks.groups.rank == 0:
        assert fleet.confirmed == [(stamp, ["engine-0"]) for stamp in stamps], fleet.confirmed
    publisher.close()


def left_out_at_rest(ranks: Ranks) -> None:
    """Of two engines one is killed while both have given their memory back: the other goes on, once more too."""
    publisher = ranks.publisher(release_memory=True, backend="ipc")
    publisher.fleet = fleet = KnownFleet(ranks.engines)
    ranks.load("a")
    publisher.publish(1)
    publisher.release()
    if ranks.groups.rank == 0:
        gone = ranks.engines[1]
        assert gone.leader is not None
        os.killpg(gone.leader, signal.SIGKILL)
        while not gone.is_gone():
            time.sleep(0.05)
    ranks.everywhere(None)
    for version, name in ((2, "b"), (3, "a")):
        ranks.load(name)
        publisher.publish(version)
        assert publisher.served is not None and publisher.served.number == version
        ranks.engines = ranks.engines[:1]
        ranks.assert_serves(publisher.served.stamp, name)
        publisher.release()  # the one that is gone is still known to the fleet, the second time no more
        fleet.there = fleet.there[:1]
    if ranks.groups.rank == 0:
        ranks.plain(0, 20.0).resume_memory()
    publisher.close()


def _stop_and_continue(ranks: Ranks, publisher: Publisher) -> None:
    """Engine 1 stands still for a while, as under a debugger or on a machine that swaps."""
    if _sends(ranks, 0):
        ranks.engines[1].fail(BUCKET, 2, "stop")
    began = time.monotonic()
    said = ranks.refused(publisher, 2)
    assert "did not load weights within 5 s (publish.timeout_s)" in said, said
    assert said.endswith("so the engines are paused, except engine-1: no answer"), said
    assert time.monotonic() - began < 3 * 5 + LEAVE_S + 5
    ranks.assert_paused()
    if ranks.groups.rank == 0:
        os.killpg(ranks.setup["leaders"][1], signal.SIGCONT)
    ranks.disarm()


def _published(ranks: Ranks, **settings: Any) -> tuple[Publisher, str]:
    """A publisher of small buckets that has published "a" as version 1 and is about to publish "b"."""
    publisher = ranks.publisher(bucket_bytes=20_000, **settings)
    ranks.load("a")
    publisher.publish(1)
    assert publisher.served is not None
    ranks.load("b")
    return publisher, publisher.served.stamp


def _sends(ranks: Ranks, stage: int) -> bool:
    return is_sender(ranks.groups) and ranks.groups.pipeline_rank == stage


SCENARIOS = (
    *(gathers, versions, faults, not_finite, no_way_back, handles),
    *(hanging, dying, under_load, two_engines, left_out, left_out_at_rest),
)


def main() -> None:
    layout, folder = parse(sys.argv[1]), Path(sys.argv[2])
    setup = torch.load(folder / "setup.pt", weights_only=False)
    groups = initialize(layout, seed=0, timeout_s=120)
    learner = Learner(make_config(setup["checkpoints"]["a"], layout=layout), groups)
    out = folder / sys.argv[1]
    out.mkdir(exist_ok=True)
    ranks = Ranks(setup, layout, groups, learner, out)
    for scenario in SCENARIOS:
        if scenario.__name__ in sys.argv[3:]:
            scenario(ranks)
    if sys.argv[3:] != ["hanging"]:  # which stands for a trainer that ends by PublishError, without manners
        shutdown()
    print(f"ended at {time.time()}", flush=True)


if __name__ == "__main__":
    main()
