"""Asynchronous generation, token ids in and token ids out.

aiohttp: of the asyncio HTTP clients it costs the least time per request, which is what bounds a
coordinator that keeps hundreds of requests open; SGLang itself depends on it.
"""

import asyncio
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import aiohttp

from megatron_sdpo.rollout.control import EngineError, error_message, parse_json, version_number
from megatron_sdpo.types import EngineAddress

CONNECT_TRIES = 4
CONNECT_PAUSE_S = 0.25
"""Pause before the second try to connect; doubled before each further one."""

ROUNDING = 1e-3
"""A log-prob may be so far above zero: the rounding of a probability near one."""


@dataclass(frozen=True, slots=True)
class Generated:
    """One sampled response.

    Example: ``Generated((31, 44, 1), (-0.7, -1.2, -0.1), "stop", 3)``

    ``log_probs`` (natural) are those of the distribution that the tokens were drawn from: the
    model's logits divided by the temperature, then softmax over the whole vocabulary. One per
    response token. At temperature 0 (greedy) they are the model's own, at temperature 1.
    ``finish`` is ``"stop"`` when the model ended its turn (the end token is then the last of
    ``response_ids``), ``"length"`` when it was cut. ``weight_version`` is the *oldest* version that
    produced one of the tokens: a request may live through an update of the weights.
    """

    response_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: Literal["stop", "length"]
    weight_version: int


class EngineClient:
    """Generation by the engines at ``addresses``, taken in turn; usually the router's address alone.

    Use it as an asynchronous context manager, within one event loop. ``timeout_s`` bounds a whole call.
    """

    def __init__(self, addresses: Sequence[EngineAddress], token: str, timeout_s: float = 600.0) -> None:
        if not addresses:
            raise ValueError("EngineClient needs at least one address")
        self._turn = itertools.cycle(addresses)
        self._token = token
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # SGLang closes a connection after 5 idle seconds; reusing one at that moment would fail.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
        headers = {"Authorization": f"Bearer {self._token}"}
        self._http = aiohttp.ClientSession(connector=connector, headers=headers, timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        n: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
    ) -> list[Generated]:
        """``n`` responses to one prompt; each ends at one of the model's end tokens.

        ``seeds``, one a response and below 2**63, say what is drawn on engines that run with
        ``--enable-deterministic-inference``; others ignore them. A connection that cannot be made is
        tried again a few times; an answer, whatever it says, is final. Raises ``EngineError``.
        The ids must lie in the model's vocabulary: SGLang does not check, and dies of others.
        """
        if not prompt_ids:
            raise ValueError("the prompt is empty; SGLang would die of it")
        # What is not asked for is switched off by name: an engine may have other defaults.
        sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens}
        sampling |= {"top_p": top_p, "top_k": -1, "min_p": 0}
        if seeds is None:  # a batch in one request is faster than n requests, and than SGLang's own "n"
            return await self._generate([list(prompt_ids)] * n, sampling)
        if len(seeds) != n:
            raise ValueError(f"{len(seeds)} seeds for {n} responses")
        # The router takes one set of sampling parameters a request, so n seeds are n requests.
        seeded = ({**sampling, "sampling_seed": seed} for seed in seeds)
        answers = await asyncio.gather(*(self._generate([list(prompt_ids)], params) for params in seeded))
        return [generated for answer in answers for generated in answer]

    async def _generate(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[Generated]:
        body = {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": -1}
        address = next(self._turn)
        answer = await self._post(address, body)
        if not isinstance(answer, list) or len(answer) != len(prompts):
            message = f"asked for {len(prompts)} responses, the answer is {str(answer)[:200]}"
            raise EngineError(address.name, "/generate", message)
        return [_generated(address.name, sample) for sample in answer]

    async def _post(self, address: EngineAddress, body: dict[str, Any]) -> Any:
        if self._http is None:
            raise RuntimeError("EngineClient is used outside its 'async with' block")
        for attempt in itertools.count(1):
            try:
                async with self._http.post(f"{address.url}/generate", json=body) as response:
                    answer = parse_json(await response.text())
                    if response.status != 200:
                        message = error_message(answer, response.status)
                        raise EngineError(address.name, "/generate", message, response.status)
                    return answer
            except aiohttp.ClientConnectorError as error:
                if attempt == CONNECT_TRIES:
                    raise EngineError(address.name, "/generate", f"cannot connect ({error})") from error
                await asyncio.sleep(CONNECT_PAUSE_S * 2 ** (attempt - 1))
            except (aiohttp.ClientError, TimeoutError) as error:
                raise EngineError(address.name, "/generate", f"no answer ({error!r})") from error


def _generated(engine: str, sample: dict[str, Any]) -> Generated:
    meta = sample["meta_info"]
    finish = meta["finish_reason"]["type"]
    if finish not in ("stop", "length"):
        words = meta["finish_reason"].get("message") or finish
        raise EngineError(engine, "/generate", f"generation was ended by the engine: {words}")
    entries = meta["output_token_logprobs"]
    ids = tuple(int(entry[1]) for entry in entries)
    if ids != tuple(sample["output_ids"]):
        raise EngineError(engine, "/generate", f"{len(sample['output_ids'])} token ids but {len(ids)} log-probs")
    log_probs = [entry[0] for entry in entries]
    for place, value in enumerate(log_probs):
        if not _is_log_prob(value):
            words = f"response token {place} of {len(ids)} has log-prob {value}, which is no log-probability"
            raise EngineError(engine, "/generate", words)
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"]}]
    versions = [version_number(str(span["version"])) for span in spans]
    known = [version for version in versions if version is not None]
    if len(known) < len(versions):
        raise EngineError(engine, "/generate", f"weight version {spans} is not a number")
    return Generated(ids, tuple(map(float, log_probs)), finish, min(known))


def _is_log_prob(value: Any) -> bool:
    """Finite and not above zero; JSON's null, which stands for NaN in SGLang's answers, is not."""
    return isinstance(value, (int, float)) and -math.inf < value <= ROUNDING
