#!/usr/bin/env bash
# Llama 3.3 70B with SDPO on H100 nodes of eight GPUs: trainers on the first, engines on the last.
#   sbatch slurm/sdpo_70b.sh [key=value ...]            from the checkout, or with SDPO_HOME set to it
#   SDPO_DRY_RUN=1 sbatch slurm/sdpo_70b.sh             who would run where; nothing is started
#   SDPO_RECIPE=llama3.3-70b-sdpo-32n sbatch --nodes=32 slurm/sdpo_70b.sh
# The job needs as many nodes as the recipe fills, and says so when it has another number. As a heterogeneous job, with
# other nodes for engines: sbatch --nodes=8 OPTIONS : --nodes=8 OPTIONS slurm/sdpo_70b.sh
# Partition, account and the like: options of sbatch, or SBATCH_PARTITION=... in the environment.
#SBATCH --job-name=sdpo-70b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
SDPO_RECIPE=${SDPO_RECIPE:-llama3.3-70b-sdpo-16n}
SDPO_HOME=${SDPO_HOME:-$SLURM_SUBMIT_DIR} SDPO_RUN_DIR=${SDPO_RUN_DIR:-runs/${SDPO_RECIPE//:/-}}
source "$SDPO_HOME/slurm/job.sh" || { echo "error: submit from the checkout, or set SDPO_HOME to it" >&2; exit 1; }
export SDPO_GPUS_PER_NODE=8
run_job "$SDPO_RECIPE" "$@"
