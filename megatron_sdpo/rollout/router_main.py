"""The router: sglang-router's own launcher. ``python -m megatron_sdpo.rollout.router_main <router arguments>``

The key that the router asks of its clients and shows to the engines is the environment variable
``MEGATRON_SDPO_TOKEN``, so that a process list does not show it. Needs neither SGLang nor torch.
"""

from megatron_sdpo.rollout import lifeline

lifeline.tie_to_parent()

import os  # noqa: E402
import sys  # noqa: E402

TOKEN = "MEGATRON_SDPO_TOKEN"


def main() -> None:
    """Route until the process is told to end."""
    from sglang_router.launch_router import launch_router, parse_router_args

    token = os.environ.pop(TOKEN, "")
    key = [f"--api-key={token}"] if token else []
    launch_router(parse_router_args([*key, *sys.argv[1:]]))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
