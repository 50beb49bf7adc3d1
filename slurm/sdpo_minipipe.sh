#!/usr/bin/env bash
# MiniPipe on two CPU nodes, trainers on the first and the engine on the second:
#   sbatch slurm/sdpo_minipipe.sh [key=value ...]       from the checkout, or with SDPO_HOME set to it
#SBATCH --job-name=sdpo-minipipe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
SDPO_HOME=${SDPO_HOME:-$SLURM_SUBMIT_DIR} SDPO_RUN_DIR=${SDPO_RUN_DIR:-runs/minipipe-slurm}
source "$SDPO_HOME/slurm/job.sh" || { echo "error: submit from the checkout, or set SDPO_HOME to it" >&2; exit 1; }
export SDPO_GPUS_PER_NODE=0
run_job minipipe "$@"
