"""Write tests/container_metadata.json: what the packages of requirements/gpu.txt say that they need.

``make gpu-lock`` runs it after the lock has been resolved anew. pip reads the packages' metadata from the index, for
the container's platform; nothing is installed.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements" / "gpu.txt"
RESULT = ROOT / "tests" / "container_metadata.json"
PLATFORMS = [*(f"manylinux_2_{n}_x86_64" for n in range(5, 40)), "manylinux2014_x86_64", "linux_x86_64"]
UNREAD = {
    # a source package, which pip could only read by building it: from its PKG-INFO
    "transformer-engine-torch": [
        *("torch>=2.1", "einops", "onnxscript", "onnx", "packaging", "pydantic", "transformer_engine_cu12==2.11.0"),
    ],
    # the release that SGLang names has a wheel that pip does not take for any of the platforms above; uv does
    "cuda-tile": [],
}


def main() -> None:
    pins = [line for line in LOCK.read_text().splitlines() if "==" in line and not line.startswith("#")]
    wanted = [pin for pin in pins if canonical(pin.partition("==")[0]) not in UNREAD]
    found = {canonical(entry["name"]): needs(entry) for entry in read(wanted)}
    for pin in pins:
        name, _, version = pin.partition("==")
        if name in UNREAD:
            found[name] = {"version": version, "requires": UNREAD[name]}
    lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found)]
    RESULT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{RESULT}: {len(found)} packages")


def read(pins: list[str]) -> list[dict[str, Any]]:
    """Metadata of each pinned package."""
    with tempfile.TemporaryDirectory() as folder:
        report, listed = Path(folder, "report.json"), Path(folder, "pins.txt")
        listed.write_text("\n".join(pins))
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
        command += ["--report", str(report), "--target", folder, "--python-version", "3.12", "--only-binary=:all:"]
        subprocess.run([*command, *platforms, "--requirement", str(listed)], check=True)
        return [entry["metadata"] for entry in json.loads(report.read_text())["install"]]


def needs(entry: dict[str, Any]) -> dict[str, Any]:
    """Version, requirements and the Python that is asked for; of extras only those that somebody may ask for here."""
    unused = re.compile(r"extra == ['\"](test|tests|dev|docs?|all|lint\w*|diffusion\w*|example\w*)['\"]")
    lines = [line for line in entry.get("requires_dist", []) if not unused.search(line)]
    if canonical(entry["name"]) == "megatron-core":  # whose extra dev says which Transformer Engine it was made for
        lines += [line for line in entry["requires_dist"] if line.startswith("transformer-engine")]
    python = {"python": entry["requires_python"]} if "requires_python" in entry else {}
    return {"version": entry["version"], "requires": lines, **python}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


if __name__ == "__main__":
    main()
