"""Everything that can be refused before a process is started or a file is written."""

import os
from pathlib import Path

from megatron_sdpo import config as configuration
from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.rollout.fleet import check_ports
from megatron_sdpo.rollout.prompts import PromptStream, check_lengths
from megatron_sdpo.tasks import load_task
from megatron_sdpo.teacher_context import check_templates

MODEL_FAMILIES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen2ForCausalLM")


def check_run(config: Config) -> None:
    """Refuse a run that cannot work, with one sentence (ConfigError); reads files, starts nothing, writes nothing."""
    configuration.check(config)
    model = configuration.read_model_config(config)
    configuration.check_model(config, model)
    tokens = Chat(config.model.path)
    if tokens.vocab_size > model["vocab_size"]:
        raise ConfigError(
            f"the tokenizer of {config.model.path} has {tokens.vocab_size} ids, its model only {model['vocab_size']}"
        )
    check_templates(config.teacher_context)
    task = load_task(config.task.name, **config.task.options)
    PromptStream(task.train_questions(), config.rollout.prompts_per_step, config.seed)
    if config.evaluation.every and not task.eval_questions():
        raise ConfigError("the task has no held-out questions; set evaluation.every=0")
    questions = [*task.train_questions(), *task.eval_questions()]
    check_lengths(questions, tokens, config.rollout.max_new_tokens, config.model.max_length)
    check_ports(config)
    _check_run_dir(Path(config.run_dir))


def _check_run_dir(path: Path) -> None:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"run_dir {path} cannot be written; set another run_dir")
