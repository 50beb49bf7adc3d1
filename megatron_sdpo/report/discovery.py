"""What a discovery found: ``discovery.json`` (numbers), ``discovery.png`` (curves), ``discovery.html`` (both, and the
questions with their discovering attempts).

Everything is computed from the finished trials, so it can be made while the run goes on: trials that are not finished
are counted in the page, and a method's numbers are then of those that are.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullFormatter

from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.discovery.record import BEST_OF_K, SDPO, Trial, TrialFiles, planned
from megatron_sdpo.discovery.statistics import (
    CONFIDENCE,
    Curve,
    Found,
    Independent,
    Sequential,
    discovery_curve,
    drawn_at,
    mean_attempts,
    shown_at,
)
from megatron_sdpo.report.figures import COLOURS, as_svg, save_png
from megatron_sdpo.report.page import render, write
from megatron_sdpo.tasks import load_task
from megatron_sdpo.types import Question

HALF = 0.5


@dataclass(frozen=True, slots=True)
class Method:
    """One method's finished trials. ``found`` has one entry for each question with a finished trial."""

    name: str
    planned: int
    trials: tuple[Trial, ...]
    found: tuple[Found, ...]
    curve: Curve


def write_discovery(run_dir: Path) -> Path:
    """Write the three files into ``run_dir``; returns the page's path.

    Raises ConfigError when no trial is finished there.
    """
    run_dir = Path(run_dir)
    config = configuration.load(run_dir / "config.json")
    questions = load_task(config.task.name, **config.task.options).train_questions()[: config.discovery.questions]
    methods = _methods(config, len(questions), TrialFiles(run_dir / "trials").all())
    if not methods:
        raise ConfigError(f"{run_dir} holds no finished trial yet")
    summary = _summary(config, methods)
    write(run_dir / "discovery.json", json.dumps(summary, indent=1) + "\n")
    save_png(lambda: _figure(methods, config.discovery.budget), run_dir / "discovery.png")
    page = render(
        "discovery.html.j2",
        name=run_dir.resolve().name,
        config=config,
        summary=summary,
        missing=[f"{m.name}: {len(m.trials)} of {m.planned} trials" for m in methods if len(m.trials) < m.planned],
        curves=as_svg(lambda: _figure(methods, config.discovery.budget)),
        questions=_question_rows(questions, methods),
        discoveries=[t for m in methods if m.name != BEST_OF_K for t in m.trials if t.first_success is not None],
        confidence=CONFIDENCE,
    )
    return write(run_dir / "discovery.html", page)


def summary_lines(run_dir: Path) -> list[str]:
    """The numbers of ``discovery.json`` that one looks for first, a line a method."""
    summary = json.loads((Path(run_dir) / "discovery.json").read_text())
    lines = []
    for name, numbers in summary["methods"].items():
        at = "  ".join(f"@{k} {value:.2f}" for k, value in numbers["discovery_at"].items())
        half = numbers["attempts_to_half"]
        lines.append(f"{name:13} {at}  50% at {'-' if half is None else half}")
    return lines


def _methods(config: Config, questions: int, trials: Sequence[Trial]) -> list[Method]:
    """In the order of the plan, those with a finished trial."""
    plan = planned(config, questions)
    methods = []
    for name in dict.fromkeys(id.method for id in plan):
        ids = {id for id in plan if id.method == name}
        own = tuple(trial for trial in trials if trial.id in ids)
        if own:
            found = _found(name, own)
            curve = discovery_curve(found, config.discovery.budget, config.seed)
            methods.append(Method(name, len(ids), own, found, curve))
    return methods


def _found(name: str, trials: Sequence[Trial]) -> tuple[Found, ...]:
    if name == BEST_OF_K:
        return tuple(Independent(trial.attempts, trial.successes) for trial in trials)
    by_question: dict[int, list[int | None]] = {}
    for trial in trials:
        by_question.setdefault(trial.id.question, []).append(trial.first_success)
    return tuple(Sequential(tuple(firsts)) for _, firsts in sorted(by_question.items()))


def _summary(config: Config, methods: Sequence[Method]) -> dict[str, Any]:
    budget = config.discovery.budget
    base = next((m.curve.attempts_to(HALF) for m in methods if m.name == BEST_OF_K), None)
    return {
        "name": config.name,
        "budget": budget,
        "attempts_per_step": config.rollout.attempts_per_prompt,
        "confidence": CONFIDENCE,
        "methods": {m.name: _numbers(m, budget, base) for m in methods},
        "trials": [
            {
                "method": m.name,
                "question": trial.question.id,
                "seed": trial.id.seed,
                "attempts": trial.attempts,
                "successes": trial.successes,
                "first_success": trial.first_success,
            }
            for m in methods
            for trial in m.trials
        ],
    }


def _numbers(method: Method, budget: int, base: int | None) -> dict[str, Any]:
    curve, half = method.curve, method.curve.attempts_to(HALF)
    drawn = drawn_at(budget)
    return {
        "trials": len(method.trials),
        "planned": method.planned,
        "questions": len(method.found),
        "discovery_at": {str(k): round(float(curve.mean[k - 1]), 4) for k in shown_at(budget)},
        "interval_at": {
            str(k): [round(float(curve.low[k - 1]), 4), round(float(curve.high[k - 1]), 4)] for k in shown_at(budget)
        },
        "attempts_to_half": half,
        "fewer_than_best_of_k": None if half is None or base is None else round(base / half, 2),
        "mean_attempts": round(mean_attempts(curve.mean), 2),
        "curve": {
            "k": drawn,
            "discovery": [round(float(curve.mean[k - 1]), 4) for k in drawn],
            "low": [round(float(curve.low[k - 1]), 4) for k in drawn],
            "high": [round(float(curve.high[k - 1]), 4) for k in drawn],
        },
    }


def _question_rows(questions: Sequence[Question], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """One row a question: for each method what its trials found, in the order of their seeds."""
    rows = []
    for place, question in enumerate(questions):
        cells = []
        for method in methods:
            own = [trial for trial in method.trials if trial.id.question == place]
            if method.name == BEST_OF_K:
                cells.append(", ".join(f"{t.successes} of {t.attempts}" for t in own))
            else:
                cells.append(", ".join("none" if t.first_success is None else str(t.first_success) for t in own))
        rows.append({"question": question, "cells": cells})
    return rows


def _words(name: str) -> str:
    """``multi_turn-3`` -> ``multi-turn, memory 3``"""
    return {SDPO: "SDPO", BEST_OF_K: "best of k"}.get(name, name.replace("multi_turn-", "multi-turn, memory "))


def _figure(methods: Sequence[Method], budget: int) -> Figure:
    figure = Figure(figsize=(8.2, 4.8), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    ax = figure.subplots()
    # The same colour for a method whatever others there are.
    order = [SDPO, BEST_OF_K, *sorted({m.name for m in methods} - {SDPO, BEST_OF_K})]
    for method in methods:
        colour = COLOURS[order.index(method.name) % len(COLOURS)]
        ks = method.curve.changes()
        mean, low, high = (
            [float(c[k - 1]) for k in ks] for c in (method.curve.mean, method.curve.low, method.curve.high)
        )
        ax.plot(ks, mean, color=colour, label=_words(method.name), drawstyle="steps-post")
        ax.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0, step="post")
    ax.axhline(HALF, color=COLOURS[6], linewidth=0.8, linestyle=":")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(1, budget)
    ax.set_ylim(-0.02, 1.02)
    ax.set_title("discovery@k: at least one of the first k attempts is correct")
    ax.set_xlabel("attempts at the question, k")
    ax.legend(loc="upper left")
    return figure
