#!/usr/bin/env bash
# Qwen3 8B with SDPO on two H100 nodes of eight GPUs, trainers on the first and engines on the second:
#   sbatch slurm/sdpo_8b.sh [key=value ...]             from the checkout, or with SDPO_HOME set to it
#   SDPO_RECIPE=qwen3-8b-tooluse-sdpo sbatch ...        another of recipes/qwen3_8b.py
#   SDPO_DRY_RUN=1 sbatch slurm/sdpo_8b.sh              who would run where; nothing is started
#   sbatch --array=0-4 slurm/sdpo_8b.sh                 five seeds, a run directory each: RUN_DIR-seed0 ...
#SBATCH --job-name=sdpo-8b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
SDPO_RECIPE=${SDPO_RECIPE:-qwen3-8b-sciknoweval-chemistry-sdpo}
SDPO_HOME=${SDPO_HOME:-$SLURM_SUBMIT_DIR} SDPO_RUN_DIR=${SDPO_RUN_DIR:-runs/${SDPO_RECIPE//:/-}}
source "$SDPO_HOME/slurm/job.sh" || { echo "error: submit from the checkout, or set SDPO_HOME to it" >&2; exit 1; }
export SDPO_GPUS_PER_NODE=8
run_job "$SDPO_RECIPE" "$@"
