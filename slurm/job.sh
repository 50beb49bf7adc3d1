# Sourced by the batch scripts: run_job RECIPE [key=value ...] is the whole job. One process a node does the work
# (megatron_sdpo/launch/cluster); what can only be done outside a container is here: srun, warnings, requeue.
# SDPO_HOME is the checkout, SDPO_RUN_DIR where the run is; the working directory is that of the submission.

say() { echo "$(date +%FT%T) $*"; }

# {group 0} {group 1} ..., the nodes of a group separated by commas
job_nodes() {
  local i
  if [ -z "${SLURM_HET_SIZE:-}" ]; then scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,; return; fi
  for ((i = 0; i < SLURM_HET_SIZE; i++)); do
    local list=SLURM_JOB_NODELIST_HET_GROUP_$i
    scontrol show hostnames "${!list}" | paste -sd,
  done | paste -sd' '
}

# CPUs that every node of the job has: without asking for them a step may be bound to one.
job_cpus() {
  local name
  for name in SLURM_JOB_CPUS_PER_NODE ${!SLURM_JOB_CPUS_PER_NODE_HET_GROUP_*}; do
    echo "${!name:-}" | sed 's/([^)]*)//g' | tr , '\n'
  done | sort -n | sed '/^$/d' | head -1
}

# The code as it was when the job was submitted: RUN_DIR/code; that of an earlier job stays as code-N when it differs.
snapshot() {
  local code=$SDPO_RUN_DIR/code new=$SDPO_RUN_DIR/.code.new number=1
  [ "${SLURM_RESTART_COUNT:-0}" != 0 ] && [ -d "$code" ] && return
  rm -rf "$new"; mkdir -p "$new"
  tar -C "$SDPO_HOME" --exclude=__pycache__ -cf - megatron_sdpo recipes slurm | tar -C "$new" -xf -
  if git -C "$SDPO_HOME" rev-parse HEAD >/dev/null 2>&1; then
    { git -C "$SDPO_HOME" rev-parse HEAD; git -C "$SDPO_HOME" diff HEAD --stat; } >"$new/COMMIT"
  fi
  if [ -d "$code" ]; then
    if diff -rq -x __pycache__ "$code" "$new" >/dev/null; then rm -rf "$new"; return; fi
    while [ -e "$code-$number" ]; do number=$((number + 1)); done
    mv "$code" "$code-$number"
  fi
  mv "$new" "$code"
}

# RUN_DIR/slurm/attempt-N holds all logs of this start; RUN_DIR/slurm/latest and RUN_DIR/logs lead there.
new_attempt() {
  local slurm=$SDPO_RUN_DIR/slurm number=1
  mkdir -p "$slurm"
  while ! mkdir "$slurm/$(printf 'attempt-%03d' "$number")" 2>/dev/null; do number=$((number + 1)); done
  SDPO_ATTEMPT=$(printf 'attempt-%03d' "$number")
  ln -sfn "$SDPO_ATTEMPT" "$slurm/latest"
  if [ -d "$SDPO_RUN_DIR/logs" ] && [ ! -L "$SDPO_RUN_DIR/logs" ]; then # of runs outside Slurm
    mv "$SDPO_RUN_DIR/logs" "$slurm/before-$SDPO_ATTEMPT"
  fi
  ln -sfn slurm/latest "$SDPO_RUN_DIR/logs"
  rm -f "$SDPO_RUN_DIR/stop" "$SDPO_RUN_DIR/stopped"
}

field() { sed -nE "s/.*\"$1\": \"?([^\",}]*)\"?.*/\1/p" "$SDPO_RUN_DIR/status.json" 2>/dev/null || true; }

# Warnings reach this script (--signal=B:USR1@...) or the nodes' processes (preemption); each leaves a request to stop.
warned() { say "got $1: asked the trainer to save and stop"; echo "$2" >"$SDPO_RUN_DIR/stop"; }

requeue() {
  local state excluded
  trap '' TERM USR1 # what puts the job back ends this script; the commands after it must still run
  state=$(scontrol show job "$SLURM_JOB_ID" | grep -oE 'JobState=[A-Z_]+' | head -1)
  # One that is cancelled is COMPLETING by now, as is one that Slurm itself puts back; neither must be put back here.
  if [ "$state" != JobState=RUNNING ]; then say "the job is being ended (${state#*=}): not put back into the queue"; exit 1; fi
  if [ -s "$SDPO_RUN_DIR/excluded-nodes" ]; then
    excluded=$(sort -u "$SDPO_RUN_DIR/excluded-nodes" | paste -sd,)
    say "back into the queue, without $excluded"
    scontrol requeuehold "$SLURM_JOB_ID" # what a running job excludes cannot be changed
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded"
    scontrol release "$SLURM_JOB_ID"
  else
    say "back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
}

run_job() {
  local step mounts pyxis=() groups=()
  set -euo pipefail
  # shellcheck source=slurm/site.env
  source "$SDPO_HOME/slurm/site.env"
  if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # one run a task, of its own seed unless the arguments set another
    SDPO_RUN_DIR+=-seed$SLURM_ARRAY_TASK_ID
    set -- "$1" "seed=$SLURM_ARRAY_TASK_ID" "${@:2}"
  fi
  SDPO_RUN_DIR=$(realpath -m "$SDPO_RUN_DIR")
  mkdir -p "$SDPO_RUN_DIR"
  snapshot
  new_attempt
  trap 'warned USR1 "the time limit is near (SIGUSR1)"' USR1
  trap 'warned TERM "preempted or out of time (SIGTERM)"' TERM
  SDPO_NODES=$(job_nodes)
  export ${!SDPO_*}
  export MEGATRON_SDPO_PORTS=$SDPO_PORTS PYTHONPATH=$SDPO_RUN_DIR/code:$PWD PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
  if [ -n "$SDPO_CONTAINER" ]; then
    mounts=$(printf '%s\n' "$PWD" "$SDPO_RUN_DIR" | sort -u | sed 's/.*/&:&/' | paste -sd,)
    pyxis=(--container-image="$SDPO_CONTAINER" --container-workdir="$PWD" --no-container-mount-home
      --container-mounts="$mounts${SDPO_MOUNTS:+,$SDPO_MOUNTS}")
  fi
  [ -n "${SLURM_HET_SIZE:-}" ] && groups=(--het-group="0-$((SLURM_HET_SIZE - 1))")
  say "job $SLURM_JOB_ID, $SDPO_ATTEMPT of $SDPO_RUN_DIR on $SDPO_NODES"
  # shellcheck disable=SC2086
  srun "${groups[@]}" --ntasks-per-node=1 --cpus-per-task="$(job_cpus)" --cpu-bind=none --kill-on-bad-exit=0 --wait=60 "${pyxis[@]}" $SDPO_SRUN \
    "$SDPO_PYTHON" -m megatron_sdpo.launch.cluster.node "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a warning ends one wait
  if [ "$(field attempt)" != "$SDPO_ATTEMPT" ]; then
    say "error: the nodes' processes did not start; what srun said is above"
    exit 1
  fi
  case $(field state) in
    finished | planned) say "$(field state)" ;;
    interrupted | running) requeue ;; # running: the first node's process is gone, without a word
    *) exit 1 ;;
  esac
}
