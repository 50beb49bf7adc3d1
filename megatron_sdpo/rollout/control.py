"""Synchronous control of one engine: what a trainer rank needs to publish weights.

Control calls go to each engine directly, never through the router, which does not forward them.
Standard library only; one connection a call, so an object may be used by several threads at once.
"""

import http.client
import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

from megatron_sdpo.types import EngineAddress


class EngineError(RuntimeError):
    """An engine refused or failed a call: which engine, which endpoint, and SGLang's own message."""

    def __init__(self, engine: str, endpoint: str, message: str, status: int | None = None) -> None:
        super().__init__(f"{engine} {endpoint}: {message}")
        self.engine, self.endpoint, self.message, self.status = engine, endpoint, message, status


class EngineControl:
    """Control calls to the engine at ``address``; each raises ``EngineError`` when it does not succeed.

    ``timeout_s`` bounds each call, connection included, and must cover the longest weight update.
    """

    def __init__(self, address: EngineAddress, token: str, timeout_s: float = 300.0) -> None:
        self.address = address
        self._token = token
        self._timeout_s = timeout_s
        self._has_update_session: bool | None = None

    # --- what the engine is ---

    def health(self, timeout_s: float = 5.0) -> bool:
        """Whether the engine answers that it is ready; False too when nobody listens."""
        try:
            self._call("GET", "/health", timeout_s=timeout_s)
        except EngineError:
            return False
        return True

    def healthy_workers(self) -> int:
        """How many engines stand ready behind a router; only routers answer this. 0 when nobody listens."""
        try:
            return int(self._call("GET", "/readiness", timeout_s=5.0)["healthy_workers"])
        except EngineError:
            return 0

    def add_worker(self, url: str) -> None:
        """Have a router send requests to one more engine, within seconds; only routers answer this."""
        self._call("POST", "/workers", {"url": url, "api_key": self._token})

    def remove_worker(self, url: str) -> None:
        """Have a router forget an engine, if it knows it; only routers answer this."""
        for worker in self._call("GET", "/workers")["workers"]:
            if worker["url"] == url:
                self._call("DELETE", f"/workers/{worker['id']}")

    def is_gone(self) -> bool:
        """Whether nobody listens at the address any more; one that is busy, or hangs, is not gone."""
        url = urlsplit(self.address.url)
        try:
            socket.create_connection((url.hostname or "", url.port or 0), timeout=5.0).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False

    def is_lost(self, timeout_s: float = 10.0) -> bool:
        """Whether it is gone, or its scheduler does not answer in time: to be asked when it has nothing to wait for."""
        if self.is_gone():
            return True
        try:
            self.ask_scheduler(timeout_s)
        except EngineError:
            return True
        return False

    def answers(self) -> bool:
        """Whether an HTTP server answers at the address, whatever it says; engines and routers."""
        try:
            self._call("GET", "/readiness")
        except EngineError as error:
            return error.status is not None
        return True

    def load(self) -> dict[str, Any]:
        """num_running_reqs, num_waiting_reqs ... as the scheduler last noted them; the HTTP server says it alone."""
        loads = self._call("GET", "/v1/loads")["loads"]
        return loads[0] if loads else {}

    def ask_scheduler(self, timeout_s: float | None = None) -> None:
        """Wait until the scheduler answers, between two batches; one that is paused or without memory does too."""
        try:
            self._call("GET", "/server_info", timeout_s=timeout_s)
        except EngineError as error:
            if error.status != 404:
                raise
            self._call("GET", "/get_server_info", timeout_s=timeout_s)  # its name in earlier releases

    def model_info(self) -> dict[str, Any]:
        """SGLang's description of the served model: model_path, weight_version, architectures ..."""
        return self._call("GET", "/model_info")

    def weight_version(self) -> int | None:
        """Version of the served weights, or None when they carry none of ours."""
        return version_number(self.weight_stamp())

    def weight_stamp(self) -> str:
        """What the served weights were stamped with when they were sent."""
        return str(self.model_info().get("weight_version"))

    # --- the process group that carries weights ---

    def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
    ) -> None:
        """Join a process group as ranks ``rank_offset ...``; blocks until all ``world_size`` members have come."""
        self._call(
            "POST",
            "/init_weights_update_group",
            {
                "master_address": master_address,
                "master_port": master_port,
                "rank_offset": rank_offset,
                "world_size": world_size,
                "group_name": group_name,
                "backend": backend,
            },
        )

    def destroy_weights_update_group(self, group_name: str) -> None:
        """Leave the process group."""
        self._call("POST", "/destroy_weights_update_group", {"group_name": group_name})

    # --- new weights ---

    @contextmanager
    def weight_update(self) -> Iterator[None]:
        """``begin_weight_update`` on entry, ``end_weight_update`` on exit, whatever happened between."""
        self.begin_weight_update()
        try:
            yield
        finally:
            self.end_weight_update()

    def begin_weight_update(self) -> None:
        """Open an update session; does nothing on releases before SGLang 0.5.21, which have no sessions.

        A session that a killed trainer left open is closed first.
        """
        if self._has_update_session is False:
            return
        try:
            self._call("POST", "/begin_weight_update", {})
        except EngineError as error:
            if error.status == 404:
                self._has_update_session = False
                return
            if "already open" not in error.message:
                raise
            self._call("POST", "/end_weight_update", {})
            self._call("POST", "/begin_weight_update", {})
        self._has_update_session = True

    def end_weight_update(self) -> None:
        """Close the update session, where the release has sessions."""
        if self._has_update_session is not False:
            self._call("POST", "/end_weight_update", {})

    def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        weight_version: str | None,
        flush_cache: bool,
        load_format: str | None = None,
    ) -> None:
        """Receive and load one bucket of tensors under Hugging Face names, broadcast by rank 0 of the group.

        ``dtypes`` are torch's names without ``torch.``; ``shapes`` are those of the whole tensors.
        ``load_format="flattened_bucket"``: the bucket comes as one byte tensor. SGLang takes a name
        that the model lacks without an error and leaves its weights as they were, so what was meant
        to arrive must be checked from outside (``probe_log_probs``).
        """
        self._call(
            "POST",
            "/update_weights_from_distributed",
            {
                "names": list(names),
                "dtypes": list(dtypes),
                "shapes": [list(shape) for shape in shapes],
                "group_name": group_name,
                "flush_cache": flush_cache,
                "weight_version": weight_version,
                "load_format": load_format,
            },
        )

    def update_weights_from_tensor(self, *, payloads: Sequence[str], weight_version: str | None) -> None:
        """Load one bucket that lies in memory of this machine; ``payloads`` tell each rank of the engine where.

        See ``reshard.handles.payload``. An unknown name is taken as by ``update_weights_from_distributed``.
        """
        body = {"serialized_named_tensors": list(payloads), "load_format": "flattened_bucket", "flush_cache": False}
        self._call("POST", "/update_weights_from_tensor", {**body, "weight_version": weight_version})

    def update_weights_from_disk(self, path: str, version: int) -> None:
        """Load a Hugging Face checkpoint directory that the engine can read, and flush the cache when it is idle."""
        body = {"model_path": path, "weight_version": str(version), "flush_cache": False}  # it dies when it cannot
        self._call("POST", "/update_weights_from_disk", body)
        self.flush_when_idle()

    # --- the memory that an engine holds ---

    def release_memory(self) -> None:
        """Give back the GPU memory of weights and KV cache, whose contents are lost. The engine must be idle.

        On a CPU nothing is given back.
        """
        self._call("POST", "/release_memory_occupation", {})

    def resume_memory(self) -> None:
        """Take it again, after ``release_memory``; the weights are then arbitrary until new ones are sent."""
        self._call("POST", "/resume_memory_occupation", {})

    # --- generation around an update ---

    def pause_generation(self, mode: Literal["abort", "retract", "in_place"]) -> None:
        """Stop generating. ``abort`` ends running requests; ``retract`` recomputes, ``in_place`` keeps their cache."""
        self._call("POST", "/pause_generation", {"mode": mode})

    def continue_generation(self) -> None:
        """Generate again after ``pause_generation``."""
        self._call("POST", "/continue_generation", {})

    def flush_cache(self) -> None:
        """Forget all cached prefixes; fails while requests run."""
        self._call("POST", "/flush_cache", {})

    def flush_when_idle(self, timeout_s: float | None = None) -> None:
        """The same, waiting for requests to end (default: as long as a call may take): an engine is busy for a moment
        after its last answer."""
        deadline = time.monotonic() + (timeout_s or self._timeout_s)
        while True:
            try:
                return self.flush_cache()
            except EngineError as error:
                if error.status is None or time.monotonic() > deadline:  # nobody answers, or it never ends
                    raise
                time.sleep(0.05)

    def probe_log_probs(self, ids: Sequence[int]) -> list[float]:
        """Log-probabilities (natural, temperature 1) of ``ids[1:]``, each given the ids before it: ``len(ids) - 1``.

        They are computed afresh: asking for log-probs from position 0 makes SGLang reuse no cached prefix.
        """
        if len(ids) < 2:
            raise ValueError(f"a probe needs at least 2 ids, not {len(ids)}")
        body = {
            "input_ids": list(ids),
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        meta = self._call("POST", "/generate", body)["meta_info"]
        if meta["cached_tokens"]:
            raise EngineError(self.address.name, "/generate", "the probe was answered from cached prefixes")
        entries = meta["input_token_logprobs"]
        if [entry[1] for entry in entries] != list(ids):
            raise EngineError(self.address.name, "/generate", f"{len(entries)} log-probs for {len(ids)} probe ids")
        return [float(entry[0]) for entry in entries[1:]]

    # --- HTTP ---

    def _call(self, method: str, endpoint: str, body: Any = None, timeout_s: float | None = None) -> Any:
        """The answer, JSON decoded where it is JSON."""
        url = urlsplit(self.address.url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname or "", url.port, timeout=timeout_s or self._timeout_s)
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        try:
            connection.request(method, endpoint, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(self.address.name, endpoint, f"no answer ({error!r})") from error
        finally:
            connection.close()
        answer = parse_json(text)
        refused = isinstance(answer, dict) and answer.get("success") is False
        if response.status not in (200, 202) or refused:
            raise EngineError(self.address.name, endpoint, error_message(answer, response.status), response.status)
        return answer


def version_number(stamp: str) -> int | None:
    """``"7"`` or ``"7-705bea216cbd0425"`` (version and digest) -> 7; None for a stamp that is not ours."""
    number = stamp.partition("-")[0]
    return int(number) if number.isdecimal() else None


def parse_json(text: str) -> Any:
    """The value of a JSON text; a text that is not JSON is returned as it is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def error_message(answer: Any, status: int) -> str:
    """SGLang's words in a refusal; its endpoints put them under ``message``, ``error`` or ``detail``."""
    if isinstance(answer, dict):
        words = answer.get("message") or answer.get("error") or answer.get("detail") or answer
        answer = words.get("message", words) if isinstance(words, dict) else words
    return str(answer).strip() or f"HTTP status {status}"
