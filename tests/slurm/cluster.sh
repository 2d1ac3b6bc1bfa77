#!/usr/bin/env bash
# A real SLURM of five nodes on this machine, in a folder of its own; for tests. As root on Debian.
#
#   tests/slurm/cluster.sh start DIR      installs what is missing, starts it, waits for its nodes
#   tests/slurm/cluster.sh stop DIR       ends all that was started, jobs included
#
# Nothing outside of DIR is touched. Each node has 8 CPUs and, on paper, 2 GPUs. Jobs in the
# partition `high` preempt those in `main`, 20 seconds after they were told.
set -euo pipefail

fail() { printf 'cluster.sh: %s\n' "$*" >&2 && exit 1; }
usage='usage: cluster.sh start|stop DIR'
[[ $# == 2 ]] || fail "$usage"
nodes=(n1 n2 n3 n4 n5)

# SLURM's own variables, if this shell is in a job, and its plans for what a client does.
unset "${!SLURM_@}" "${!SBATCH_@}" "${!SRUN_@}"

install() {
    local missing=() package
    for package in slurmctld slurmd slurm-client munge procps; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
            missing+=("$package")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -qq --no-install-recommends "${missing[@]}"; } \
        >"$dir/log/apt.log" 2>&1 ||
        fail "apt-get could not install ${missing[*]}: $(tail -n 3 "$dir/log/apt.log")"
}

free_ports() { # free_ports COUNT: below those that the kernel gives to whoever asks for any
    python3 - "$1" <<'PYTHON'
import random, socket, sys
free = []
while len(free) < int(sys.argv[1]):
    port = random.SystemRandom().randrange(10000, 20000)
    with socket.socket() as probe:
        if port not in free and probe.connect_ex(("127.0.0.1", port)):
            free.append(port)
print(*free)
PYTHON
}

configure() {
    local host port ports node i
    host=$(hostname -s)
    read -r -a ports <<<"$(free_ports $((1 + ${#nodes[@]})))"
    cat >"$SLURM_CONF" <<CONF
ClusterName=dtrain
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job starts after twice this time, which is 120 seconds by default.
AuthInfo=socket=$dir/run/munge.socket,cred_expire=5
MpiDefault=none
# What needs neither cgroups nor an accounting database.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
# Seconds from TERM to KILL; and until a node that is silent is down.
KillWait=15
SlurmdTimeout=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
CONF
    for i in "${!nodes[@]}"; do
        node=${nodes[i]} port=${ports[i + 1]}
        mkdir -p "$dir/spool.$node"
        echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$port CPUs=8" \
            "RealMemory=4000 Gres=gpu:2" >>"$SLURM_CONF"
        echo "NodeName=$node Name=gpu File=/dev/null,/dev/zero" >>"$dir/gres.conf"
    done
    cat >>"$SLURM_CONF" <<'CONF'
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
CONF
}

wait_for() { # wait_for WHAT COMMAND ...: for 60 seconds
    local end=$((SECONDS + 60))
    until "${@:2}" >/dev/null 2>&1; do
        [[ $SECONDS -lt $end ]] ||
            fail "no $1 within 60 seconds; $dir/log says: $(tail -q -n 3 "$dir"/log/*.log)"
        sleep 0.2 # polls
    done
}

all_idle() { [[ $(sinfo -h -p main -t idle -o %D) == "${#nodes[@]}" ]]; }

start() {
    [[ $EUID == 0 ]] || fail "it takes root: SLURM's daemons change to a job's user"
    mkdir -p "$dir" && chmod 755 "$dir"
    [[ ! -e $dir/slurm.conf ]] || fail "$dir has been used: choose a new folder"
    mkdir "$dir/run" "$dir/log" "$dir/state"
    install
    configure
    dd if=/dev/urandom of="$dir/munge.key" bs=1024 count=1 status=none
    chmod 600 "$dir/munge.key"
    trap 'stop' EXIT # unless all goes well
    munged --socket="$dir/run/munge.socket" --key-file="$dir/munge.key" --num-threads=2 \
        --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" \
        --seed-file="$dir/run/munged.seed" --force 2>"$dir/log/munged.start.log"
    slurmctld -f "$SLURM_CONF" -c
    for node in "${nodes[@]}"; do slurmd -f "$SLURM_CONF" -N "$node"; done
    wait_for "five idle nodes" all_idle
    trap - EXIT
    printf 'export SLURM_CONF=%s\n' "$SLURM_CONF"
}

daemons() { # prints the pids of those of DIR that still live
    local file pid
    for file in "$dir"/run/*.pid; do
        pid=$(cat "$file" 2>/dev/null) || continue
        # A pid may have been given to another process since.
        [[ ! -r /proc/$pid/cmdline ]] || ! tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF "$dir" ||
            echo "$pid"
    done
}

none_left() { [[ -z $(daemons) ]]; }
no_jobs() { [[ -z $(squeue -h) ]]; }

stop() {
    [[ -e $dir/slurm.conf ]] || fail "there is no cluster in $dir"
    if timeout 5 scancel --user=root 2>/dev/null; then wait_for "end of all jobs" no_jobs; fi
    local pids
    read -r -a pids <<<"$(daemons | tr '\n' ' ')"
    [[ ${#pids[@]} == 0 ]] || kill "${pids[@]}" 2>/dev/null || true
    wait_for "end of the daemons" none_left
}

mkdir -p "$2"
dir=$(CDPATH='' cd -- "$2" && pwd -P)
export SLURM_CONF=$dir/slurm.conf
case $1 in
start) start ;;
stop) stop ;;
*) fail "$usage" ;;
esac
