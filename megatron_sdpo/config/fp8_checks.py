"""Which precisions may be asked for together, whatever the model is."""

from megatron_sdpo.config.tree import Config, ConfigError

_SET_BY_FP8 = ("--json-model-override-args", "--load-format", "--quantization")
"""SGLang's arguments that engine.fp8 gives."""


def check_fp8(config: Config) -> None:
    """Refuse precisions that one set of modules cannot have, and settings of a precision that is not asked for."""
    fp8 = config.fp8
    if len(fp8.kinds) > 1:
        raise ConfigError(
            f"fp8.student={fp8.student} and fp8.teacher={fp8.teacher} want different kinds of linears, but student and"
            " teacher are one model; set both to the same kind, or one of them to off"
        )
    if fp8.high_precision_layers and not fp8.kinds and config.engine.fp8 == "off":
        raise ConfigError(
            "fp8.high_precision_layers is about FP8, which is off; set fp8.student, fp8.teacher or engine.fp8, or leave"
            " it out"
        )
    if fp8.floor_limit is not None and not fp8.kinds:
        raise ConfigError("fp8.floor_limit is about FP8, which is off; set fp8.student or fp8.teacher, or leave it out")
    _check_engine(config)
    if fp8.kinds and fp8.kinds != ("emulated",) and config.model.dtype != "bfloat16":
        raise ConfigError(
            f"fp8 {fp8.kinds[0]} is computed beside bfloat16, but model.dtype is {config.model.dtype}; set"
            " model.dtype=bfloat16"
        )
    if fp8.teacher != "off" and not config.objective.has_teacher:
        raise ConfigError(
            f"fp8.teacher={fp8.teacher}, but objective.kind={config.objective.kind} has no teacher; set fp8.teacher=off"
        )


def _check_engine(config: Config) -> None:
    """Refuse arguments that contradict those that follow from ``engine.fp8``."""
    given = [argument for argument in config.engine.extra_args if argument.partition("=")[0] in _SET_BY_FP8]
    if given and config.engine.fp8 != "off":
        raise ConfigError(
            f"engine.extra_args has {given[0].partition('=')[0]}, which engine.fp8={config.engine.fp8} sets itself;"
            " leave it out, or set engine.fp8=off"
        )
