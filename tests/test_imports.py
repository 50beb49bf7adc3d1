"""Who may import whom: the order of the package's docstring, vendors at arm's length, a coordinator without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_sdpo

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megatron_sdpo"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])
LAUNCHERS = (
    "rollout/engine_main.py",
    "rollout/cpu_platform.py",
    "rollout/cpu_sampling.py",
    "rollout/cpu_fp8.py",
    "rollout/router_main.py",
)

# vendor -> the only places that import it: files, or folders that end in "/", relative to the repository
VENDORS = {
    "megatron": ("megatron_sdpo/mcore/",),
    "mbridge": ("megatron_sdpo/mcore/",),
    "transformer_engine": ("megatron_sdpo/mcore/",),
    "sglang": tuple(f"megatron_sdpo/{name}" for name in LAUNCHERS),
    "sglang_router": ("megatron_sdpo/rollout/router_main.py",),
    "nemo_run": ("megatron_sdpo/launch/", "recipes/"),
    "wandb": ("megatron_sdpo/tracking.py",),
    "tensorboard": ("megatron_sdpo/tracking.py",),
    "torch.utils.tensorboard": ("megatron_sdpo/tracking.py",),
    "math_verify": ("megatron_sdpo/tasks/maths_worker.py",),
    "pyarrow": ("megatron_sdpo/tasks/rows.py",),
}
COORDINATOR = ("types", "config", "fp8_format", "hf_config", "tasks", "sandbox", "chat", "rollout", "teacher_context")


def order() -> list[str]:
    """The modules as the indented block of the package's docstring lists them."""
    assert megatron_sdpo.__doc__ is not None
    block = megatron_sdpo.__doc__.split("::\n", 1)[1]
    return [name for line in block.splitlines() if line.startswith("    ") for name in line.split()]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, also of those inside functions."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def test_every_module_has_a_place_in_the_order() -> None:
    found = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in PACKAGE.rglob("*.py")} - {"__init__"}
    assert found <= {*order(), "__main__"}


def test_imports_never_point_up_the_order() -> None:
    places = {name: place for place, name in enumerate(order())}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] != "megatron_sdpo" or len(parts) < 2 or parts[1] not in places:
                continue
            if places[parts[1]] > places[own]:
                wrong.append(f"{relative(path)}:{line} imports {name}, which comes after {own}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_vendor_is_imported_only_at_its_place(vendor: str) -> None:
    wrong = [
        f"{relative(path)}:{line}"
        for path in FILES
        for line, name in imports(path)
        if within(name, vendor)
        and not any(
            relative(path).startswith(place) if place.endswith("/") else relative(path) == place
            for place in VENDORS[vendor]
        )
    ]
    assert not wrong, f"{vendor} is imported at {', '.join(wrong)}"


def test_the_walk_sees_imports_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "package" / "part" / "module.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import a.b as c\nfrom d import e\nfrom . import f\nfrom ..g import h\n"
        "def late():\n    from torch.utils import tensorboard\n"
    )
    assert [name for _, name in imports(path)] == [
        "a.b",
        "d.e",
        "package.part.f",
        "package.g.h",
        "torch.utils.tensorboard",
    ]


def test_the_coordinator_does_not_load_torch() -> None:
    modules = [
        relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in COORDINATOR
        and path.relative_to(PACKAGE).as_posix() not in LAUNCHERS
    ]
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} loads torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
