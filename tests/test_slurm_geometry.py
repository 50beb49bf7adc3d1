"""The batch script of the 70B recipe on as many nodes as it needs, with fake GPUs: accepted, rendered as expected."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm_sandbox import ROOT, Job, Sandbox, has_pyxis, sandbox, why_not

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

GOLDEN = ROOT / "tests" / "golden" / "sdpo_70b.json"
"""After a wanted change: copy what the failing test prints."""
NODES = 16
SMI = """#!/bin/bash
if [ "$1" = topo ]; then
  for i in {0..7}; do
    echo -n "GPU$i"
    for j in {0..7}; do [ $i = $j ] && echo -n " X" || echo -n " NV18"; done
    echo
  done
  exit
fi
last=7; [ "$SLURMD_NODENAME" = h3 ] && last=6
for ((i = 0; i <= last; i++)); do
  echo "$i, NVIDIA H100 80GB HBM3, 550.54.15, 9.0, 0, 1980, Not Active"
done
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Sandbox]:
    if reason := why_not():
        pytest.skip(reason)
    with sandbox(nodes=NODES + 1, prefix="h", number=2) as started:
        yield started


def submit(slurm: Sandbox, folder: Path, *options: str, **more: str) -> Job:
    smi, adapters = folder / "nvidia-smi", folder / "infiniband"
    smi.write_text(SMI)
    smi.chmod(0o755)
    for i in range(8):
        port = adapters / f"mlx5_{i}" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text("4: ACTIVE\n")
        (port / "link_layer").write_text("InfiniBand\n")
    settings = {
        "SDPO_DRY_RUN": "1",
        "SDPO_NVIDIA_SMI": str(smi),
        "SDPO_INFINIBAND": str(adapters),
        **more,
    }
    return slurm.submit("sdpo_70b.sh", folder, options=options, **settings)


def rendered(job: Job) -> str:
    """The plan with what differs between machines by name."""
    text = (job.run_dir / "slurm" / "latest" / "plan.json").read_text()
    text = text.replace(str(job.run_dir), "RUN_DIR").replace(sys.executable, "PYTHON")
    return json.dumps(json.loads(text), indent=1) + "\n"


def test_the_real_geometry_is_accepted_and_a_node_with_a_lost_gpu_is_left_out(slurm: Sandbox, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path)
    assert job.end(400) == "COMPLETED", job.text()
    assert "preflight: node h3 has 7 GPUs, not SDPO_GPUS_PER_NODE 8" in job.text()
    assert (job.run_dir / "excluded-nodes").read_text() == "h3\n"
    assert job.last["Restarts"] == "1" and job.last["ExcNodeList"] == "h3"
    assert json.loads((job.run_dir / "preflight" / "h3.json").read_text())["gpus"] == "checked"
    assert rendered(job) == GOLDEN.read_text(), rendered(job)


def test_engines_may_have_nodes_of_their_own_kind(slurm: Sandbox, tmp_path: Path) -> None:
    """A heterogeneous job: the first component trains, the second generates."""
    each = ("--nodes=8", "--ntasks-per-node=1", "--gpus-per-node=8", "--exclude=h3", "--exclusive")
    job = submit(slurm, tmp_path, *each, ":", *each)
    assert job.end(400) == "COMPLETED", job.text()
    found = re.search(r"^\S+ job .* on (\S+) (\S+)$", job.text(), re.MULTILINE)
    assert found is not None, job.text()
    trainers, engines = (group.split(",") for group in found.groups())
    plan = json.loads(rendered(job))["nodes"]
    assert [node["node"] for node in plan if node["trainer_ranks"] != "none"] == trainers
    assert [node["node"] for node in plan if node["engines"]] == engines


def test_nodes_may_work_inside_a_container(slurm: Sandbox, tmp_path: Path) -> None:
    """srun gets the image and the mounts; the stand-in for pyxis tells the nodes' processes."""
    if not has_pyxis():
        pytest.skip("the stand-in for pyxis needs gcc and libslurm-dev")
    python, told = tmp_path / "python", tmp_path / "told"
    told.mkdir()
    python.write_text(f'#!/bin/sh\nenv | grep FAKE_PYXIS | sort >{told}/$SLURMD_NODENAME\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    container = {
        "SDPO_PYTHON": str(python),
        "SDPO_CONTAINER": "/images/sdpo.sqsh",
        "SDPO_MOUNTS": f"{told}:/mnt",
    }
    job = submit(slurm, tmp_path, "--exclude=h3", **container)
    assert job.end(400) == "COMPLETED", job.text()
    words = {path.read_text() for path in told.iterdir()}
    own = ",".join(f"{path}:{path}" for path in sorted((str(ROOT), str(job.run_dir))))
    assert len(list(told.iterdir())) == NODES and words == {
        "FAKE_PYXIS_IMAGE=/images/sdpo.sqsh\n"
        f"FAKE_PYXIS_MOUNTS={own},{told}:/mnt\n"
        f"FAKE_PYXIS_NO_MOUNT_HOME=\nFAKE_PYXIS_WORKDIR={ROOT}\n"
    }
