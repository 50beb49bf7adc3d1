"""What a node finds of itself: its address, versions, GPUs, and which settings NCCL needs here. Nothing is guessed."""

import platform
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from megatron_sdpo.config import ConfigError
from megatron_sdpo.launch.cluster.site import Site

PACKAGES = ("torch", "megatron-core", "sglang", "sglang-router", "transformers", "transformer-engine", "numpy")
"""Whose versions must be the same on all nodes."""
_QUERY = (
    "index,name,driver_version,compute_cap,ecc.errors.uncorrected.volatile.total,clocks.max.sm,"
    "clocks_throttle_reasons.hw_slowdown"
)
_NO_COUNT = ("[N/A]", "N/A", "[Not Supported]")


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One GPU, as nvidia-smi tells. Example: ``GpuFacts(0, "NVIDIA H100 80GB HBM3", "9.0", 0, 1980, False)``"""

    index: int
    name: str
    compute: str
    ecc_errors: int
    """Uncorrected, since the driver was loaded."""
    max_sm_clock_mhz: int
    is_slowed: bool
    """By heat or power, in hardware."""


@dataclass(frozen=True, slots=True)
class Facts:
    """One node. JSON in between; see ``facts_of``."""

    node: str
    canary: str | None
    """What the node read from the file that the conductor wrote; None: it did not see it."""
    address: str
    interface: str
    versions: dict[str, str]
    gpus: tuple[GpuFacts, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    """What NCCL and gloo are told on this node."""
    problem: str = ""
    """Why nothing could be found out, if so."""


def facts_of(value: Mapping[str, Any]) -> Facts:
    """The inverse of ``dataclasses.asdict`` after JSON."""
    return Facts(**{**value, "gpus": tuple(GpuFacts(**gpu) for gpu in value["gpus"])})


def find_facts(node: str, site: Site, canary: str | None) -> Facts:
    """Of this node; what cannot be found out is its ``problem``, for the conductor to tell."""
    try:
        address, interface = own_address(node, site.fabric)
        versions = own_versions()
        gpus, settings = (), {}
        if site.gpus_per_node:
            gpus, driver = query_gpus(site.nvidia_smi)
            versions["driver"] = driver
            settings = gpu_settings(gpus, has_nvlink(site.nvidia_smi), Path(site.infiniband))
    except (ConfigError, OSError, subprocess.SubprocessError, ValueError) as error:
        return Facts(node, canary, "", "", {}, problem=str(error))
    named = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    return Facts(node, canary, address, interface, versions, gpus, {**named, **settings})


def own_versions() -> dict[str, str]:
    """Of Python and of ``PACKAGES``, without importing them; those that are not there are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def own_address(node: str, fabric: str) -> tuple[str, str]:
    """(IPv4 address, interface) by which other nodes reach this one: that of ``fabric``, or of the node's name."""
    addresses = {
        found.address: interface
        for interface, entries in psutil.net_if_addrs().items()
        for found in entries
        if found.family == socket.AF_INET
    }
    if fabric:
        held = [address for address, interface in addresses.items() if interface == fabric]
        if not held:
            known = ", ".join(sorted(set(addresses.values())))
            raise ConfigError(f"interface {fabric} has no IPv4 address on {node}; set SDPO_FABRIC to one of {known}")
        return held[0], fabric
    try:
        address = socket.gethostbyname(node)
    except OSError as error:
        raise ConfigError(f"the name {node} has no address on {node} ({error}); set SDPO_FABRIC") from error
    if address.startswith("127.") or address not in addresses:
        raise ConfigError(f"the name {node} stands for {address} on {node} itself; set SDPO_FABRIC to an interface")
    return address, addresses[address]


def query_gpus(nvidia_smi: str) -> tuple[tuple[GpuFacts, ...], str]:
    """(the GPUs, the driver's version)."""
    command = [nvidia_smi, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    gpus, drivers = [], set()
    for line in lines:
        index, name, driver, compute, ecc, clock, slowed = (part.strip() for part in line.split(","))
        errors = 0 if ecc in _NO_COUNT else int(ecc)
        gpus.append(GpuFacts(int(index), name, compute, errors, int(clock), slowed == "Active"))
        drivers.add(driver)
    return tuple(gpus), ", ".join(sorted(drivers))


def has_nvlink(nvidia_smi: str) -> bool:
    """Whether every GPU of the node reaches every other by NVLink."""
    done = subprocess.run([nvidia_smi, "topo", "-m"], capture_output=True, text=True, check=True, timeout=60)
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"GPU\d+\s", line)]
    links = [cell for row in rows for cell in row[1 : 1 + len(rows)] if cell != "X"]
    return len(rows) > 1 and all(re.fullmatch(r"NV\d+", cell) for cell in links)


def gpu_settings(gpus: tuple[GpuFacts, ...], nvlink: bool, sysfs: Path) -> dict[str, str]:
    """NCCL's settings of a node with GPUs. Not yet run on a GPU."""
    # NVLS is NVSwitch's own arithmetic, which came with Hopper.
    nvls = nvlink and all(float(gpu.compute) >= 9.0 for gpu in gpus)
    adapters = ib_adapters(sysfs)
    fabric = {"NCCL_IB_HCA": "=" + ",".join(adapters)} if adapters else {"NCCL_IB_DISABLE": "1"}
    return {
        "NCCL_NVLS_ENABLE": str(int(nvls)),
        "NCCL_CUMEM_ENABLE": "0",  # SGLang switches it off, and both are in the group that carries weights
        **fabric,
    }


def ib_adapters(sysfs: Path) -> list[str]:
    """``["mlx5_0:1", ...]``: active ports of InfiniBand, or where there are none, of RoCE."""
    found: dict[str, list[str]] = {"InfiniBand": [], "Ethernet": []}
    for port in sorted(sysfs.glob("*/ports/*")):
        if (port / "state").read_text().strip().endswith("ACTIVE"):
            layer = (port / "link_layer").read_text().strip()
            found.setdefault(layer, []).append(f"{port.parts[-3]}:{port.name}")
    return found["InfiniBand"] or found["Ethernet"]
