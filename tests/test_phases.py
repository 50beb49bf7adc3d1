"""The parts of a step and their followers."""

import time

import pytest

from megatron_sdpo.phases import Phases


class Recorder:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int, str]] = []

    def began(self, step: int, name: str) -> None:
        self.heard.append(("began", step, name))

    def ended(self, step: int, name: str) -> None:
        self.heard.append(("ended", step, name))


def test_seconds_of_each_phase_are_taken_once() -> None:
    phases = Phases()
    with phases("step"):
        with phases("train"):
            time.sleep(0.02)
        with phases("sync"):
            pass
    taken = phases.taken()
    assert taken.keys() == {"time/step", "time/train", "time/sync"}
    assert taken["time/step"] >= taken["time/train"] >= 0.02 > taken["time/sync"]
    assert phases.taken() == {}


def test_followers_hear_of_phases_as_they_nest_and_of_one_that_raised() -> None:
    recorder = Recorder()
    phases = Phases([recorder], step=4)
    with pytest.raises(KeyError), phases("step"):
        phases.step = 5
        with phases("train"):
            raise KeyError
    assert recorder.heard == [("began", 4, "step"), ("began", 5, "train"), ("ended", 5, "train"), ("ended", 4, "step")]
    assert phases.taken() == {}
