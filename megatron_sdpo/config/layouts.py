"""A layout in one word, as ``--layout`` takes it and plans print it: read and written here, one the other's inverse."""

import json
import math
import re

from megatron_sdpo.config.training import LayoutConfig
from megatron_sdpo.config.tree import ConfigError

_NAME = re.compile(
    r"(?:tp(?P<tp>\d+)(?P<sp>sp)?)?(?:pp(?P<pp>\d+)(?:vp(?P<vp>\d+))?)?(?:cp(?P<cp>\d+))?"
    r"(?:ep(?P<ep>\d+)(?:et(?P<et>\d+))?)?(?:dp(?P<dp>\d+)(?P<do>do)?)?"
)
_KEYS = {"tp": "tensor", "pp": "pipeline", "cp": "context", "ep": "expert"}
LAYOUT_HELP = (
    "trainer ranks by kind, in this order: tp2 (tp2sp: with sequence parallelism), pp2 (pp2vp2: interleaved), cp2, ep2"
    " (ep2et1: each expert whole; ranks of tp, cp and dp hold the experts, as many dp as that takes), dp2 (dp2do: with"
    " the distributed optimizer), e.g. tp2pp2, tp1 (short for layout.* keys; what is not named is 1 or off)"
)


def layout_overrides(name: str) -> list[str]:
    """The ``layout.*`` keys that a name such as ``tp2spep2et1`` is short for: all that a name can tell, said or not.

    Without ``dp`` it is the fewest data ranks that hold all experts. ConfigError for what is no such name.
    """
    match = _NAME.fullmatch(name)
    if not name or match is None:
        raise ConfigError(
            f"--layout {name!r} is not a layout; write tp2, pp2, tp2pp2, tp1 or the like: tp2sp, pp2vp2, cp2, ep2,"
            " dp2do in this order"
        )
    found = match.groupdict()
    sizes = {kind: int(found[kind] or 1) for kind in ("tp", "pp", "cp", "dp", "vp", "ep")}
    if found["dp"] is None:  # the fewest that make ranks for all experts
        holders, others = sizes["ep"] * int(found["et"] or sizes["tp"]), sizes["tp"] * sizes["cp"]
        sizes["dp"] = max(1, holders // max(1, math.gcd(holders, others)))
    return [
        *(f"layout.{key}_parallel={sizes[kind]}" for kind, key in _KEYS.items()),
        f"layout.virtual_pipeline={sizes['vp']}",
        f"layout.sequence_parallel={json.dumps(found['sp'] is not None)}",
        f"layout.expert_tensor_parallel={found['et'] or 'none'}",
        f"layout.distributed_optimizer={json.dumps(found['do'] is not None)}",
        f"layout.world_size={sizes['tp'] * sizes['pp'] * sizes['cp'] * sizes['dp']}",
    ]


def layout_name(layout: LayoutConfig) -> str:
    """The name of a layout that ``check`` accepts. Example: ``tp8sppp4dp2do``."""
    copies = layout.world_size // (layout.tensor_parallel * layout.pipeline_parallel * layout.context_parallel)
    slices = f"et{layout.expert_tensor}" if layout.expert_tensor != layout.tensor_parallel else ""
    parts = [
        f"tp{layout.tensor_parallel}{'sp' * layout.sequence_parallel}",
        f"pp{layout.pipeline_parallel}" + (f"vp{layout.virtual_pipeline}" if layout.virtual_pipeline > 1 else ""),
        f"cp{layout.context_parallel}" if layout.context_parallel > 1 else "",
        f"ep{layout.expert_parallel}{slices}" if layout.expert_parallel > 1 else "",
        f"dp{copies}{'do' * layout.distributed_optimizer}",
    ]
    return "".join(parts)
