"""What a person sees of a run: a line for each finished trial, and on a terminal a bar below them."""

import sys

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_sdpo.discovery.record import BEST_OF_K, Trial, TrialId


class Console:
    """Lines on standard output, ``done`` of ``total`` trials being finished already."""

    def __init__(self, total: int, done: int, budget: int) -> None:
        self._total, self._done, self._budget = total, done, budget
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            columns = (TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.description}", markup=False), transient=True)
            self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def reached(self, id: TrialId, attempts: int) -> None:
        if self._bar is not None:
            words = f"{id.method}, question {id.question}, seed {id.seed}: attempt {attempts} of {self._budget}"
            self._bar.update(self._bar.task_ids[0], description=words)

    def finished(self, trial: Trial) -> None:
        self._done += 1
        line = f"{self._done:{len(str(self._total))}d}/{self._total}  {trial_words(trial)}"
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.print(line, markup=False, highlight=False)
            self._bar.update(self._bar.task_ids[0], completed=self._done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def trial_words(trial: Trial) -> str:
    """``sdpo          hard/3  seed 1  solved at attempt 57``"""
    seed = "" if trial.id.method == BEST_OF_K else f"  seed {trial.id.seed}"
    if trial.id.method == BEST_OF_K:
        found = f"{trial.successes} of {trial.attempts} attempts correct"
    elif trial.first_success is None:
        found = f"not solved in {trial.attempts} attempts"
    else:
        found = f"solved at attempt {trial.first_success}"
    return f"{trial.id.method:13} {trial.question.id}{seed}  {found}"
