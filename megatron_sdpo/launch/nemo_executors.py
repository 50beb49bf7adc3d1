"""Where NeMo-Run runs a job: this machine, or a Slurm cluster. Named on the command line as ``run.executor=slurm``.

Nothing is packaged: a job uses this checkout and this working directory, which the nodes must see under the same
paths (a shared file system), as they must see the run directory in any case.
"""

import os
from pathlib import Path

import nemo_run as run
from nemo_run.config import get_nemorun_home

SIGNAL_S = 300
"""How long before the end of its time a job is told to leave."""


@run.cli.factory
def local() -> run.Config[run.LocalExecutor]:
    """This machine; jobs one after the other."""
    return run.Config(run.LocalExecutor, packager=run.Config(run.Packager))


@run.cli.factory
def slurm(
    nodes: int = 1,
    account: str = os.environ.get("SBATCH_ACCOUNT", ""),
    partition: str = os.environ.get("SBATCH_PARTITION", ""),
    time: str = os.environ.get("SBATCH_TIMELIMIT", "04:00:00"),
    gpus_per_node: int = 8,
    container_image: str = "",
) -> run.Config[run.SlurmExecutor]:
    """From a login node: one task a node, all its GPUs, the node alone.

    Account, partition and time are by default those of sbatch's own environment variables. ``container_image`` needs
    pyxis; checkout and working directory are mounted where they are.
    """
    here = sorted({str(Path.cwd()), str(Path(__file__).parents[2])})
    return run.Config(
        run.SlurmExecutor,
        account=account,
        partition=partition or None,
        time=time,
        nodes=nodes,
        ntasks_per_node=1,
        gpus_per_node=gpus_per_node or None,
        exclusive=True,
        mem="0",
        container_image=container_image or None,
        container_mounts=[f"{folder}:{folder}" for folder in here],
        # without the second, a job whose predecessor failed would wait for ever
        additional_parameters={"kill-on-invalid-dep": "yes"},
        # any other directory than that in which NeMo-Run writes would have to be filled by hand
        tunnel=run.Config(run.LocalTunnel, job_dir=os.path.join(get_nemorun_home(), "experiments")),
        packager=run.Config(run.Packager),
        poll_estimated_start_time=False,
    )
