"""The container's versions fit each other, by what the packages themselves say (tests/container_metadata.json).

The image cannot be built here; this is what can be known without building it.
"""

import json
import re
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_sdpo.launch.doctor_software import requirements

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
METADATA = json.loads((ROOT / "tests" / "container_metadata.json").read_text())
PLATFORM: dict[str, str] = {
    **{name: str(value) for name, value in default_environment().items()},
    "python_version": "3.12",
    "python_full_version": "3.12.3",
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "sys_platform": "linux",
    "os_name": "posix",
}
LEFT_OUT = {("transformer-engine-torch", "transformer-engine-cu12")}
"""(who asks, for what): on purpose, it would be loaded instead of the CUDA 13 core."""


def pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


PINS = pins((ROOT / "requirements" / "gpu.txt").read_text())


def contradictions(pinned: dict[str, str], metadata: dict[str, dict]) -> list[str]:
    """What pinned packages, and this one with its extras engine and gpu, ask for and do not get."""
    wrong = []
    own = requirements()
    asked = [("megatron-sdpo", need) for extra in ("", "engine", "gpu") for need in own[extra]]
    done = set()
    while asked:
        who, need = asked.pop()
        name = canonicalize_name(need.name)
        if (who, name) in LEFT_OUT:
            continue
        if name not in pinned:
            wrong.append(f"{who} asks for {need}, which is not there")
            continue
        if not need.specifier.contains(pinned[name], prereleases=True):
            wrong.append(f"{who} asks for {need}, but {pinned[name]} is there")
        for extra in ("", *need.extras):
            if (name, extra) not in done:
                done.add((name, extra))
                asked += [(name, each) for each in applicable(metadata[name]["requires"], extra)]
    return wrong


def applicable(lines: list[str], extra: str) -> list[Requirement]:
    """Those of a package that hold on the container's platform: without an extra, or only because of this one."""
    found = []
    for need in map(Requirement, lines):
        plain = need.marker is None or need.marker.evaluate(PLATFORM | {"extra": ""})
        if plain != bool(extra) and (need.marker is None or need.marker.evaluate(PLATFORM | {"extra": extra})):
            found.append(need)
    return found


def test_the_metadata_is_of_the_pinned_versions() -> None:
    assert {name: entry["version"] for name, entry in METADATA.items()} == PINS


def test_nothing_that_is_pinned_contradicts_another() -> None:
    assert contradictions(PINS, METADATA) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"torch": "2.11.0"}, "sglang asks for torch==2.13.0, but 2.11.0 is there"),
        ({"tokenizers": "0.24.0"}, "but 0.24.0 is there"),
        ({"nvidia-nccl-cu13": None}, "torch asks for nvidia-nccl-cu13==2.29.7"),
        ({"transformer-engine": "2.15.0"}, "megatron-sdpo asks for transformer-engine[core_cu13,pytorch]==2.11.0"),
        ({"transformer-engine-cu13": None}, "transformer-engine asks for transformer"),
    ],
)
def test_a_contradiction_would_be_found(change: dict[str, str | None], words: str) -> None:
    changed = {name: version for name, version in (PINS | change).items() if version is not None}
    assert any(words in found for found in contradictions(changed, METADATA))


def test_every_package_runs_on_the_containers_python() -> None:
    assert "python3.12 " in DOCKERFILE
    wrong = [n for n, entry in METADATA.items() if not SpecifierSet(entry.get("python", "")).contains("3.12.3")]
    assert wrong == []


def test_transformer_engine_is_one_that_megatron_core_was_made_for() -> None:
    lines = METADATA["megatron-core"]["requires"]
    need = next(Requirement(line) for line in lines if line.startswith("transformer-engine"))
    assert need.specifier.contains(PINS["transformer-engine"], prereleases=True) and "core_cu13" in need.extras
    assert PINS["transformer-engine"] == PINS["transformer-engine-cu13"] == PINS["transformer-engine-torch"]
    assert "transformer-engine-cu12" not in PINS


def test_what_is_compiled_finds_the_cuda_that_torch_was_built_with() -> None:
    (image,) = re.findall(r"^FROM nvidia/cuda:(\S+)$", DOCKERFILE, re.MULTILINE)
    toolkit = Version(PINS["cuda-toolkit"])
    assert "-devel-" in image and Version(image.partition("-")[0]).release[:2] == toolkit.release[:2]
    asked = next(line for line in METADATA["torch"]["requires"] if line.startswith("cuda-toolkit"))
    assert Requirement(asked).specifier.contains(PINS["cuda-toolkit"])
    assert {name for name in PINS if re.search(r"-cu(\d+)$", name) and not name.endswith("cu13")} <= {
        "nvidia-cutlass-dsl-libs-cu12"  # asked for by nvidia-cutlass-dsl beside the one for CUDA 13
    }


def test_apex_is_that_of_its_repository() -> None:
    (need,) = requirements()["apex"]
    assert need.url is not None and re.findall(r"^ARG APEX=(\S+)$", DOCKERFILE, re.MULTILINE) == [
        need.url.partition("@")[2]
    ]
    assert "apex" not in PINS and "https://github.com/NVIDIA/apex.git" in DOCKERFILE


def test_the_trainer_and_the_engine_are_the_versions_that_are_tested_on_a_cpu() -> None:
    tested = pins((ROOT / "requirements" / "cpu.txt").read_text()) | pins(
        (ROOT / "requirements" / "torch.txt").read_text()
    )
    same = ("torch", "megatron-core", "sglang", "sglang-router", "transformers", "tokenizers", "safetensors", "msgspec")
    assert {name: PINS[name] for name in same} == {name: tested[name] for name in same}


def test_every_file_that_the_image_copies_exists() -> None:
    for source in re.findall(r"^COPY (\S+) ", DOCKERFILE, re.MULTILINE):
        assert (ROOT / source).exists(), source
