"""The configuration tree: frozen dataclasses, each default in one place, no torch.

A recipe (recipes/) returns a complete ``Config``; ``apply_overrides`` changes fields by dotted
name; ``check`` refuses what cannot work before anything is started; the resolved tree is saved as
``config.json`` in the run directory. Every refusal is a ``ConfigError`` with one sentence that says
what was wrong and what to set.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec


class ConfigError(ValueError):
    """The user asked for something that cannot work; the message is one sentence for the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model is trained."""

    path: str
    """Hugging Face directory: config.json, *.safetensors, tokenizer files."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameter and activation dtype of trainer and engine; master weights are fp32 in any case."""
    max_length: int = 8192
    """Longest sequence, prompt and response together, that trainer and engine must hold; tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """Which questions are asked."""

    name: str
    """A name known to tasks.load_task."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutConfig:
    """How the model is cut over trainer ranks; data parallel is what remains of the world size."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    world_size: int = 1
    """Trainer ranks in all: a multiple of tensor_parallel * pipeline_parallel."""
    tokens_per_micro_batch: int = 8192
    """Packed tokens of a micro-batch; a sequence longer than this has a micro-batch of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The SGLang fleet."""

    count: int = 1
    """Engines; two or more are put behind sglang-router."""
    tensor_parallel: int = 1
    host: str = "127.0.0.1"
    """Address that engines bind to: loopback, or this node's address in the job's network."""
    port: int = 0
    """First port; 0 takes free ones."""
    max_running_requests: int = 256
    max_total_tokens: int | None = None
    """Size of the KV cache in tokens; None lets SGLang choose from free memory (GPU only)."""
    start_timeout_s: float = 600.0
    request_timeout_s: float = 600.0
    extra_args: tuple[str, ...] = ()
    """Passed to SGLang as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """What the coordinator asks of the engines for one step."""

    prompts_per_step: int = 32
    attempts_per_prompt: int = 8
    max_new_tokens: int = 8192
    temperature: float = 1.0
    max_staleness: int = 0
    """Steps that generation may run ahead of training; 0 is synchronous and on-policy."""
    verify_workers: int = 2
    """Threads that judge attempts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherContextConfig:
    """Who demonstrates and which feedback the teacher reads (paper section 3, table 2)."""

    success_threshold: float = 0.5
    """An attempt with at least this reward may demonstrate."""
    demonstrations: bool = True
    exclude_own_success: bool = True
    """An attempt never demonstrates to itself."""
    remove_thinking: bool = True
    """Drop <think>...</think> from a demonstration."""
    feedback: Literal["without_solution", "always", "never"] = "without_solution"
    template: str = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n"
    solution_template: str = "\nCorrect solution:\n\n{solution}\n\n"
    feedback_template: str = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback}\n\n"
    max_prompt_tokens: int = 10240
    """Longest teacher prompt; a longer one is treated by ``too_long``."""
    too_long: Literal["drop", "shorten", "fail"] = "shorten"
    """shorten cuts feedback, then demonstration, in the middle; the question and the frame never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """Whose weights teach (paper table 4)."""

    kind: Literal["ema", "frozen", "live", "trust_region"] = "ema"
    """trust_region: the initial and the current weights each read the context, and their logits are mixed."""
    update_rate: float = 0.05
    """ema: new = (1 - rate) * teacher + rate * student, fp32."""
    update_every: Literal["generation_batch", "optimizer_step"] = "generation_batch"
    """ema: when it follows. A batch is scored before its first optimizer step in either case."""
    mixture: float = 0.01
    """trust_region: logits = (1 - mixture) * initial + mixture * current (paper eq. 10)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What is minimised."""

    kind: Literal["sdpo", "grpo", "next_token", "hybrid"] = "sdpo"
    """hybrid is ``grpo_share`` times GRPO's loss plus the rest times SDPO's (paper eq. 3)."""
    grpo_share: float = 0.9
    """hybrid: the paper's lambda."""
    alpha: float = 0.5
    """0: KL(teacher||student), 1: KL(student||teacher), between: generalised JSD."""
    support: Literal["top_k", "vocabulary", "sampled"] = "top_k"
    """Where student and teacher are compared: at the student's most probable tokens; at every token, for which
    the teacher's final hidden states are kept until training; or at the sampled token alone, which estimates
    the gradient of KL(student||teacher)."""
    top_k: int = 100
    """Student tokens kept per position; the rest of the vocabulary is one tail bin."""
    tail: bool = True
    """False renormalises the kept tokens on both sides instead of keeping a tail bin."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """token_mean: every unmasked response token weighs the same (paper eq. 12);
    sequence_mean: mean over all sequences of per-sequence token means (what the reference
    release executes with its shipped settings)."""
    masked_in_denominator: bool | None = None
    """Count samples without a teacher context in the denominator. None: as the aggregation's
    source does, token_mean no, sequence_mean yes."""
    credit: Literal["logit", "token", "sequence"] = "logit"
    """How finely SDPO's advantages log(teacher / student) differ (paper figure 10). logit: as the support has
    them; token: by the most probable token alone, as top_k 1; sequence: those of the sampled tokens, averaged
    to one for the whole response before the batch's first step."""
    advantage_clip: float | None = None
    """Bound of SDPO's advantages log(teacher / student) in the gradient of alpha 1; None switches it off."""
    advantage_clip_sides: Literal["one", "two"] = "one"
    """one: at most the bound; two: at least minus the bound, too."""
    sample_weighting: Literal["uniform", "failed_only", "teacher_confidence", "question_difficulty"] = "uniform"
    """failed_only: successful attempts have no target, as if without a teacher context;
    teacher_confidence: a token's distance to the teacher weighs exp(-teacher_confidence_beta * entropy of the
    teacher); question_difficulty: a question weighs sqrt(p (1 - p)), p its success rate, scaled to mean one
    over the questions of the batch. The two factors change no denominator."""
    teacher_confidence_beta: float = 1.0
    stop_at_saturation: float | None = None
    """Attempts at a question whose success rate in the batch is at least this have no target; None trains on all."""
    policy_drift_clip: float | None = 2.0
    """Cap of the detached weight pi_theta / pi_old on the sampled token; None switches it off."""
    engine_mismatch_cap: float | None = 2.0
    """Cap of the token importance weight pi_old / pi_engine (TIS); None switches it off."""
    advantage_std: bool = False
    """GRPO: divide the advantage by the group's standard deviation."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    """GRPO: ratio clip 1 - clip_low, 1 + clip_high."""
    dual_clip: float | None = 3.0
    """GRPO: bound of the loss for negative advantages; None switches it off."""
    kl_coefficient: float = 0.0
    """GRPO: weight of KL(policy || model at the start of the run), estimated at the sampled tokens."""

    @property
    def has_teacher(self) -> bool:
        """The teacher scores this kind's responses."""
        return self.kind in ("sdpo", "hybrid")

    @property
    def compares_rewards(self) -> bool:
        """The attempts of a group are compared by their rewards."""
        return self.kind in ("grpo", "hybrid")

    @property
    def kept_tokens(self) -> int:
        """Student tokens kept per position."""
        return 1 if self.credit == "token" else self.top_k

    @property
    def teacher_columns(self) -> int:
        """Log-probs that the teacher gives at each response token."""
        return 1 if self.support == "sampled" else self.kept_tokens + 1

    @property
    def advantage_bounds(self) -> tuple[float, float] | None:
        """Least and greatest SDPO advantage."""
        if self.advantage_clip is None:
            return None
        return (-self.advantage_clip if self.advantage_clip_sides == "two" else -math.inf), self.advantage_clip


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW."""

    lr: float = 1e-5
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up, from lr to lr * min_lr_ratio at the last step."""
    min_lr_ratio: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0
    mini_batches: int = 1
    """Optimizer steps per generation batch; samples are dealt to them at random by seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishConfig:
    """How trained weights reach the engines."""

    bucket_bytes: int = 512 * 1024 * 1024
    """Tensors are sent in buckets of about this size."""
    probe_tokens: int = 32
    """Length of the fixed probe whose log-probs trainer and engine compare after every publish."""
    probe_tolerance: float = 1e-4
    """Largest accepted difference of a probe log-prob; natural log. bf16 needs about 0.15."""
    timeout_s: float = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the trainer's state is written."""

    every: int = 10
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out questions, plain (no teacher context)."""

    every: int = 5
    """Steps between evaluations; 0 evaluates never, otherwise the first and the last version too."""
    questions: int | None = None
    """How many of the task's held-out questions; None takes all."""
    attempts: int = 4
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where numbers go besides metrics.jsonl and the console."""

    tensorboard: bool = False
    wandb_project: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run."""

    name: str
    run_dir: str
    """Everything the run writes; the same directory resumes."""
    steps: int
    """Generation batches."""
    seed: int = 0
    model: ModelConfig
    task: TaskConfig
    layout: LayoutConfig = LayoutConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    teacher_context: TeacherContextConfig = TeacherContextConfig()
    teacher: TeacherConfig = TeacherConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    publish: PublishConfig = PublishConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()


def fields_by_name(kind: type = Config, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (type, default) of every leaf; a default is ``dataclasses.MISSING`` when there is none."""
    leaves: dict[str, tuple[Any, Any]] = {}
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            leaves |= fields_by_name(hints[f.name], f"{prefix}{f.name}.")  # pyright: ignore[reportArgumentType]
        else:
            default = f.default
            if f.default_factory is not dataclasses.MISSING:
                default = f.default_factory()
            leaves[prefix + f.name] = (hints[f.name], default)
    return leaves


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """``["optim.lr=1e-3", "task.options.hint=false"]`` -> a changed copy; values are read as JSON, else as text."""
    leaves = fields_by_name()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} has no '='; write it as section.key=value")
        options = key.startswith("task.options.") and len(key) > len("task.options.")
        if key not in leaves and not options:
            near = difflib.get_close_matches(key, leaves, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else "; `megatron-sdpo train --help` lists the keys"
            raise ConfigError(f"unknown configuration key {key!r}{hint}")
        value = _literal(text)
        if options:
            name = key.removeprefix("task.options.")
            key, value = "task.options", {**config.task.options, name: value}
        config = _replace(config, key.split("."), _read(key, value, text, leaves[key][0]))
    return config


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # besides what is no JSON: numbers and nesting beyond all use
        return {"none": None, "true": True, "false": False}.get(text.lower(), text)


def _read(key: str, value: Any, text: str, kind: Any) -> Any:
    """The value of an override, or its text where text is wanted and the value looked like JSON: name=7."""
    try:
        return _convert(key, value, kind)
    except ConfigError:
        if not isinstance(value, str) and kind in (str, str | None):
            return text
        raise


def _convert(key: str, value: Any, kind: Any) -> Any:
    try:
        converted = msgspec.convert(value, type=kind)
    except (msgspec.ValidationError, OverflowError) as error:
        raise ConfigError(f"{key}={value!r} does not fit: it must be {type_words(kind)}") from error
    if not _is_finite(converted):
        raise ConfigError(f"{key}={value!r} does not fit: numbers must be finite")
    return converted


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def type_words(kind: Any) -> str:
    """A type in the words of a help text or a refusal."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else type_words(a) for a in typing.get_args(kind))
    if origin in (dict, tuple):
        return "a JSON object" if origin is dict else "a JSON list"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))


T = TypeVar("T")


def _replace(node: T, path: Sequence[str], value: Any) -> T:
    head, *rest = path
    new = _replace(getattr(node, head), rest, value) if rest else value
    return dataclasses.replace(node, **{head: new})  # pyright: ignore[reportArgumentType]


def save(config: Config, path: Path) -> None:
    """Write the resolved tree as JSON, atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    temporary.replace(path)


def load(path: Path) -> Config:
    """The inverse of ``save``; unknown keys and wrong types are refused."""
    data = read_json(path, "the configuration")
    try:
        return _build(Config, data, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_json(path: Path, what: str) -> Any:
    """The value of a JSON file; ``what`` names it in a refusal."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON (line {error.lineno}: {error.msg})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text: {error}") from error


def _build(kind: type[T], data: Any, prefix: str) -> T:
    if not isinstance(data, dict):
        where = f"the section {prefix[:-1]!r}" if prefix else "the configuration"
        raise ConfigError(f"{where} is {str(data)[:40]!r}; it must be a JSON object")
    hints = typing.get_type_hints(kind)
    unknown = set(data) - set(hints)
    if unknown:
        raise ConfigError(f"unknown configuration key {prefix + min(unknown)!r}")
    values = {}
    for name, value in data.items():
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(hints[name], value, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
        else:
            values[name] = _convert(prefix + name, value, hints[name])
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"the configuration is not complete: {error}") from error


_AT_LEAST = {
    2: ("publish.probe_tokens",),
    1: (
        *("steps", "model.max_length", "optim.mini_batches", "objective.top_k", "publish.bucket_bytes"),
        *("layout.tensor_parallel", "layout.pipeline_parallel", "layout.world_size", "layout.tokens_per_micro_batch"),
        *("engine.count", "engine.tensor_parallel", "engine.max_running_requests", "engine.max_total_tokens"),
        *("rollout.prompts_per_step", "rollout.attempts_per_prompt", "rollout.max_new_tokens"),
        *("rollout.verify_workers", "teacher_context.max_prompt_tokens"),
        *("checkpoint.every", "checkpoint.keep", "evaluation.attempts", "evaluation.questions"),
    ),
    0: (
        *("engine.port", "rollout.max_staleness", "evaluation.every", "evaluation.temperature"),
        *("optim.lr", "optim.warmup_steps", "optim.weight_decay", "optim.clip_grad"),
        *("objective.teacher_confidence_beta", "objective.kl_coefficient"),
    ),
}
_ABOVE_0 = (
    *("rollout.temperature", "engine.start_timeout_s", "engine.request_timeout_s", "publish.timeout_s", "optim.eps"),
    *("publish.probe_tolerance", "objective.policy_drift_clip", "objective.engine_mismatch_cap"),
    *("objective.stop_at_saturation", "objective.advantage_clip"),
)
_FROM_0_TO_1 = (
    "objective.alpha",
    "objective.grpo_share",
    "teacher.update_rate",
    "teacher.mixture",
    "optim.min_lr_ratio",
)


def _check_ranges(config: Config) -> None:
    for least, keys in _AT_LEAST.items():
        for key in keys:
            value = attrgetter(key)(config)
            if value is not None and value < least:
                raise ConfigError(f"{key} is {value}; it must be at least {least}")
    for key in _ABOVE_0:
        value = attrgetter(key)(config)
        if value is not None and value <= 0:
            raise ConfigError(f"{key} is {value}; set it above 0")
    for key in _FROM_0_TO_1:
        if not 0.0 <= attrgetter(key)(config) <= 1.0:
            raise ConfigError(f"{key} is {attrgetter(key)(config)}; it must lie between 0 and 1")


def check(config: Config) -> None:
    """Refuse values that cannot work whatever the model is (``hf_config.check_model`` knows its sizes)."""
    _check_ranges(config)
    layout, engine = config.layout, config.engine
    for key in ("name", "run_dir", "model.path", "engine.host"):
        if not attrgetter(key)(config):
            raise ConfigError(f"{key} is empty; set it")
    model_parallel = layout.tensor_parallel * layout.pipeline_parallel
    if layout.world_size % model_parallel:
        raise ConfigError(
            f"layout.world_size {layout.world_size} is not a multiple of tensor_parallel * pipeline_parallel"
            f" = {model_parallel}; set it to {model_parallel} or a multiple"
        )
    if engine.port + engine.count > 65535:
        raise ConfigError(f"engine.port is {engine.port}; it and the {engine.count} after it must be below 65536")
    if engine.max_total_tokens is not None and engine.max_total_tokens < config.model.max_length:
        raise ConfigError(
            f"engine.max_total_tokens {engine.max_total_tokens} cannot hold one sequence of model.max_length"
            f" {config.model.max_length}; raise the one or lower the other"
        )
    if config.objective.compares_rewards and config.rollout.attempts_per_prompt < 2:
        raise ConfigError("GRPO compares attempts at one question; set rollout.attempts_per_prompt to 2 or more")
    if config.objective.sample_weighting == "question_difficulty" and config.rollout.attempts_per_prompt < 2:
        raise ConfigError(
            "a question's difficulty is known from several attempts; set rollout.attempts_per_prompt to 2 or more"
        )
    if config.teacher.update_every == "optimizer_step" and config.teacher.kind != "ema":
        raise ConfigError(
            f"a teacher of kind {config.teacher.kind} is never updated; set teacher.update_every=generation_batch or"
            " teacher.kind=ema"
        )
    if config.teacher.kind == "trust_region" and config.objective.support == "vocabulary":
        raise ConfigError(
            "a trust-region teacher mixes two models, of which objective.support=vocabulary could keep one;"
            " set objective.support=top_k"
        )
    _check_objective(config.objective)


def _check_objective(objective: ObjectiveConfig) -> None:
    """Refuse choices that contradict each other; those that the kind does not use are checked too."""
    if objective.support == "sampled" and objective.alpha != 1.0:
        raise ConfigError(
            f"objective.support=sampled estimates KL(student||teacher), but objective.alpha is {objective.alpha:g};"
            " set objective.alpha=1"
        )
    if objective.advantage_clip is not None and objective.alpha != 1.0:
        raise ConfigError(
            f"objective.advantage_clip bounds the advantages of KL(student||teacher), but objective.alpha is"
            f" {objective.alpha:g}; set objective.alpha=1 or objective.advantage_clip=none"
        )
    support = {"token": "top_k", "sequence": "sampled"}.get(objective.credit, objective.support)
    if objective.support != support:
        raise ConfigError(
            f"objective.credit={objective.credit} cannot be had at objective.support={objective.support};"
            f" set objective.support={support}"
        )
    if objective.kl_coefficient and not objective.compares_rewards:
        raise ConfigError(
            f"objective.kl_coefficient is part of GRPO's loss, which kind {objective.kind} has not;"
            " set objective.kl_coefficient=0"
        )
    weighting = objective.sample_weighting
    if weighting in ("failed_only", "teacher_confidence") and not objective.has_teacher:
        raise ConfigError(
            f"objective.sample_weighting={weighting} weighs what a teacher says, and kind {objective.kind} has none;"
            " set objective.kind to sdpo or hybrid"
        )
    if objective.kind == "next_token" and (weighting != "uniform" or objective.stop_at_saturation is not None):
        raise ConfigError(
            "kind next_token has no rewards to weigh by; set objective.sample_weighting=uniform and"
            " objective.stop_at_saturation=none"
        )
    if objective.stop_at_saturation is not None and objective.stop_at_saturation > 1.0:
        raise ConfigError(
            f"objective.stop_at_saturation is {objective.stop_at_saturation}; a success rate is at most 1"
        )
