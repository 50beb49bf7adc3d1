"""What the servers of a fleet are told on their command lines."""

import json
from collections.abc import Sequence

from megatron_sdpo import fp8_format
from megatron_sdpo.config import Config
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.rollout.cpu_platform import MEMORY_SAVER
from megatron_sdpo.rollout.cpu_sampling import SEEDED
from megatron_sdpo.rollout.ports import take_ports
from megatron_sdpo.types import EngineAddress


def engine_arguments(config: Config, i: int, host: str, port: int, gpu: int, text: bool = False) -> list[str]:
    """SGLang's, for the engine of number ``i`` in the run whose first GPU on this machine is ``gpu``. With ``text`` it
    reads and writes words too (/v1/chat/completions); a run gives and takes token ids only."""
    engine = config.engine
    (own_port,) = take_ports(host, 0, 1)  # SGLang's choice is one that the kernel may hand out meanwhile
    arguments = {
        "model-path": config.model.path,
        "host": host,
        "port": port,
        "nccl-port": own_port,
        "dtype": config.model.dtype,
        "context-length": config.model.max_length,
        "tp-size": engine.tensor_parallel,
        "base-gpu-id": gpu,
        "max-running-requests": engine.max_running_requests,
        "max-total-tokens": engine.max_total_tokens,
        "random-seed": config.seed + i,  # the same seed would make engines repeat each other's samples
        "weight-version": 0,
        "log-level-http": "warning",
    }
    given = [f"--{name}={value}" for name, value in arguments.items() if value is not None]
    if config.deterministic:
        given.append(SEEDED)
    if engine.release_memory:
        given.append(MEMORY_SAVER)
    given += fp8_arguments(config)
    if not text:
        given.append("--skip-tokenizer-init")
    return [*given, *engine.extra_args]


def fp8_arguments(config: Config) -> list[str]:
    """What SGLang is told of FP8; nothing where it is off, or where the checkpoint says so itself.

    The file on disk is in full precision, so the engine starts with dummies for weights: a trainer publishes before
    anything is sampled, and engines without one are refused at start (``fp8_format.check_engines_alone``).
    """
    if config.engine.fp8 == "off" or fp8_format.is_fp8(model := read_hf_config(config.model.path, fp8=True)):
        return []
    said = {fp8_format.KEY: fp8_format.quantization_config(model, config.fp8.high_precision_layers)}
    return [f"--json-model-override-args={json.dumps(said)}", "--load-format=dummy"]


def router_arguments(config: Config, host: str, port: int, engines: Sequence[EngineAddress]) -> list[str]:
    """sglang-router's, in front of ``engines``."""
    (metrics_port,) = take_ports(host, 0, 1)
    arguments = {
        "host": host,
        "port": port,
        "policy": "round_robin",
        "prometheus-host": host,
        "prometheus-port": metrics_port,
        "request-timeout-secs": max(1, round(config.engine.request_timeout_s)),
        "max-concurrent-requests": -1,  # the coordinator decides how much is in flight
        # Its own /health has an engine generate a token, which ends one that has given its memory back.
        "health-check-endpoint": "/model_info",
        "log-level": "warn",
    }
    given = [f"--{name}={value}" for name, value in arguments.items()]
    return [*given, "--worker-urls", *(address.url for address in engines)]
