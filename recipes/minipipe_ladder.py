"""MiniPipe at five sizes, for a scaling study on two CPU cores: 0.1M to 1.7M parameters, the same settings for all.

The models are made first, a few minutes each on one core (``make ladder``)::

    python tools/pretrain_minipipe.py --width 48 --out models/minipipe-w48

and likewise for the other widths; 96 is the one that comes with the package.
"""

from dataclasses import replace
from functools import partial

from megatron_sdpo.config import Config, EvaluationConfig, LayoutConfig
from megatron_sdpo.scaling.study import Study
from recipes.minipipe import BASE_MODEL, minipipe

WIDTHS = (48, 64, 96, 144, 208)
USUAL = 96


def rung(width: int) -> Config:
    """SDPO on one rank; the learning rate in inverse proportion to the width, as that of the models' own training."""
    config = minipipe()
    name = f"minipipe-w{width}"
    return replace(
        config,
        name=name,
        run_dir=f"runs/{name}",
        model=replace(config.model, path=BASE_MODEL if width == USUAL else f"models/{name}"),
        layout=LayoutConfig(tokens_per_micro_batch=4096),
        optim=replace(config.optim, lr=config.optim.lr * USUAL / width),
        evaluation=EvaluationConfig(every=2, attempts=8),
    )


RECIPES = {f"minipipe-w{width}": partial(rung, width) for width in WIDTHS}
_MACHINE = "task.options.machine_seed={seed}"
STUDIES = [
    Study(
        name="minipipe-ladder",
        title="SDPO and GRPO on MiniPipe, 0.1M to 1.7M parameters",
        sizes={f"w{width}": f"minipipe-w{width}" for width in WIDTHS},
        arms={
            "sdpo": (_MACHINE,),
            "grpo": (_MACHINE, "objective.kind=grpo", "objective.advantage_std=true", "optim.mini_batches=4"),
        },
        seeds=(1, 2, 3),
        levels=(0.5, 0.8),
        needs="models that `make ladder` makes, minutes each on one core",
    )
]
