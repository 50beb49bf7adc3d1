"""Configuration keys of the trainer's ranks: how they divide the model, step, watch themselves, and save."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutConfig:
    """How the model is cut over trainer ranks; data parallel is what remains of the world size."""

    tensor_parallel: int = 1
    sequence_parallel: bool = False
    """Tensor ranks also divide the tokens between their matrix products."""
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1
    """Pieces of the model, not next to each other, that each pipeline rank holds: less waiting, more messages."""
    context_parallel: int = 1
    """Ranks that divide the tokens of every sequence."""
    expert_parallel: int = 1
    """Ranks that divide the experts of a layer: taken from those of tensor, context and data parallelism."""
    expert_tensor_parallel: int | None = None
    """Ranks that hold slices of one expert: tensor_parallel (none means that too), or 1."""
    world_size: int = 1
    """Trainer ranks in all: a multiple of tensor_parallel * pipeline_parallel * context_parallel."""
    distributed_optimizer: bool = False
    """Data-parallel ranks divide master weights, moments and teacher among themselves; otherwise each has them all."""
    overlap_grad_reduce: bool = False
    """Gradients are summed over data-parallel ranks while the last backward pass still runs."""
    overlap_param_gather: bool = False
    """distributed_optimizer: new weights travel while the next forward pass runs already."""
    overlap_bucket_elements: int = 40_000_000
    """What overlaps travels in buckets of about so many numbers."""
    tokens_per_micro_batch: int = 8192
    """Packed tokens of a micro-batch; a sequence longer than this has a micro-batch of its own."""
    share_prefixes: Literal["auto", "off", "teacher", "scoring"] = "auto"
    """Attempts at a question have prompts that begin alike, the teacher's most of all; a pass may read what they share
    once. teacher: the teacher's passes do; scoring: the student's scoring passes too, whose log-probs then differ from
    those of the training passes by rounding, which shows in bf16. Data ranks get whole questions as far as their work
    stays even. No result changes beyond rounding; perf/shared_tokens counts what is spared. Not with
    context_parallel, which divides whole sequences. auto: teacher, but off with context_parallel, and on GPUs that are
    no Hopper, where it has not yet run."""
    head_chunk_tokens: int = 1024
    """Response tokens whose logits a rank holds at one time, forward and backward; changes memory, not results."""
    gradient_accumulation_fusion: Literal["auto", "on", "off"] = "auto"
    """Weight gradients are added up inside the matrix product, in fp32. auto: where apex's kernel for it is."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it (Megatron's recompute_granularity): nothing, parts of
    each layer, or whole layers. Less memory, more time, the same results."""
    recompute_modules: tuple[Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"], ...] = ("core_attn",)
    """selective: which parts."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """full. uniform: of every recompute_num_layers layers only what enters the first is kept; block: so of each of the
    first recompute_num_layers of a pipeline stage, the others keep everything."""
    recompute_num_layers: int = 1
    """full: see recompute_method."""
    distribute_saved_activations: bool = False
    """full: tensor ranks divide what is kept among themselves, and gather it for the backward pass."""

    @property
    def expert_tensor(self) -> int:
        """Ranks that hold slices of one expert."""
        return self.expert_tensor_parallel or self.tensor_parallel


Fp8Kind = Literal["off", "blockwise", "tensorwise", "emulated"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Config:
    """Which passes multiply by the layers' weights in FP8 (E4M3).

    Embedding, norms, attention, router and head stay in model.dtype; master weights, moments and teacher in fp32.
    blockwise: one fp32 scale for 128 numbers of an activation or a gradient, and for 128 x 128 of a weight, as
    DeepSeek's and SGLang's FP8 checkpoints have them. tensorwise: one scale a tensor. Both need Transformer Engine on
    a GPU (blockwise: Hopper). emulated: the blockwise numbers in plain torch, on any device; slow, made for tests.
    """

    student: Fp8Kind = "off"
    """Scoring and training passes of the policy."""
    teacher: Fp8Kind = "off"
    """The teacher's passes."""
    high_precision_layers: int = 0
    """So many of the first layers, and as many of the last, stay in model.dtype, in FP8 engines too."""
    floor_limit: float | None = None
    """At its start a run measures how far student and teacher of the same weights disagree about the same tokens,
    KL per token in nats: what precision alone makes of the objective. Above this limit the run stops; none only logs
    it."""

    @property
    def kinds(self) -> tuple[Fp8Kind, ...]:
        """Those in use, each once."""
        return tuple(dict.fromkeys(kind for kind in (self.student, self.teacher) if kind != "off"))


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW."""

    lr: float = 1e-5
    """After warm-up."""
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up, from lr to lr * min_lr_ratio at the last step."""
    min_lr_ratio: float = 0.0
    """See lr_decay."""
    warmup_steps: int = 0
    """Generation batches over which the learning rate rises to lr, linearly."""
    weight_decay: float = 0.01
    """AdamW's, decoupled."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """Added to the root of the latter."""
    clip_grad: float = 1.0
    """Largest norm of a gradient; a longer one is scaled down to it. 0 leaves all as they are."""
    mini_batches: int = 1
    """Optimizer steps per generation batch; samples are dealt to them at random by seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """Damps training while it makes the model worse (guard.py)."""

    signal: Literal["off", "reward", "accuracy", "both"] = "off"
    """reward: of the generation batches; accuracy: of the evaluations; both: damped while either is down."""
    drop: float = 0.1
    """How far below its best a signal must lie."""
    damping: float = 0.1
    """What the learning rate and an EMA teacher's update rate are then multiplied by."""
    reward_window: int = 5
    """Generation batches over which the reward is averaged."""
    accuracy_window: int = 1
    """Evaluations over which the accuracy is averaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpikeConfig:
    """What is done about a gradient norm far beyond those before it (spikes.py)."""

    policy: Literal["off", "skip", "stop"] = "off"
    """skip: the optimizer step is not made, and an EMA teacher does not follow it (one that follows batches: if all
    steps of a batch were skipped); stop: the run ends before it, as at numbers that are not finite."""
    factor: float = 10.0
    """A spike is above this times the median of the last accepted norms."""
    window: int = 32
    """How many accepted norms; nothing is judged before there are as many."""
    patience: int = 3
    """skip: after so many skipped steps in a row the next spike ends the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RanksConfig:
    """What trainer ranks are held to."""

    timeout_s: float = 1800.0
    """Longest time in one phase (building, loading, scoring, training, publishing, saving); then the run ends with a
    message that tells which ranks did not arrive. Waiting for attempts has no bound while the coordinator shows that it
    lives; it may be silent for as long."""
    slow_share: float = 0.3
    """How much more own work than the others a rank may need before it counts as slow: 0.3 is 30 %."""
    slow_steps: int = 5
    """After so many slow steps in a row the console says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the trainer's state is written."""

    every: int = 10
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """How many of the newest are kept."""
    keep_every: int | None = None
    """Those of steps that are multiples of this are kept for good; a multiple of ``every``. None keeps no others."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written; changes no result."""
