"""The real SGLang server on a tiny model: generation, and control of its weights."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed import distributed_c10d as c10d

from megatron_sdpo.rollout.client import EngineClient, Generated
from megatron_sdpo.rollout.control import EngineControl, EngineError
from megatron_sdpo.types import EngineAddress
from tests.conftest import TOKEN, Engine
from tests.tiny_model import EOS_ID, reference_log_probs, write_tiny_checkpoint

PROMPT = [5, 17, 80, 33, 9, 61, 4, 28, 99, 12, 7, 50]
PROBE = list(range(3, 43))


@pytest.fixture
def control(engine: Engine) -> EngineControl:
    """The shared engine, put back to its first weights."""
    control = EngineControl(engine.address, engine.token, timeout_s=60.0)
    control.update_weights_from_disk(str(engine.checkpoint), 0)
    return control


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture, other weights."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("other") / "checkpoint", seed=1)


def generate(addresses: Sequence[EngineAddress], token: str = TOKEN, **settings: object) -> list[Generated]:
    async def once() -> list[Generated]:
        arguments = {"n": 4, "max_new_tokens": 16, "temperature": 1.0} | settings
        async with EngineClient(addresses, token, timeout_s=60.0) as client:
            return await client.generate(PROMPT, **arguments)  # pyright: ignore[reportArgumentType]

    return asyncio.run(once())


def assert_log_probs_match(checkpoint: Path, samples: Sequence[Generated], temperature: float) -> None:
    for sample in samples:
        reference = reference_log_probs(checkpoint, PROMPT + list(sample.response_ids), temperature)
        torch.testing.assert_close(
            torch.tensor(sample.log_probs), reference[len(PROMPT) - 1 :], atol=1e-4, rtol=0, check_dtype=False
        )


# --- generation ---


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_sampled_distribution(
    engine: Engine, control: EngineControl, temperature: float
) -> None:
    samples = generate([engine.address], temperature=temperature)
    assert len({sample.response_ids for sample in samples}) == 4
    assert {sample.weight_version for sample in samples} == {0}
    assert_log_probs_match(engine.checkpoint, samples, temperature)


def test_greedy_log_probs_are_the_models_own(engine: Engine, control: EngineControl) -> None:
    samples = generate([engine.address], temperature=0.0, n=2)
    assert samples[0].response_ids == samples[1].response_ids
    assert_log_probs_match(engine.checkpoint, samples, temperature=1.0)


def test_the_most_probable_tokens_alone(engine: Engine, control: EngineControl) -> None:
    """A probability that the most probable token has by itself leaves nothing to draw."""
    (greedy,) = generate([engine.address], temperature=0.0, n=1)
    narrow = generate([engine.address], top_p=1e-6)
    assert {sample.response_ids for sample in narrow} == {greedy.response_ids}
    assert len({sample.response_ids for sample in generate([engine.address], top_p=1.0)}) == 4


def test_a_response_stops_at_the_end_token_and_keeps_it(engine: Engine, control: EngineControl) -> None:
    samples = generate([engine.address], n=128, max_new_tokens=16)
    assert {sample.finish for sample in samples} == {"stop", "length"}
    for sample in samples:
        assert len(sample.response_ids) == len(sample.log_probs)
        assert EOS_ID not in sample.response_ids[:-1]
        if sample.finish == "stop":
            assert sample.response_ids[-1] == EOS_ID
        else:
            assert len(sample.response_ids) == 16
            assert sample.response_ids[-1] != EOS_ID


def test_seeds_are_accepted(engine: Engine) -> None:
    assert len(generate([engine.address], n=3, seeds=(7, 8, 9))) == 3
    with pytest.raises(ValueError, match="2 seeds for 3 responses"):
        generate([engine.address], n=3, seeds=(7, 8))


def test_a_wrong_token_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineError, match="engine-0 /model_info: Unauthorized") as caught:
        EngineControl(engine.address, "wrong").model_info()
    assert caught.value.status == 401
    with pytest.raises(EngineError, match="Unauthorized"):
        generate([engine.address], token="wrong")


def test_the_token_is_neither_in_the_process_list_nor_in_the_log(engine: Engine) -> None:
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert any(str(engine.checkpoint).encode() in command for command in commands)
    assert not any(TOKEN.encode() in command for command in commands)
    assert TOKEN not in (engine.run_dir / "logs" / "engine-0.log").read_text()


def test_nobody_listening_is_an_engine_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = EngineAddress("engine-9", f"http://127.0.0.1:{unused.getsockname()[1]}", 1)
        assert not EngineControl(nobody, TOKEN).health()
        with pytest.raises(EngineError, match="engine-9 /generate: cannot connect"):
            generate([nobody])


def test_a_prompt_beyond_the_context_is_refused_in_sglangs_words(engine: Engine) -> None:
    with pytest.raises(EngineError, match="longer than the model's context length"):
        EngineControl(engine.address, engine.token).probe_log_probs([5] * 600)


# --- weights ---


def test_weights_from_disk(control: EngineControl, other_checkpoint: Path) -> None:
    control.update_weights_from_disk(str(other_checkpoint), 3)
    assert control.weight_version() == 3
    assert_probe_is(control, other_checkpoint)


def test_weights_from_disk_while_a_request_runs(control: EngineControl, other_checkpoint: Path) -> None:
    """SGLang ends when it has to flush its cache meanwhile; asked for it afterwards, it does."""
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 400, "ignore_eos": True, "temperature": 1.0}}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(control._call, "POST", "/generate", body)
        control.update_weights_from_disk(str(other_checkpoint), 3)
        assert running.result()["meta_info"]["completion_tokens"] == 400
    assert control.weight_version() == 3
    assert_probe_is(control, other_checkpoint)


def test_weights_from_a_missing_directory_leave_the_old_ones(
    engine: Engine, control: EngineControl, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="/update_weights_from_disk"):
        control.update_weights_from_disk(str(tmp_path / "missing"), 4)
    assert control.weight_version() == 0
    assert_probe_is(control, engine.checkpoint)


def test_weights_over_a_process_group(
    engine: Engine, control: EngineControl, other_checkpoint: Path, group: "Group"
) -> None:
    generate([engine.address])  # leaves prefixes of the old weights in the cache
    control.probe_log_probs(PROBE)
    with control.weight_update():
        group.send(load_file(other_checkpoint / "model.safetensors"), weight_version="5-705bea21", flush_cache=False)
    assert (control.weight_version(), control.weight_stamp()) == (5, "5-705bea21")
    assert_probe_is(control, other_checkpoint)
    control.flush_cache()
    samples = generate([engine.address])
    assert {sample.weight_version for sample in samples} == {5}
    assert_log_probs_match(other_checkpoint, samples, 1.0)


def test_failed_updates_leave_a_serving_engine(engine: Engine, control: EngineControl, group: "Group") -> None:
    with pytest.raises(EngineError, match="must run between begin_weight_update"):
        group.announce({"model.norm.weight": torch.ones(96)})
    with control.weight_update():
        with pytest.raises(EngineError, match=r"engine-0 .*Group nowhere not in"):
            group.announce({"model.norm.weight": torch.ones(96)}, group_name="nowhere")
        with pytest.raises(EngineError, match="/update_weights_from_distributed"):
            group.send({"model.norm.weight": torch.ones(7)})
    assert control.weight_version() == 0
    assert_probe_is(control, engine.checkpoint)


def test_sglang_does_not_notice_an_unknown_name(engine: Engine, control: EngineControl, group: "Group") -> None:
    with control.weight_update():
        group.send({"model.nothing.weight": torch.ones(96)})
    assert_probe_is(control, engine.checkpoint)


def test_an_update_session_left_open_is_taken_over(engine: Engine, control: EngineControl) -> None:
    EngineControl(engine.address, engine.token).begin_weight_update()
    with control.weight_update():
        pass
    assert_probe_is(control, engine.checkpoint)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_generation_waits_while_paused(engine: Engine, control: EngineControl, mode) -> None:
    control.pause_generation(mode)
    with ThreadPoolExecutor(1) as pool:
        samples = pool.submit(generate, [engine.address])
        with pytest.raises(TimeoutError):
            samples.result(timeout=0.5)
        control.continue_generation()
        assert_log_probs_match(engine.checkpoint, samples.result(timeout=60), 1.0)


def test_an_old_release_has_no_update_session() -> None:
    with FakeOldEngine() as old:
        control = EngineControl(old.address, TOKEN)
        for _ in range(2):
            with control.weight_update():
                control.update_weights_from_distributed(
                    names=["a"], dtypes=["float32"], shapes=[[2]], group_name="g", weight_version="1", flush_cache=True
                )
    update = "/update_weights_from_distributed"
    assert old.calls == ["/begin_weight_update", update, update]


def assert_probe_is(control: EngineControl, checkpoint: Path) -> None:
    reference = reference_log_probs(checkpoint, PROBE)
    probe = torch.tensor(control.probe_log_probs(PROBE))
    torch.testing.assert_close(probe, reference, atol=1e-4, rtol=0, check_dtype=False)


class Group:
    """A gloo group of this process (rank 0) and the engine (rank 1)."""

    name = "weights"

    def __init__(self, control: EngineControl) -> None:
        self._control = control
        self._pool = ThreadPoolExecutor(1)
        store = TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        joined = self._pool.submit(
            control.init_weights_update_group,
            master_address="127.0.0.1",
            master_port=store.port,
            rank_offset=1,
            world_size=2,
            group_name=self.name,
            backend="gloo",
        )
        # torch's public functions make subgroups of one world only; SGLang makes its side in this way too
        group, _ = c10d._new_process_group_helper(
            2,
            0,
            [],
            c10d.Backend("gloo"),
            c10d.PrefixStore(self.name, store),
            group_name=self.name,  # pyright: ignore[reportArgumentType]
            timeout=c10d.default_pg_timeout,
        )
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
        joined.result(timeout=60)

    def announce(self, tensors: dict[str, torch.Tensor], group_name: str = name, **settings: object) -> None:
        """The HTTP call alone."""
        arguments = {"weight_version": None, "flush_cache": True} | settings
        self._control.update_weights_from_distributed(
            names=list(tensors),
            dtypes=[str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            shapes=[list(tensor.shape) for tensor in tensors.values()],
            group_name=group_name,
            **arguments,  # pyright: ignore[reportArgumentType]
        )

    def send(self, tensors: dict[str, torch.Tensor], **settings: object) -> None:
        """The call, and the tensors."""
        answer = self._pool.submit(self.announce, tensors, **settings)  # pyright: ignore[reportArgumentType]
        for tensor in tensors.values():
            dist.broadcast(tensor.contiguous(), src=0, group=self._group)
        answer.result(timeout=60)

    def close(self) -> None:
        self._control.destroy_weights_update_group(self.name)
        dist.destroy_process_group(self._group)
        self._pool.shutdown()


@pytest.fixture
def group(control: EngineControl) -> Iterator[Group]:
    group = Group(control)
    yield group
    group.close()


class FakeOldEngine:
    """The HTTP surface of a release before 0.5.21: begin and end do not exist, updates succeed."""

    def __enter__(self) -> "FakeOldEngine":
        self.calls: list[str] = []
        calls = self.calls

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                calls.append(self.path)
                self.rfile.read(int(self.headers["Content-Length"]))
                exists = self.path.startswith("/update")
                body = json.dumps({"success": True} if exists else {"detail": "Not Found"}).encode()
                self.send_response(200 if exists else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = EngineAddress("engine-0", f"http://127.0.0.1:{self._server.server_port}", 1)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
