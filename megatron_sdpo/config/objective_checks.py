"""The objective: choices that contradict each other, and such as nothing is learned by."""

from megatron_sdpo.config.tree import ConfigError, ObjectiveConfig


def check_objective(objective: ObjectiveConfig) -> None:
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
    if objective.support == "top_k" and objective.kept_tokens == 1 and not objective.tail:
        raise ConfigError(
            "objective.tail=false renormalises the kept tokens, of which there is one: student and teacher then always"
            " agree; set objective.tail=true, or objective.top_k to 2 or more"
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
