#!/usr/bin/env bash
# A real Slurm with several nodes on one machine, to test what is submitted with sbatch: each node is a network, host
# name and mount namespace with its own slurmd and fake GPUs. Needs root and Debian's Slurm packages.
#   slurm_sandbox.sh install         Debian's packages (munge slurmctld slurmd slurm-client), about 13 MB
#   slurm_sandbox.sh up              start; returns when all nodes are idle
#   slurm_sandbox.sh down            end exactly what `up` started; remove namespaces and the lines in /etc/hosts
#   slurm_sandbox.sh env             the export line that clients need (SLURM_CONF)
#   slurm_sandbox.sh status
#   slurm_sandbox.sh kill-node n2    as if its power had failed: no packet more from it, no process left
#   slurm_sandbox.sh start-node n2   with power again
# Knobs (environment), to be the same at every call; two sandboxes side by side need all of the first row to differ:
#   SANDBOX_DIR=/tmp/slurm-sandbox  SANDBOX_BRIDGE=slbr0  SANDBOX_SUBNET=10.77.0  SANDBOX_PREFIX=n  SANDBOX_PORT=16817
#   NODES=4  GPUS=8 (0: none)  CPUS=64  MEM_MB=1000000   what each node claims to have
#   KILLWAIT=10  GRACE=60 (of the preemptable partition)  SLURMD_TIMEOUT=300 (a silent node is down after)  in seconds
#   PYXIS=1          srun takes --container-* (fake_pyxis.c; needs gcc and libslurm-dev)
#   ACCT=1           sacct works (also installs slurmdbd and mariadb-server-core, +48 MB)
set -euo pipefail
D=${SANDBOX_DIR:-${TMPDIR:-/tmp}/slurm-sandbox}
BRIDGE=${SANDBOX_BRIDGE:-slbr0} SUBNET=${SANDBOX_SUBNET:-10.77.0} PREFIX=${SANDBOX_PREFIX:-n} PORT=${SANDBOX_PORT:-16817}
NODES=${NODES:-4} GPUS=${GPUS:-8} CPUS=${CPUS:-64} MEM_MB=${MEM_MB:-1000000}
KILLWAIT=${KILLWAIT:-10} GRACE=${GRACE:-60} SLURMD_TIMEOUT=${SLURMD_TIMEOUT:-300}
CTL=$SUBNET.254 TAG="# slurm-sandbox $BRIDGE"
HOST=$(hostname -s)
export SLURM_CONF=$D/slurm.conf

spawn() { # name command...: a session of its own, its process id noted
  local name=$1; shift
  setsid "$@" </dev/null >>"$D/log/$name.out" 2>&1 &
  echo $! >"$D/pid/$name"
}

quietly() { # try for 10 s
  for _ in $(seq 200); do "$@" 2>/dev/null && return; sleep .05; done
  echo "slurm_sandbox: gave up on: $*" >&2; return 1
}

install() {
  local more=()
  [ -n "${ACCT:-}" ] && more+=(slurmdbd mariadb-server-core) # not mariadb-server, which changes perl
  [ -n "${PYXIS:-}" ] && more+=(libslurm-dev)
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    munge slurmctld slurmd slurm-client iproute2 "${more[@]}" >/dev/null
  slurmd -V
}

configure() {
  mkdir -p "$D"/{log,pid,state,spool,munge,dev}; chmod 755 "$D"
  # GPUs are never opened, but Slurm insists on device nodes; counted only, it would not set CUDA_VISIBLE_DEVICES
  for ((g = 0; g < GPUS; g++)); do rm -f "$D/dev/nvidia$g"; mknod "$D/dev/nvidia$g" c 195 "$g"; done
  {
    cat <<C
ClusterName=$BRIDGE
SlurmctldHost=$HOST($CTL)
SlurmctldPort=$PORT
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$D/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,bf_hetjob_immediate=1,sched_interval=5,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=$KILLWAIT
MinJobAge=86400
InactiveLimit=0
ReturnToService=2
SlurmctldTimeout=300
SlurmdTimeout=$SLURMD_TIMEOUT
SlurmdParameters=config_overrides
MailProg=/bin/true
PlugStackConfig=$D/plugstack.conf
JobCompType=jobcomp/filetxt
JobCompLoc=$D/jobcomp.log
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/pid/slurmctld.self
SlurmdPidFile=$D/pid/slurmd-%n.self
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
C
    if [ -n "${ACCT:-}" ]; then
      printf '%s\n' AccountingStorageType=accounting_storage/slurmdbd "AccountingStorageHost=$CTL" \
        "AccountingStoragePort=$((PORT + 2))" "AccountingStoragePass=$D/munge/socket" AccountingStorageTRES=gres/gpu
    else echo AccountingStorageType=accounting_storage/none; fi
    for ((i = 1; i <= NODES; i++)); do
      echo "NodeName=$PREFIX$i NodeHostname=$PREFIX$i NodeAddr=$SUBNET.$((10 + i)) Port=16818 CPUs=$CPUS Boards=1" \
        "SocketsPerBoard=2 CoresPerSocket=$((CPUS / 2)) ThreadsPerCore=1 RealMemory=$MEM_MB" \
        "$([ "$GPUS" -gt 0 ] && echo "Gres=gpu:h100:$GPUS") State=UNKNOWN"
    done
    local all="Nodes=${PREFIX}[1-$NODES] MaxTime=04:00:00 DefaultTime=10 State=UP"
    echo "PartitionName=batch $all Default=YES PriorityTier=10 PreemptMode=OFF"
    echo "PartitionName=preempt $all PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE"
  } >"$D/slurm.conf"
  : >"$D/gres.conf"
  [ "$GPUS" -gt 0 ] && echo "NodeName=${PREFIX}[1-$NODES] Name=gpu Type=h100 File=$D/dev/nvidia[0-$((GPUS - 1))]" >"$D/gres.conf"
  echo "CgroupAutomount=no" >"$D/cgroup.conf"
  : >"$D/plugstack.conf"
  if [ -n "${PYXIS:-}" ]; then
    gcc -shared -fPIC -O1 -o "$D/fake_pyxis.so" "$(dirname "$(readlink -f "$0")")/fake_pyxis.c"
    echo "required $D/fake_pyxis.so" >"$D/plugstack.conf"
  fi
  # no DNS in a node: every look-up there would wait 10 s for a resolver that cannot be reached
  sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$D/nsswitch.conf"
}

network_up() {
  ip link add "$BRIDGE" type bridge; ip addr add "$CTL/24" dev "$BRIDGE"; ip link set "$BRIDGE" up
  for ((i = 1; i <= NODES; i++)); do
    local ns=$BRIDGE-$i
    ip netns add "$ns"
    ip link add "$BRIDGE-v$i" type veth peer name eth0 netns "$ns"
    ip link set "$BRIDGE-v$i" master "$BRIDGE" up
    ip -n "$ns" addr add "$SUBNET.$((10 + i))/24" dev eth0
    ip -n "$ns" link set lo up; ip -n "$ns" link set eth0 up
    ip -n "$ns" route add default via "$CTL"
    echo "$SUBNET.$((10 + i)) $PREFIX$i $TAG" >>/etc/hosts
  done
}

network_down() {
  sed "/$TAG\$/d" /etc/hosts >"$D/hosts.new" && cat "$D/hosts.new" >/etc/hosts
  for ns in /run/netns/"$BRIDGE"-*; do [ -e "$ns" ] && ip netns del "$(basename "$ns")"; done
  if ip link show "$BRIDGE" >/dev/null 2>&1; then ip link del "$BRIDGE"; fi
}

start_slurmd() { # number. nsenter, not `ip netns exec`: that hides /sys/fs/cgroup, without which slurmd does not start
  mkdir -p "$D/spool/$PREFIX$1"
  spawn "slurmd-$PREFIX$1" nsenter --net="/run/netns/$BRIDGE-$1" unshare --uts --mount sh -c \
    "hostname $PREFIX$1; mount --bind $D/nsswitch.conf /etc/nsswitch.conf; exec slurmd -D -N $PREFIX$1 -f $D/slurm.conf"
}

all_idle() { [ "$(sinfo -h -N -p batch -t idle -o %N | wc -l)" = "$NODES" ]; }

up() {
  configure; network_up
  [ -s "$D/munge/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$D/munge/munge.key")
  chown -R munge:munge "$D/munge"; chmod 711 "$D/munge"
  spawn munged setpriv --reuid=munge --regid=munge --init-groups /usr/sbin/munged -F --force \
    --key-file="$D/munge/munge.key" --socket="$D/munge/socket" --pid-file="$D/munge/munged.pid" \
    --seed-file="$D/munge/seed" --log-file="$D/munge/munged.log" --num-threads=2
  quietly test -S "$D/munge/socket"
  [ -n "${ACCT:-}" ] && accounting_up
  spawn slurmctld slurmctld -D -c -f "$D/slurm.conf"
  for ((i = 1; i <= NODES; i++)); do start_slurmd "$i"; done
  quietly all_idle || { echo "nodes did not come up; see $D/log" >&2; sinfo >&2 || true; return 1; }
  echo "up: $(sinfo -h -p batch -o '%N %T %G')"
}

accounting_up() { # slurmdbd and a mariadbd of its own
  local db=$D/db
  if [ ! -d "$db/mysql" ]; then
    mkdir -p "$db/mysql" # mariadb-install-db wants a program that the core package lacks
    { echo "use mysql;"; cat /usr/share/mysql/mysql_{system_tables,performance_tables,system_tables_data}.sql; } |
      mariadbd --no-defaults --user=root --bootstrap --datadir="$db" --innodb-log-file-size=8M --skip-log-bin \
        >"$D/log/mariadb-install.out" 2>&1
  fi
  printf '%s\n' "CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';" \
    "GRANT ALL ON *.* TO 'slurm'@'127.0.0.1';" >"$D/db.init.sql" # one statement a line
  spawn mariadbd mariadbd --no-defaults --user=root --datadir="$db" --socket="$D/db.sock" --bind-address=127.0.0.1 \
    --port=$((PORT + 3)) --pid-file="$D/db.pid" --init-file="$D/db.init.sql" --innodb-buffer-pool-size=64M \
    --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 --skip-log-bin --skip-name-resolve
  quietly test -S "$D/db.sock"
  cat >"$D/slurmdbd.conf" <<C
AuthType=auth/munge
AuthInfo=socket=$D/munge/socket
DbdHost=$HOST
DbdAddr=$CTL
DbdPort=$((PORT + 2))
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT + 3))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
CommitDelay=0
LogFile=$D/log/slurmdbd.log
PidFile=$D/pid/slurmdbd.self
C
  chmod 600 "$D/slurmdbd.conf"
  spawn slurmdbd env SLURM_CONF="$D/slurm.conf" slurmdbd -D
  quietly bash -c "exec 3<>/dev/tcp/$CTL/$((PORT + 2))"
  for what in "cluster $BRIDGE" "account acct description=sandbox organization=sandbox" "user root account=acct"; do
    sacctmgr -i add $what >/dev/null 2>&1 || true # there from an earlier time
  done
}

ended() { ! kill -0 "$1"; }

end() { # name of a spawned process
  [ -s "$D/pid/$1" ] || return 0
  local pid; pid=$(cat "$D/pid/$1")
  kill -TERM "$pid" 2>/dev/null || true
  quietly ended "$pid" || kill -KILL "$pid" || true
  rm -f "$D/pid/$1"
}

down() {
  scancel -u root 2>/dev/null || true
  for _ in $(seq 100); do [ -z "$(squeue -h -t R,CG 2>/dev/null)" ] && break; sleep .1; done
  for f in "$D"/pid/slurmd-*; do # all at once: each needs 1 to 2 s
    case $f in *.self) ;; *) [ -s "$f" ] && kill -TERM "$(cat "$f")" 2>/dev/null || true ;; esac
  done
  for f in "$D"/pid/slurmd-*; do case $f in *.self | *'*') ;; *) end "$(basename "$f")" ;; esac; done
  for name in slurmctld slurmdbd mariadbd munged; do end "$name"; done
  network_down
  rm -rf "$D/spool" "$D/state"
  echo down
}

kill_node() { # name
  local ns=$BRIDGE-${1#"$PREFIX"}
  ip -n "$ns" link set eth0 down # first, or its connections would be closed politely
  ip netns pids "$ns" | xargs -r kill -KILL
}

start_node() { # name
  local i=${1#"$PREFIX"}
  ip -n "$BRIDGE-$i" link set eth0 up
  ip -n "$BRIDGE-$i" route replace default via "$CTL"
  start_slurmd "$i"
}

case ${1:-} in
  install | up | down) "$1" ;;
  kill-node) kill_node "$2" ;;
  start-node) start_node "$2" ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  status) sinfo -N -o '%N %T %c %m %G'; squeue ;;
  *) sed -n 2,21p "$0"; exit 2 ;;
esac
