"""The configuration tree: frozen dataclasses, each default in one place, no torch.

A recipe (recipes/) returns a complete ``Config``; ``apply_overrides`` changes fields by dotted name; ``check`` refuses
what cannot work before anything is started; the resolved tree is saved as ``config.json`` in the run directory. Every
refusal is a ``ConfigError`` with one sentence that says what was wrong and what to set.

===========  ==========================================================================
tree.py      the dataclasses: every key, its default, what it means
training.py  those of the trainer's ranks: layout, optimizer, guards, checkpoints
sandbox.py   those of the sandbox in which programs of the model are executed
layouts.py   a layout in one word, both ways
reading.py   overrides, JSON in and out, strictly
checks.py    what values may be, alone and together; objective_checks.py, fp8_checks.py: objectives and
             precisions; sharing.py: engines on the trainer's own GPUs
===========  ==========================================================================
"""

from megatron_sdpo.config.checks import check, check_discovery
from megatron_sdpo.config.layouts import LAYOUT_HELP, layout_name, layout_overrides
from megatron_sdpo.config.reading import apply_overrides, fields_by_name, load, meanings, read_json, save, type_words
from megatron_sdpo.config.sandbox import Limits, SandboxConfig
from megatron_sdpo.config.training import (
    CheckpointConfig,
    Fp8Config,
    Fp8Kind,
    GuardConfig,
    LayoutConfig,
    OptimConfig,
    RanksConfig,
    SpikeConfig,
)
from megatron_sdpo.config.tree import (
    Config,
    ConfigError,
    DebugConfig,
    DiscoveryConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    PublishConfig,
    RolloutConfig,
    TaskConfig,
    TeacherConfig,
    TeacherContextConfig,
    TrackingConfig,
)

__all__ = [
    "LAYOUT_HELP",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DebugConfig",
    "DiscoveryConfig",
    "EngineConfig",
    "EvaluationConfig",
    "Fp8Config",
    "Fp8Kind",
    "GuardConfig",
    "LayoutConfig",
    "Limits",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PublishConfig",
    "RanksConfig",
    "RolloutConfig",
    "SandboxConfig",
    "SpikeConfig",
    "TaskConfig",
    "TeacherConfig",
    "TeacherContextConfig",
    "TrackingConfig",
    "apply_overrides",
    "check",
    "check_discovery",
    "fields_by_name",
    "layout_name",
    "layout_overrides",
    "load",
    "meanings",
    "read_json",
    "save",
    "type_words",
]
