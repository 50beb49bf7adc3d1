"""What a plan assumes: how long samples are, and which share of a stated speed a run reaches."""

from dataclasses import dataclass

from megatron_sdpo.config import Config


@dataclass(frozen=True, slots=True)
class Reach:
    """Which share of a stated speed a run reaches, from published runs (tests/test_published_figures.py)."""

    training: float = 0.4
    """Of the matrix products' bf16 peak, in training passes."""
    scoring: float = 0.4
    """The same in forward-only passes and prefill."""
    fp8: float = 0.4
    """Of the FP8 peak, in the products that are FP8."""
    experts: float = 0.14
    """Of the bf16 peak, in all passes of a mixture of experts, whose products are small; FP8 makes them no faster."""
    memory: float = 0.5
    """Of memory bandwidth, decoding and in the optimizer."""
    links: float = 0.6
    """Of links within a node and between nodes."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of an average sample."""

    prompt: int
    response: int
    teacher_prompt: int


def usual_lengths(config: Config) -> Lengths:
    """Where nobody says: prompts of 256 tokens, responses of a quarter of the longest, a response in the context."""
    response = max(1, config.rollout.max_new_tokens // 4)
    prompt = max(1, min(256, config.model.max_length - config.rollout.max_new_tokens))
    return Lengths(prompt, response, min(prompt + response, config.teacher_context.max_prompt_tokens))
