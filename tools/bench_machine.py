"""One line about the machine that a benchmark ran on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "megatron-core", "sglang", "transformers")


def machine() -> str:
    """Example: ``AMD EPYC, 2 cores, load 0.3; Python 3.11.7, torch 2.13.0, ...``"""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
    installed = []
    for package in PACKAGES:
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            installed.append(f"no {package}")
    software = ", ".join([f"Python {platform.python_version()}", *installed])
    return f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {software}"
