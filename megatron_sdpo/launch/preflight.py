"""Everything that can be refused before a process is started or a file is written."""

import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sdpo import config as configuration
from megatron_sdpo import fp8_format
from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config, ConfigError, Fp8Config
from megatron_sdpo.hf_config import check_model, read_model_config
from megatron_sdpo.launch.local import gpus_of_torch
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.weight_files import count_weights
from megatron_sdpo.rollout.fleet import check_ports
from megatron_sdpo.rollout.journal import Journal
from megatron_sdpo.rollout.prompts import PromptStream, check_lengths
from megatron_sdpo.sandbox import check_sandbox, say_uneven_workers
from megatron_sdpo.tasks import load_task
from megatron_sdpo.teacher_context import check_templates
from megatron_sdpo.tracking import check_trackers
from megatron_sdpo.types import Question, Task, Verdict

BYTES_A_WEIGHT = 12
"""Of a checkpoint: the fp32 weight and AdamW's two moments; a teacher is 4 more."""


def check_run(config: Config, must_evaluate: bool = False) -> None:
    """Refuse a run that cannot work, with one sentence (ConfigError); reads files, writes nothing, starts nothing
    but a sandbox where the task executes programs.

    ``must_evaluate``: only held-out questions are needed, whatever ``evaluation.every`` says.
    """
    configuration.check(config)
    has_trainer = not (must_evaluate or config.debug.rollout_only)
    model, tokens = _read_model(config, has_trainer)
    check_model(config, model)
    check_fp8(config.fp8)
    check_trackers(config.tracking)
    _check_teacher_length(config, model)
    check_templates(config.teacher_context)
    task = load_task(config.task.name, **config.task.options)
    if config.debug.from_journal is None:
        check_sandbox(task, config.sandbox)
        say_uneven_workers(task, config.sandbox, config.rollout.verify_workers)
    if not must_evaluate:
        PromptStream(task.train_questions(), config.rollout.prompts_per_step, config.seed)
    if not task.eval_questions() and (must_evaluate or config.evaluation.every):
        hint = "" if must_evaluate else "; set evaluation.every=0"
        raise ConfigError(f"the task {config.task.name!r} has no held-out questions{hint}")
    questions = [*task.train_questions(), *task.eval_questions()]
    check_verdict(task, config.task.name, questions)
    check_lengths(questions, tokens, config.rollout.max_new_tokens, config.model.max_length)
    if config.debug.from_journal is None:
        check_ports(config)
    else:
        check_journal(config, Path(config.debug.from_journal))
    _check_run_dir(Path(config.run_dir), checkpoint_bytes(config) if has_trainer else 0)


def check_verdict(task: Task, name: str, questions: Sequence[Question]) -> None:
    """Refuse a user's own task that does not judge the empty answer, as any answer may be; before engines have started.

    One that executes programs is left to the run, where its sandboxes are.
    """
    if ":" not in name or hasattr(task, "use_sandbox") or not questions:
        return
    try:
        verdict = task.verify(questions[0], "")
    except Exception as error:  # a user's verifier may fail in any way; the cause stays attached
        raise ConfigError(f"task {name!r} fails on an empty answer to {questions[0].id!r}: {error!r}") from error
    if not isinstance(verdict, Verdict):
        raise ConfigError(f"verify of task {name!r} returned {verdict!r}; it must return a Verdict(reward, feedback)")
    if not 0.0 <= verdict.reward <= 1.0:
        raise ConfigError(f"verify of task {name!r} gave the reward {verdict.reward}; a reward lies in [0, 1]")


def checkpoint_bytes(config: Config) -> int:
    """Of one checkpoint of the trainer's."""
    teacher = 4 if config.objective.has_teacher and config.teacher.kind != "live" else 0
    return count_weights(Path(config.model.path)) * (BYTES_A_WEIGHT + teacher)


def check_fp8(fp8: Fp8Config) -> None:
    """Refuse FP8 that nothing here computes; the trainer asks the hardware itself (mcore/fp8.py)."""
    if fp8.kinds and fp8.kinds != ("emulated",) and importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            f"fp8 {fp8.kinds[0]} needs Transformer Engine, which is not installed; install the extra gpu on a machine"
            " with a Hopper GPU, set fp8.student and fp8.teacher to off, or, for tests, to emulated"
        )


def check_journal(config: Config, folder: Path) -> None:
    """Refuse a journal that does not hold every step of the run, whole."""
    if not folder.is_dir():
        raise ConfigError(f"debug.from_journal {folder} is not a directory; set it to the attempts/ of a run")
    found, wanted = Journal(folder).counts(0), config.rollout.prompts_per_step
    short = [step for step in range(config.steps) if found.get(step, 0) != wanted]
    if short:
        raise ConfigError(
            f"the journal {folder} has {found.get(short[0], 0)} groups of step {short[0]}, not"
            f" rollout.prompts_per_step {wanted}; set steps={short[0]}, or rollout.prompts_per_step to what it holds"
        )


def check_replay(run_dir: RunDir, config: Config, journal: Path, step: int) -> None:
    """Refuse a step of which neither the journal nor a failure has the batch."""
    if step < 0 or step >= config.steps:
        raise ConfigError(f"the run has steps 0 to {config.steps - 1}, not {step}; set --step to one of them")
    found = Journal(journal).counts(step).get(step, 0) if journal.is_dir() else 0
    wanted = config.rollout.prompts_per_step
    if found != wanted and not run_dir.failure(step).exists():
        raise ConfigError(
            f"{journal} has {found} of {wanted} groups of step {step}, and {run_dir.failures} nothing of it; set --step"
            " to one that was sampled"
        )


def check_engines(config: Config) -> None:
    """The same for engines alone, which answer whatever is asked."""
    configuration.check(config)
    model, _ = _read_model(config, has_trainer=False)
    fp8_format.check_engines(config, model)
    check_ports(config)
    _check_run_dir(Path(config.run_dir))


def _read_model(config: Config, has_trainer: bool) -> tuple[dict[str, Any], Chat]:
    """Without a trainer engines serve the weights of ``model.path``, which may then be in FP8."""
    model, tokens = read_model_config(config, fp8=not has_trainer), Chat(config.model.path, config.model.thinking)
    count_weights(Path(config.model.path))
    if not has_trainer:
        fp8_format.check_engines_alone(config, model)
    fp8_format.check_device(config, model, has_gpu=gpus_of_torch() > 0)
    if tokens.vocab_size > model["vocab_size"]:
        raise ConfigError(
            f"the tokenizer of {config.model.path} has {tokens.vocab_size} ids, its model only {model['vocab_size']}"
        )
    return model, tokens


def _check_teacher_length(config: Config, model: dict[str, Any]) -> None:
    prompt, response = config.teacher_context.max_prompt_tokens, config.rollout.max_new_tokens
    positions = model["max_position_embeddings"]
    if config.objective.has_teacher and prompt + response > positions:
        raise ConfigError(
            f"teacher_context.max_prompt_tokens {prompt} with rollout.max_new_tokens {response} is beyond the model's"
            f" {positions} positions; lower teacher_context.max_prompt_tokens to {positions - response} or less"
        )


def _check_run_dir(path: Path, checkpoint: int = 0) -> None:
    """``checkpoint``: bytes of one, for which there must be room."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"run_dir {path} cannot be written; set another run_dir")
    disk = shutil.disk_usage(existing)
    if disk.total and disk.free < checkpoint:  # some file systems do not tell, and have no size either
        raise ConfigError(
            f"run_dir {path} has {disk.free / 1e9:.3g} GB free, and one checkpoint takes {checkpoint / 1e9:.3g} GB;"
            " make room or set another run_dir"
        )
