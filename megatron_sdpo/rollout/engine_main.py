"""One engine: SGLang's own server. ``python -m megatron_sdpo.rollout.engine_main <SGLang arguments>``

Arguments are SGLang's and reach it unchanged; without a CUDA device those of
``cpu_platform.SERVER_ARGS`` are put before them. The API key is the environment variable
``MEGATRON_SDPO_TOKEN``, so that a process list does not show it.

SGLang starts its workers by ``spawn``, which imports this module again in each of them: what stands
at the top level here reaches them all.
"""

from megatron_sdpo.rollout import lifeline

lifeline.tie_to_parent()  # before the slow imports: a parent may end while they run

import logging  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from typing import Any  # noqa: E402

from megatron_sdpo.rollout import cpu_fp8, cpu_platform, cpu_sampling  # noqa: E402

cpu_platform.install()
cpu_sampling.provide()
cpu_fp8.provide()

TOKEN = "MEGATRON_SDPO_TOKEN"


def main(arguments: Sequence[str]) -> None:
    """Serve until the process is told to end."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    without_cuda = not cpu_platform.has_cuda()
    given = list(arguments)
    if without_cuda:
        able = [argument for argument in arguments if argument != cpu_platform.MEMORY_SAVER]
        given = [*cpu_platform.SERVER_ARGS, *able, "--base-gpu-id=0"]
    if without_cuda and cpu_sampling.SEEDED in arguments:
        cpu_sampling.switch_on()
        given += cpu_sampling.SERVER_ARGS
    if without_cuda and cpu_fp8.is_asked_for(arguments):
        cpu_fp8.switch_on()
    token = os.environ.pop(TOKEN, "")
    if token:
        hide_in_log(token)
        given.append(f"--api-key={token}")
    server_args = prepare_server_args(given)
    tensor_parallel: int = server_args.tp_size  # pyright: ignore[reportAttributeAccessIssue]
    if without_cuda and tensor_parallel > 1:
        cpu_platform.bind_cores(tensor_parallel)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def hide_in_log(secret: str) -> None:
    """SGLang logs all its arguments at start, the key among them."""
    make_record = logging.getLogRecordFactory()

    def make_safe_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        if isinstance(record.msg, str):
            record.msg = record.msg.replace(secret, "***")
        return record

    logging.setLogRecordFactory(make_safe_record)


if __name__ == "__main__":
    main(sys.argv[1:])
