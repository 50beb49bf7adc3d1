"""An HTTP server that answers SGLang's ``/generate`` by rule: for what a real engine does not do at will."""

from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from megatron_sdpo.types import EngineAddress

Ids = tuple[int, ...]
EOS_ID = 1


async def _at_once(prompt_ids: Ids) -> None:
    return None


class FakeEngine:
    """``respond(prompt_ids, i)`` are the ids of the i-th response; a last id ``EOS_ID`` makes it finish by "stop".

    ``before`` is awaited before each answer; an aiohttp ``web.HTTPException`` that it raises is the answer.
    ``log_prob(place)`` is what it says of a response token; ``asked`` are the prompts in order of arrival, one entry a
    request.
    """

    def __init__(self, respond: Callable[[Ids, int], Sequence[int]]) -> None:
        self.respond = respond
        self.before: Callable[[Ids], Awaitable[None]] = _at_once
        self.asked: list[Ids] = []
        self.seeds: list[int | None] = []
        self.sampling: list[dict[str, Any]] = []
        self.version = 0
        self.log_prob: Callable[[int], object] = lambda place: -0.125 * place
        self.address = EngineAddress("fake", "", 1)
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.address = EngineAddress("fake", f"http://{host}:{port}", 1)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        prompt_ids = tuple(body["input_ids"][0])
        self.asked.append(prompt_ids)
        self.seeds.append(body["sampling_params"].get("sampling_seed"))
        self.sampling.append(body["sampling_params"])
        version = self.version
        await self.before(prompt_ids)
        return web.json_response(
            [self._sample(self.respond(tuple(ids), i), version) for i, ids in enumerate(body["input_ids"])]
        )

    def _sample(self, ids: Sequence[int], version: int) -> dict[str, Any]:
        return {
            "output_ids": list(ids),
            "meta_info": {
                "finish_reason": {"type": "stop" if ids[-1] == EOS_ID else "length"},
                "output_token_logprobs": [[self.log_prob(place), id, None] for place, id in enumerate(ids)],
                "weight_version": str(version),
            },
        }
