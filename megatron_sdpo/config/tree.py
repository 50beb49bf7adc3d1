"""Every configuration key, its default, and what it means; those of the trainer's ranks are in training.py."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_sdpo.config.sandbox import SandboxConfig
from megatron_sdpo.config.training import (
    CheckpointConfig,
    Fp8Config,
    GuardConfig,
    LayoutConfig,
    OptimConfig,
    RanksConfig,
    SpikeConfig,
)


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
    thinking: bool = False
    """Handed to the chat template as enable_thinking; templates without a thinking mode ignore it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """Which questions are asked."""

    name: str
    """A name known to tasks.load_task."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The SGLang fleet."""

    count: int = 1
    """Engines; two or more are put behind sglang-router."""
    tensor_parallel: int = 1
    fp8: Literal["off", "blockwise"] = "off"
    """blockwise: the layers multiply in FP8 (E4M3, one fp32 scale for 128 x 128 of a weight and for 128 numbers of an
    activation). The trainer quantises what it publishes: half the bytes of bfloat16. Embedding, norms, router and head
    stay in model.dtype, and so do the layers of fp8.high_precision_layers. Whatever fp8.student is, importance weights
    (objective.engine_mismatch_cap) correct what remains between the two; least remains with fp8.student=blockwise (on
    a CPU emulated) and head_dim a multiple of 128, where both multiply by the same codes. Engines that no trainer
    publishes to (evaluate, serve, debug.rollout_only) need a model.path that is FP8 already (``convert --fp8``), and
    are then in FP8 whatever this says. bfloat16 on a GPU; a CPU computes the same numbers slowly, in any dtype. Not for
    Llama, whose scales SGLang (0.5.15, 0.5.21) leaves out."""
    host: str = "127.0.0.1"
    """Address that engines bind to: loopback, or this node's address in the job's network."""
    port: int = 0
    """First port; 0 takes free ones."""
    max_running_requests: int = 256
    max_total_tokens: int | None = None
    """Size of the KV cache in tokens; None lets SGLang choose from free memory (GPU only)."""
    start_timeout_s: float = 600.0
    request_timeout_s: float = 600.0
    hang_timeout_s: float = 180.0
    """An engine that gives no sign of life for so long hangs: it is killed, and replaced like one that has ended.
    Longer than a forward pass takes, a first one that compiles kernels included; weights that are being sent, and
    memory given back, do not count as silence. With several engines below publish.timeout_s, so that one which hangs in
    a weight update is left out of it."""
    release_memory: bool = False
    """While a batch is trained on, engines on the trainer's own GPUs give back what weights and KV cache hold; needs
    rollout.max_staleness=0. A CPU engine keeps it."""
    extra_args: tuple[str, ...] = ()
    """Passed to SGLang as they are."""

    @property
    def patience_s(self) -> float:
        """How long attempts are waited for: where there are other engines, a hang costs its time and a second try."""
        if self.count == 1:
            return self.request_timeout_s
        return 2 * self.request_timeout_s + self.hang_timeout_s


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """What the coordinator asks of the engines for one step."""

    prompts_per_step: int = 32
    """Questions of a generation batch."""
    attempts_per_prompt: int = 8
    """Attempts at each; the siblings among which a demonstration is looked for."""
    max_new_tokens: int = 8192
    """Longest response; what is longer is cut, and judged as it is."""
    temperature: float = 1.0
    """Of training attempts; the trainer divides its logits by it too."""
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
    """A successful attempt at the same question is shown to the teacher."""
    demonstration: Literal["first", "random"] = "first"
    """Which of the attempts that may demonstrate does; random draws one for every attempt, by the seed."""
    exclude_own_success: bool = True
    """An attempt never demonstrates to itself."""
    remove_thinking: bool = True
    """Drop <think>...</think> from a demonstration, and from a shown attempt."""
    feedback: Literal["without_solution", "always", "never"] = "without_solution"
    """When the teacher reads the verifier's words about the attempt: where no success is shown, wherever there are
    words, or never (then an attempt without a successful sibling has no target)."""
    include_attempt: bool = False
    """Show a failed attempt to its own teacher, beside what else is shown; it cost 4 points in paper table 6."""
    template: str = "{prompt}{solution}{attempt}{feedback}\n\nCorrectly solve the original question.\n"
    """What the teacher's user message is: the last one of the question, with the sections that there are."""
    solution_template: str = "\nCorrect solution:\n\n{solution}\n\n"
    """The section with the demonstration."""
    attempt_template: str = "\nThe following is your unsuccessful earlier attempt:\n\n{attempt}\n\n"
    """That with the failed attempt (include_attempt)."""
    feedback_template: str = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback}\n\n"
    """That with the verifier's words."""
    max_prompt_tokens: int = 10240
    """Longest teacher prompt; a longer one is treated by ``too_long``."""
    too_long: Literal["drop", "shorten", "shorten_feedback", "shorten_demonstration", "fail"] = "shorten"
    """shorten cuts a shown attempt, then feedback, then demonstration, in the middle; the other two cut only the
    section that they name, and drop when that is not enough. None cuts the question or the frame."""


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
    placement: Literal["swapped", "resident", "offloaded"] = "swapped"
    """Where the fp32 weights of the teacher, and of the model of objective.kl_coefficient, are outside their passes;
    changes no number. swapped: on the device (4 bytes a weight), cast into the model for each pass; a pass is long
    beside that, so this is the default. resident: a cast copy stays beside them (2 bytes more in bf16), made anew after
    an update only: with a distributed optimizer one gather an update instead of two a pass. offloaded: in host memory,
    and moved one tensor at a time; so are the model's own weights during the pass."""


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
    """See sample_weighting."""
    stop_at_saturation: float | None = None
    """Attempts at a question whose success rate in the batch is at least this have no target; None trains on all."""
    policy_drift_clip: float | None = 2.0
    """Cap of the detached weight pi_theta / pi_old on the sampled token; None switches it off."""
    engine_mismatch_cap: float | None = 2.0
    """Cap of the token importance weight pi_old / pi_engine (TIS); None switches it off."""
    advantage_std: bool = False
    """GRPO: divide the advantage by the group's standard deviation."""
    clip_low: float = 0.2
    """GRPO: the ratio pi_theta / pi_old is clipped at 1 - clip_low ..."""
    clip_high: float = 0.28
    """... and at 1 + clip_high."""
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
    def weighs_by_confidence(self) -> bool:
        """The teacher's entropy at each token is needed."""
        return self.has_teacher and self.sample_weighting == "teacher_confidence"

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
class PublishConfig:
    """How trained weights reach the engines."""

    backend: Literal["auto", "nccl", "gloo", "ipc"] = "auto"
    """What carries them. auto: NCCL from GPU to GPU, gloo between CPUs. Engines on the trainer's own GPUs, to which
    NCCL does not talk, read them from where they lie (ipc), or get them through host memory (gloo). ipc needs them on
    this machine."""
    bucket_bytes: int = 512 * 1024 * 1024
    """Tensors are sent in buckets of about this size."""
    probe_tokens: int = 32
    """Length of the fixed probe whose log-probs trainer and engine compare after every publish."""
    probe_tolerance: float = 1e-4
    """Largest accepted difference of a probe log-prob; natural log. bf16 needs about 0.5: a probe of random tokens has
    log-probs far below zero, where it is coarse (0.36 was seen between SGLang and Transformer Engine). With FP8 engines
    (engine.fp8) and tiny models on a CPU these were seen: from an emulated student, which multiplies by the same codes,
    2e-6 in fp32, 0.03 where rounding had turned one code of an activation, 0.2 in bf16; from a student that is not in
    FP8, or whose head_dim is 64, 0.3 to 0.5, as far as FP8 itself moves them."""
    timeout_s: float = 300.0
    """Longest wait for an engine while weights are published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out questions, plain (no teacher context)."""

    every: int = 5
    """Steps between evaluations; 0 evaluates never, otherwise the first and the last version too."""
    questions: int | None = None
    """How many of the task's held-out questions; None takes all."""
    attempts: int = 4
    """At each question: k of avg@k and pass@k."""
    temperature: float = 1.0
    """Of held-out attempts."""
    top_p: float = 1.0
    """Sample from the most probable tokens that together have this probability; 1 from all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiscoveryConfig:
    """One hard question at a time, trained on its own attempts until one succeeds (``megatron-sdpo discover``)."""

    methods: tuple[Literal["best_of_k", "multi_turn", "sdpo"], ...] = ("best_of_k", "multi_turn", "sdpo")
    """sdpo: train on the attempts; best_of_k: sample the base model independently; multi_turn: sample it in turns,
    each reading the feedback of earlier ones."""
    questions: int | None = None
    """How many of the task's training questions; None takes all."""
    seeds: int = 3
    """Independent trials of each question by sdpo and by multi_turn."""
    budget: int = 1024
    """Attempts that a trial may use; a multiple of rollout.attempts_per_prompt, of which each batch is made."""
    best_of_k_samples: int = 2048
    """Attempts of the base model at each question, from which best_of_k is estimated; at least the budget."""
    multi_turn_memory: tuple[int, ...] = (1, 3)
    """How many of the latest feedbacks a turn reads; several make several baselines. The prompt's limits (the least of
    teacher_context.max_prompt_tokens and model.max_length) may leave room for fewer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where numbers go besides metrics.jsonl and the console."""

    tensorboard: bool = False
    """Event files in RUN_DIR/tensorboard; needs the extra trackers."""
    wandb_project: str | None = None
    """Weights & Biases project; the same run directory is the same run there. Needs the extra trackers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DebugConfig:
    """A part of a run by itself, and looking inside."""

    from_journal: str | None = None
    """Train on the groups of this folder (the attempts/ of another run), in order, without engines."""
    rollout_only: bool = False
    """Journal the attempts of all steps, by the weights of model.path, without a trainer."""
    timeline: bool = False
    """Write RUN_DIR/timeline.json for chrome://tracing or Perfetto: what every rank, the coordinator and the engines
    did when."""
    profile_steps: tuple[int, ...] = ()
    """Batches, from 0, whose trainer phases are profiled: Chrome trace and table of operators in RUN_DIR/profile/."""
    profile_ranks: tuple[int, ...] = (0,)
    """Trainer ranks that profile_steps profiles."""
    profile_details: bool = False
    """With the operators' shapes and memory; slower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run."""

    name: str
    """Of the run, on the console, in its report and in W&B."""
    run_dir: str
    """Everything the run writes; the same directory resumes."""
    steps: int
    """Generation batches; ``discover`` sets it to those of one trial, budget / rollout.attempts_per_prompt."""
    seed: int = 0
    """Of the order of questions, of how samples are dealt, and, if deterministic, of sampling."""
    deterministic: bool = False
    """The same command gives the same run to the bit, killed and resumed or not, under one layout on one kind of
    machine. Engines are slower; on a CPU they answer one request at a time."""
    model: ModelConfig
    task: TaskConfig
    layout: LayoutConfig = LayoutConfig()
    fp8: Fp8Config = Fp8Config()
    sandbox: SandboxConfig = SandboxConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    teacher_context: TeacherContextConfig = TeacherContextConfig()
    teacher: TeacherConfig = TeacherConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    guard: GuardConfig = GuardConfig()
    spikes: SpikeConfig = SpikeConfig()
    ranks: RanksConfig = RanksConfig()
    publish: PublishConfig = PublishConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    discovery: DiscoveryConfig = DiscoveryConfig()
    tracking: TrackingConfig = TrackingConfig()
    debug: DebugConfig = DebugConfig()

    @property
    def sampling_seed(self) -> int | None:
        """From which every attempt's own seed follows; None leaves the draws to the engines."""
        return self.seed if self.deterministic else None
