"""What is compared with what: every experiment is arms, every arm an algorithm with its own tuned settings.

Settings that an algorithm is tuned over (learning rate, mini-batches) are chosen on other questions and other
machines than those that judge it: ``tuning_overrides`` against ``final_overrides``. All arms of an experiment have
the same number of generations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RECIPE, LAYOUT = "minipipe", "tp1"
ATTEMPTS_PER_STEP = 128
EVALUATE_EVERY = 2
"""Steps; 256 generations."""
TUNING_SEEDS = (100, 101)
COMMON = (
    *("optim.lr_decay=linear", "optim.min_lr_ratio=0.1", "checkpoint.every=14"),
    *("teacher.kind=ema", "teacher.update_rate=0.05"),
)
"""Of every cell that does not say otherwise. The decay is the same for all; it is not tuned."""

Overrides = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """Something that has settings of its own. One candidate: nothing is tuned.

    Example: ``Algorithm("GRPO", ("objective.kind=grpo",), (("optim.lr=1e-3",), ("optim.lr=2e-3",)))``
    """

    name: str
    overrides: Overrides
    candidates: tuple[Overrides, ...]


@dataclass(frozen=True, slots=True)
class Arm:
    """One curve of the figure: an algorithm with the settings chosen for it, and what this arm changes."""

    name: str
    algorithm: Algorithm
    overrides: Overrides = ()


@dataclass(frozen=True, slots=True)
class Experiment:
    """``reference`` is the arm that the others are measured against."""

    title: str
    arms: tuple[Arm, ...]
    reference: str
    steps: int = 28

    @property
    def algorithms(self) -> tuple[Algorithm, ...]:
        return tuple({arm.algorithm.name: arm.algorithm for arm in self.arms}.values())

    @property
    def grid(self) -> tuple[int, ...]:
        """Generations at which every cell is evaluated."""
        return tuple(step * ATTEMPTS_PER_STEP for step in range(0, self.steps + 1, EVALUATE_EVERY))


def tuning_overrides(experiment: Experiment, algorithm: Algorithm, candidate: int, seed: int) -> Overrides:
    """A cell that a setting is chosen by: another machine, other questions, 80 x 4 attempts an evaluation."""
    return (
        *_of_every_cell(experiment, seed),
        f"task.options.question_seed={seed}",
        "evaluation.attempts=4",
        *algorithm.overrides,
        *algorithm.candidates[candidate],
    )


def final_overrides(experiment: Experiment, arm: Arm, candidate: int, seed: int) -> Overrides:
    """A cell that is reported: standard questions, 80 x 8 attempts an evaluation; the seed is the machine's, too."""
    return (
        *_of_every_cell(experiment, seed),
        "evaluation.attempts=8",
        *arm.algorithm.overrides,
        *arm.algorithm.candidates[candidate],
        *arm.overrides,
    )


def _of_every_cell(experiment: Experiment, seed: int) -> Overrides:
    return (
        *COMMON,
        f"steps={experiment.steps}",
        f"evaluation.every={EVALUATE_EVERY}",
        f"seed={seed}",
        f"task.options.machine_seed={seed}",
    )


def _settings(lr: str, mini_batches: int = 1, *more: str) -> Overrides:
    return (f"optim.lr={lr}", f"optim.mini_batches={mini_batches}", *more)


_STD = "objective.advantage_std=true"
_SDPO_GRID = (
    *map(_settings, ("2e-3", "4e-3")),
    *(_settings(lr, 4) for lr in ("1e-3", "2e-3", "4e-3")),
    *(_settings(lr, 8) for lr in ("5e-4", "1e-3", "2e-3")),
)
_GRPO_GRID = (
    *map(_settings, ("1e-3", "2e-3", "4e-3")),
    *(_settings(lr, 4) for lr in ("1e-3", "2e-3", "4e-3")),
    *(_settings(lr, 8) for lr in ("5e-4", "1e-3", "2e-3")),
    *(_settings(lr, mini_batches, _STD) for lr, mini_batches in (("1e-3", 4), ("1e-3", 8))),
)
SDPO = Algorithm("SDPO", ("objective.kind=sdpo",), _SDPO_GRID)
GRPO = Algorithm("GRPO", ("objective.kind=grpo",), _GRPO_GRID)
_NO_WORDS = "teacher_context.feedback=never"
SDPO_SCALAR = Algorithm(
    "SDPO, rewards only",
    ("objective.kind=sdpo", _NO_WORDS),
    (_settings("1e-3", 4), _settings("2e-3", 4), _settings("5e-4", 8), _settings("1e-3", 8)),
)
SDPO_UNTUNED = Algorithm("SDPO, recipe's settings", ("objective.kind=sdpo",), (_settings("1e-3", 8),))


def _hybrid(share: str) -> Arm:
    overrides = ("objective.kind=hybrid", f"objective.grpo_share={share}")
    candidates = _settings("1e-3", 4), _settings("1e-3", 8)
    return Arm(f"GRPO share {share}", Algorithm(f"hybrid {share}", overrides, candidates))


def _variants(algorithm: Algorithm, arms: Mapping[str, Sequence[str]]) -> tuple[Arm, ...]:
    return tuple(Arm(name, algorithm, tuple(overrides)) for name, overrides in arms.items())


EXPERIMENTS = {
    "rich": Experiment("SDPO and GRPO, feedback in words", (Arm("SDPO", SDPO), Arm("GRPO", GRPO)), "GRPO"),
    "scalar": Experiment(
        "SDPO and GRPO, rewards only: a sibling's success is the only context",
        (Arm("SDPO, rewards only", SDPO_SCALAR), Arm("GRPO", GRPO)),
        "GRPO",
    ),
    "teachers": Experiment(
        "SDPO by teacher, four times the generations",
        _variants(
            SDPO_UNTUNED,
            {
                "EMA": ["teacher.kind=ema"],
                "frozen": ["teacher.kind=frozen"],
                "live": ["teacher.kind=live"],
                "trust region": ["teacher.kind=trust_region"],
            },
        ),
        "EMA",
        steps=112,
    ),
    "contexts": Experiment(
        "SDPO by what the teacher reads",
        _variants(
            SDPO,
            {
                "success, else feedback": [],
                "success and feedback": ["teacher_context.feedback=always"],
                "success only": [_NO_WORDS],
                "feedback only": ["teacher_context.demonstrations=false"],
                "own success allowed": ["teacher_context.exclude_own_success=false"],
            },
        ),
        "success, else feedback",
    ),
    "divergence": Experiment(
        "SDPO by divergence and support",
        _variants(
            SDPO,
            {
                "JSD, top 20 and tail": [],
                "KL(teacher, student)": ["objective.alpha=0"],
                "KL(student, teacher)": ["objective.alpha=1"],
                "KL(student, teacher), sampled token": ["objective.alpha=1", "objective.support=sampled"],
                "top 3 and tail": ["objective.top_k=3"],
                "top 20, no tail": ["objective.tail=false"],
                "vocabulary": ["objective.support=vocabulary"],
            },
        ),
        "JSD, top 20 and tail",
    ),
    "hybrid": Experiment(
        "GRPO's share of the loss: 0 is SDPO, 1 is GRPO",
        (Arm("SDPO", SDPO), *map(_hybrid, ("0.5", "0.9")), Arm("GRPO", GRPO)),
        "GRPO",
    ),
    "weighting": Experiment(
        "SDPO by the weight of samples",
        _variants(
            SDPO,
            {
                "uniform": [],
                "failed only": ["objective.sample_weighting=failed_only"],
                "teacher confidence": ["objective.sample_weighting=teacher_confidence"],
                "question difficulty": ["objective.sample_weighting=question_difficulty"],
                "stop at saturation": ["objective.stop_at_saturation=1"],
            },
        ),
        "uniform",
    ),
}
