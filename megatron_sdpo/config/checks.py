"""What values may be, alone and together, whatever the model is."""

import math
from operator import attrgetter

from megatron_sdpo.config.fp8_checks import check_fp8
from megatron_sdpo.config.objective_checks import check_objective
from megatron_sdpo.config.sandbox import SandboxConfig
from megatron_sdpo.config.sharing import check_sharing
from megatron_sdpo.config.training import LayoutConfig
from megatron_sdpo.config.tree import Config, ConfigError, DebugConfig, TeacherContextConfig

_AT_LEAST = {
    2: ("publish.probe_tokens",),
    1: (
        *("steps", "model.max_length", "optim.mini_batches", "objective.top_k", "publish.bucket_bytes"),
        *("layout.tensor_parallel", "layout.pipeline_parallel", "layout.world_size", "layout.tokens_per_micro_batch"),
        *("layout.virtual_pipeline", "layout.context_parallel", "layout.recompute_num_layers"),
        *("layout.expert_parallel", "layout.expert_tensor_parallel"),
        *("layout.head_chunk_tokens", "layout.overlap_bucket_elements"),
        *("engine.count", "engine.tensor_parallel", "engine.max_running_requests", "engine.max_total_tokens"),
        *("rollout.prompts_per_step", "rollout.attempts_per_prompt", "rollout.max_new_tokens"),
        *("sandbox.workers", "sandbox.limits.processes", "sandbox.limits.source_bytes"),
        *("rollout.verify_workers", "teacher_context.max_prompt_tokens"),
        *(
            "checkpoint.every",
            "checkpoint.keep",
            "checkpoint.keep_every",
            "evaluation.attempts",
            "evaluation.questions",
        ),
        *("guard.reward_window", "guard.accuracy_window", "spikes.window", "spikes.patience"),
        "ranks.slow_steps",
        *("discovery.questions", "discovery.seeds", "discovery.budget", "discovery.best_of_k_samples"),
    ),
    0: (
        *("sandbox.warm", "engine.port", "rollout.max_staleness", "evaluation.every", "evaluation.temperature"),
        *("optim.lr", "optim.warmup_steps", "optim.weight_decay", "optim.clip_grad"),
        *("fp8.high_precision_layers", "fp8.floor_limit"),
        *("objective.teacher_confidence_beta", "objective.kl_coefficient"),
    ),
}
_ABOVE_0 = (
    *("sandbox.limits.cpu_s", "sandbox.limits.wall_s"),
    *("rollout.temperature", "engine.start_timeout_s", "engine.request_timeout_s", "publish.timeout_s", "optim.eps"),
    "engine.hang_timeout_s",
    *("publish.probe_tolerance", "objective.policy_drift_clip", "objective.engine_mismatch_cap"),
    *("objective.stop_at_saturation", "objective.advantage_clip", "ranks.timeout_s", "ranks.slow_share"),
    "evaluation.top_p",
)
_FROM_0_TO_1 = (
    "objective.alpha",
    "objective.grpo_share",
    "teacher.update_rate",
    "teacher.mixture",
    "optim.min_lr_ratio",
    "guard.drop",
    "guard.damping",
    "evaluation.top_p",
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
    _check_sandbox(config.sandbox)
    _check_layout(layout)
    _check_recompute(layout)
    check_fp8(config)
    check_sharing(config)
    if engine.port + engine.count > 65535:
        raise ConfigError(f"engine.port is {engine.port}; it and the {engine.count} after it must be below 65536")
    if config.deterministic and config.rollout.max_staleness:
        raise ConfigError(
            f"rollout.max_staleness is {config.rollout.max_staleness}, so which weights an attempt comes from depends"
            " on how fast things go; set rollout.max_staleness=0 or deterministic=false"
        )
    if config.debug.from_journal is not None and config.debug.rollout_only:
        raise ConfigError("debug.from_journal and debug.rollout_only leave nothing to do; set one of them")
    if (config.debug.from_journal is not None or config.debug.rollout_only) and config.evaluation.every:
        raise ConfigError("half of a run evaluates nothing; set evaluation.every=0")
    _check_profile(config)
    checkpoint = config.checkpoint
    if checkpoint.keep_every is not None and checkpoint.keep_every % checkpoint.every:
        raise ConfigError(
            f"checkpoint.keep_every {checkpoint.keep_every} is not a multiple of checkpoint.every {checkpoint.every},"
            f" so hardly any checkpoint would be kept; set it to {checkpoint.every} or a multiple"
        )
    if engine.count > 1 and engine.hang_timeout_s >= config.publish.timeout_s:
        raise ConfigError(
            f"engine.hang_timeout_s is {engine.hang_timeout_s:g}: an engine that hangs while it is sent weights would"
            f" end the run before it is replaced; set it below publish.timeout_s {config.publish.timeout_s:g}"
        )
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
    if config.teacher.placement != "swapped" and config.teacher.kind == "live" and not config.objective.kl_coefficient:
        raise ConfigError(
            f"teacher.placement={config.teacher.placement} places weights that a teacher of kind live has not; leave"
            " teacher.placement out"
        )
    if config.teacher.kind == "trust_region" and config.objective.support == "vocabulary":
        raise ConfigError(
            "a trust-region teacher mixes two models, of which objective.support=vocabulary could keep one;"
            " set objective.support=top_k"
        )
    check_objective(config.objective)
    _check_teacher_context(config.teacher_context)
    if config.objective.has_teacher:
        _check_somebody_teaches(config)
    _check_guard(config)
    if config.spikes.factor <= 1.0:
        raise ConfigError(f"spikes.factor is {config.spikes.factor:g}; it multiplies a usual norm, set it above 1")


def _check_sandbox(sandbox: SandboxConfig) -> None:
    """Refuse limits under which no program runs, and a service without an address."""
    limits, least = sandbox.limits, {"memory_bytes": 64 * 2**20, "file_bytes": 2**16, "output_bytes": 2**10}
    for name, size in least.items():
        if getattr(limits, name) < size:
            raise ConfigError(f"sandbox.limits.{name} is {getattr(limits, name)}; set it to {size} or more")
    if limits.wall_s < limits.cpu_s:
        raise ConfigError(
            f"sandbox.limits.wall_s {limits.wall_s:g} ends programs before sandbox.limits.cpu_s {limits.cpu_s:g} can;"
            " set it to several times as much, so that a busy machine changes no verdict"
        )
    remote = sandbox.backend == "remote"
    if remote and not (sandbox.url and sandbox.token_file):
        raise ConfigError(
            "sandbox.backend=remote needs the service's address and token; set sandbox.url and .token_file"
        )
    if not remote and (sandbox.url or sandbox.token_file):
        raise ConfigError("sandbox.url and .token_file name a service; set sandbox.backend=remote, or leave them out")


def _check_layout(layout: LayoutConfig) -> None:
    """Refuse sizes that make no whole number of model copies, and switches that need another."""
    sizes = ("tensor_parallel", "pipeline_parallel", "context_parallel")
    copy = math.prod(getattr(layout, size) for size in sizes)
    if layout.world_size % copy:
        raise ConfigError(
            f"layout.world_size {layout.world_size} is not a multiple of {' * '.join(sizes)} = {copy}; set it to {copy}"
            " or a multiple"
        )
    if layout.sequence_parallel and layout.tensor_parallel == 1:
        raise ConfigError(
            "layout.sequence_parallel divides tokens over tensor ranks, but layout.tensor_parallel is 1; set it to 2 or"
            " more, or layout.sequence_parallel=false"
        )
    if layout.virtual_pipeline > 1 and layout.pipeline_parallel == 1:
        raise ConfigError(
            f"layout.virtual_pipeline {layout.virtual_pipeline} cuts the stages of a pipeline, but"
            " layout.pipeline_parallel is 1; set it to 2 or more, or layout.virtual_pipeline=1"
        )
    if layout.share_prefixes in ("teacher", "scoring") and layout.context_parallel > 1:
        raise ConfigError(
            f"layout.share_prefixes={layout.share_prefixes} packs sequences in pieces, but layout.context_parallel"
            f" {layout.context_parallel} divides whole ones; set layout.share_prefixes=off"
        )
    if layout.overlap_param_gather and not (layout.distributed_optimizer and layout.overlap_grad_reduce):
        raise ConfigError(
            "layout.overlap_param_gather gathers what a distributed optimizer divides, and needs the gradients to"
            " overlap too; set layout.distributed_optimizer=true and layout.overlap_grad_reduce=true"
        )
    _check_experts(layout)


def _check_experts(layout: LayoutConfig) -> None:
    """Refuse experts that the ranks of a stage cannot hold, and slices that would be summed wrongly."""
    stage, tensor = layout.world_size // layout.pipeline_parallel, layout.expert_tensor
    if stage % (layout.expert_parallel * tensor):
        slices = f" with {tensor} slices of each expert" if tensor > 1 else ""
        raise ConfigError(
            f"layout.expert_parallel {layout.expert_parallel}{slices} does not divide the {stage} ranks of a pipeline"
            f" stage; set layout.world_size to a multiple of"
            f" {layout.pipeline_parallel * layout.expert_parallel * tensor}, or a smaller layout.expert_parallel"
        )
    if tensor == layout.tensor_parallel:
        return
    if tensor != 1:
        raise ConfigError(
            f"layout.expert_tensor_parallel is {tensor}; it must be 1 or layout.tensor_parallel"
            f" {layout.tensor_parallel}"
        )
    if not layout.sequence_parallel:
        raise ConfigError(
            "layout.expert_tensor_parallel=1 lets tensor ranks send their tokens to whole experts, but without"
            " layout.sequence_parallel they all have the same tokens; set layout.sequence_parallel=true"
        )
    if layout.expert_parallel == 1:
        raise ConfigError(
            "layout.expert_tensor_parallel=1 makes tensor ranks hold different experts, but layout.expert_parallel is"
            f" 1; set layout.expert_parallel={layout.tensor_parallel}, or layout.expert_tensor_parallel=none"
        )


def _check_recompute(layout: LayoutConfig) -> None:
    """Refuse settings of a recomputation that is not asked for, and what Megatron cannot divide."""
    unused = LayoutConfig()
    of_kind = {
        "selective": ("recompute_modules",),
        "full": ("recompute_method", "recompute_num_layers", "distribute_saved_activations"),
    }
    for kind, keys in of_kind.items():
        for key in keys:
            if layout.recompute != kind and getattr(layout, key) != getattr(unused, key):
                raise ConfigError(
                    f"layout.{key} is for layout.recompute={kind}, but that is {layout.recompute}; set"
                    f" layout.recompute={kind} or leave layout.{key} out"
                )
    modules = layout.recompute_modules
    if layout.recompute == "selective" and (not modules or len(set(modules)) < len(modules)):
        raise ConfigError(
            f"layout.recompute_modules is {list(modules)}; name one or more parts, each once, or set"
            " layout.recompute=none"
        )
    if layout.distribute_saved_activations and (layout.sequence_parallel or layout.tensor_parallel == 1):
        why = "divides them already" if layout.sequence_parallel else "has nobody to divide them with"
        held = "layout.sequence_parallel" if layout.sequence_parallel else "layout.tensor_parallel 1"
        raise ConfigError(
            f"layout.distribute_saved_activations divides activations over tensor ranks, but {held} {why};"
            " set layout.distribute_saved_activations=false"
        )


def _check_profile(config: Config) -> None:
    """Refuse to profile what never runs."""
    debug = config.debug
    for key, last, what in (
        ("profile_steps", config.steps - 1, f"steps {config.steps}"),
        ("profile_ranks", config.layout.world_size - 1, f"layout.world_size {config.layout.world_size}"),
    ):
        beyond = [number for number in getattr(debug, key) if not 0 <= number <= last]
        if beyond and debug.profile_steps:
            raise ConfigError(f"debug.{key} names {beyond[0]}, but with {what} there are 0 to {last}")
    if debug.profile_steps and (debug.rollout_only or not debug.profile_ranks):
        why = "debug.rollout_only has no trainer" if debug.rollout_only else "debug.profile_ranks is empty"
        raise ConfigError(f"debug.profile_steps profiles trainer ranks, but {why}; leave debug.profile_steps out")


def _check_teacher_context(context: TeacherContextConfig) -> None:
    """Refuse choices about a section that is never shown."""
    if not context.demonstrations and context.demonstration != "first":
        raise ConfigError(
            f"teacher_context.demonstration={context.demonstration} chooses among demonstrations, which"
            " teacher_context.demonstrations=false leaves out; set the one to first or the other to true"
        )
    shown = {"shorten_feedback": context.feedback != "never", "shorten_demonstration": context.demonstrations}
    if not shown.get(context.too_long, True):
        raise ConfigError(
            f"teacher_context.too_long={context.too_long} cuts a section that is never shown; set"
            " teacher_context.too_long to shorten or drop"
        )


def _check_somebody_teaches(config: Config) -> None:
    """Refuse a run in which no attempt could ever have a teacher context."""
    context = config.teacher_context
    alone = config.rollout.attempts_per_prompt == 1 and context.exclude_own_success
    if context.feedback == "never" and (alone or not context.demonstrations):
        why = "its one attempt has no sibling" if alone else "teacher_context.demonstrations=false shows no solution"
        raise ConfigError(
            f"with teacher_context.feedback=never the teacher reads no feedback, and {why}: it would know no more than"
            " the student; set teacher_context.feedback=without_solution"
        )


def _check_guard(config: Config) -> None:
    """Refuse to watch what is not there."""
    signal = config.guard.signal
    if signal in ("reward", "both") and config.objective.kind == "next_token":
        raise ConfigError(f"guard.signal={signal} watches rewards, which kind next_token has not; set guard.signal=off")
    if signal in ("accuracy", "both") and not config.evaluation.every:
        raise ConfigError(
            f"guard.signal={signal} watches the held-out accuracy, which evaluation.every=0 never measures;"
            " set evaluation.every to 1 or more"
        )


def check_discovery(config: Config) -> None:
    """Refuse what ``discover`` cannot work with, besides what ``check`` refuses."""
    discovery, rollout = config.discovery, config.rollout
    if config.deterministic:
        raise ConfigError("trials are not sampled by seed; set deterministic=false")
    if config.debug != DebugConfig():
        raise ConfigError("the debug.* settings are for train; leave them out")
    if not discovery.methods:
        raise ConfigError("discovery.methods is empty; name one or more of best_of_k, multi_turn, sdpo")
    if len(set(discovery.methods)) < len(discovery.methods):
        raise ConfigError(f"discovery.methods {','.join(discovery.methods)} names one twice; name each once")
    if discovery.budget % rollout.attempts_per_prompt:
        raise ConfigError(
            f"discovery.budget {discovery.budget} is not a multiple of rollout.attempts_per_prompt"
            f" {rollout.attempts_per_prompt}; set a multiple"
        )
    if "best_of_k" in discovery.methods and discovery.best_of_k_samples < discovery.budget:
        raise ConfigError(
            f"discovery.best_of_k_samples {discovery.best_of_k_samples} cannot tell what discovery.budget"
            f" {discovery.budget} attempts find; set it to {discovery.budget} or more"
        )
    if "multi_turn" in discovery.methods:
        memory = discovery.multi_turn_memory
        if not memory or min(memory) < 1 or len(set(memory)) < len(memory):
            raise ConfigError(
                f"discovery.multi_turn_memory is {list(memory)}; give one or more different numbers from 1 upwards"
            )
    if "sdpo" in discovery.methods:
        _check_learns_alone(config)


def _check_learns_alone(config: Config) -> None:
    """A trial by sdpo learns from each group before it samples the next, and from feedback alone."""
    if not config.objective.has_teacher:
        raise ConfigError(
            f"objective.kind={config.objective.kind} learns nothing before the first success, at which a trial ends;"
            " set objective.kind to sdpo or hybrid"
        )
    if config.teacher_context.feedback == "never":
        raise ConfigError(
            "before the first success there is no demonstration, so with teacher_context.feedback=never a trial learns"
            " nothing; set teacher_context.feedback=without_solution"
        )
    if config.rollout.max_staleness:
        raise ConfigError(
            f"rollout.max_staleness is {config.rollout.max_staleness}, but a trial trains on each group before it"
            " samples the next; set rollout.max_staleness=0"
        )
