"""A scaling study: the same question put to several sizes, by several algorithms, with several seeds. Plain data.

A study names recipes and overrides, so each of its runs is a command that command line, Slurm and NeMo-Run know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from megatron_sdpo.config import ConfigError


@dataclass(frozen=True, slots=True)
class Cell:
    """One run. Example: ``Cell("sdpo", "8B", 0, "ladder-8b", ("seed=0", "run_dir=runs/ladder/sdpo-8B-seed0"))``"""

    arm: str
    size: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.size}-seed{self.seed}"


@dataclass(frozen=True, slots=True)
class Study:
    """``sizes``: label → recipe, the smallest first. ``arms``: what is compared, as overrides; the first is what the
    others are measured against. ``{seed}`` in an override is the seed. ``levels`` are the scores whose cost is asked
    for. ``needs`` says what must be there first, for whom it is not."""

    name: str
    title: str
    sizes: Mapping[str, str]
    arms: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    levels: tuple[float, ...]
    needs: str = ""

    def cells(
        self, folder: str, arms: Sequence[str], sizes: Sequence[str], seeds: Sequence[int], more: Sequence[str] = ()
    ) -> list[Cell]:
        """The runs of these arms, sizes and seeds (nothing named: all), in ``folder``; ``more`` overrides go to each.

        One seed of everything comes before the next, so that a study that is stopped can be read. ConfigError for what
        the study has not.
        """
        arms, sizes = self._known("arm", arms, self.arms), self._known("size", sizes, self.sizes)
        cells = []
        for seed in seeds or self.seeds:
            for size in sizes:
                for arm in arms:
                    own = [word.replace("{seed}", str(seed)) for word in self.arms[arm]]
                    place = PurePosixPath(folder) / f"{arm}-{size}-seed{seed}"
                    words = (*own, *more, f"seed={seed}", f"run_dir={place}")
                    cells.append(Cell(arm, size, seed, self.sizes[size], words))
        return cells

    def _known(self, what: str, named: Sequence[str], known: Mapping[str, object]) -> list[str]:
        if unknown := [name for name in named if name not in known]:
            raise ConfigError(f"the study {self.name} has no {what} {unknown[0]!r}; it has {', '.join(known)}")
        return [name for name in known if not named or name in named]
