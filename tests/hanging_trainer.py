"""The trainer with a fault put in: its second rank never enters the collectives of a phase.

``SECOND_RANK_NEVER_ENTERS`` is "train" (of the second step) or "build".
"""

import os
import time
from typing import Any

from megatron_sdpo.launch import trainer
from megatron_sdpo.launch.role import play

STEP = 1


class LearnerWhoseSecondRankNeverArrives(trainer.Learner):
    def __init__(self, *arguments: Any) -> None:
        never_arrives("build")
        super().__init__(*arguments)

    def train(self, *arguments: Any) -> dict[str, float]:
        if self.step == STEP:
            never_arrives("train")
        return super().train(*arguments)


def never_arrives(phase: str) -> None:
    while os.environ["RANK"] == "1" and os.environ["SECOND_RANK_NEVER_ENTERS"] == phase:
        time.sleep(1.0)


if __name__ == "__main__":
    trainer.Learner = LearnerWhoseSecondRankNeverArrives
    play("trainer", trainer.run)
