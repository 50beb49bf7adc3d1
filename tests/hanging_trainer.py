"""The trainer with a fault put in: its second rank never enters the collectives of a training phase."""

import os
import time

from megatron_sdpo.launch.role import play
from megatron_sdpo.launch.trainer import run
from megatron_sdpo.mcore.learner import Learner

HANGS_AT = 1


def train_but_the_second_rank_never_arrives(learner: Learner, *arguments: object) -> dict[str, float]:
    while learner.step == HANGS_AT and os.environ["RANK"] == "1":
        time.sleep(1.0)
    return _train(learner, *arguments)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    _train = Learner.train
    Learner.train = train_but_the_second_rank_never_arrives
    play("trainer", run)
