"""Batch scripts for SLURM: the text of ``slurm/*.sbatch``, and of what ``dtrain submit`` sends."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from dtrain.errors import ConfigError

Kind = Literal["one_node", "many_nodes", "srun_per_gpu", "array"]
_SEVERAL = ("many_nodes", "srun_per_gpu")  # nodes

_ABOUT: dict[Kind, str] = {
    "one_node": """\
# Trains on one node: torchrun starts a rank for each GPU of the job.
#
#   sbatch --gpus-per-node=8 one_node.sbatch train.py [ARGUMENTS OF train.py]
#   RANKS=2 sbatch one_node.sbatch train.py            without GPUs: so many ranks
""",
    "many_nodes": """\
# Trains on several nodes: a torchrun on each starts a rank for each GPU.
#
#   sbatch --nodes=4 --gpus-per-node=8 many_nodes.sbatch train.py [ARGUMENTS OF train.py]
#   RANKS=2 sbatch many_nodes.sbatch train.py          without GPUs: so many ranks a node
""",
    "srun_per_gpu": """\
# Trains on several nodes without torchrun: srun starts a task for each rank.
#
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 srun_per_gpu.sbatch train.py [ARGUMENTS]
#   sbatch --ntasks-per-node=2 srun_per_gpu.sbatch train.py       without GPUs
#
# With --gpus-per-task=1 instead of --gpus-per-node each task sees one GPU: that is right, too.
""",
    "array": """\
# A sweep: trains several times, each on one node, each as a job of its own.
#
#   sbatch --gpus-per-node=1 array.sbatch train.py [ARGUMENTS OF train.py]
#
# What each adds to the arguments is in `sweep` below; --array counts its lines, from 0.
""",
}

_WHY = {
    "exclusive": "whole nodes, with all their CPUs",
    "open-mode": "a job that is requeued goes on in the same log",
    "requeue": "a job whose node dies starts again",
    "signal": "so long before its end, or when preempted: see leave",
}

_SWEEP = """
sweep=(
    "--lr=1e-3 --run-dir=runs/sweep-0"
    "--lr=3e-3 --run-dir=runs/sweep-1"
    "--lr=1e-2 --run-dir=runs/sweep-2"
)
read -r -a more <<<"${sweep[SLURM_ARRAY_TASK_ID]}"
set -- "$@" "${more[@]}"
"""

_TORCHRUN_SETTINGS = """
ranks=${RANKS:-${SLURM_GPUS_ON_NODE:-1}} # of this node; as many on each
threads=$((SLURM_CPUS_ON_NODE / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

# Else, in torch 2.13, a restart within the job (RESTARTS=1 sbatch ...) cannot connect.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
"""

_SRUN_SETTINGS = """
threads=$((SLURM_CPUS_ON_NODE / ${SLURM_NTASKS_PER_NODE:-1}))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
"""

_MEET = """
# All meet at this node, the first of the job, by its name, at a port that nothing else has there.
host=$(hostname) port=$((10000 + SLURM_JOB_ID % 10000))
getent hosts "$host" >/dev/null || [[ $? != 2 ]] || {
    echo "dtrain: this node's own name, $host, does not resolve, so the others cannot find it:" \\
        "not started. Have it put into /etc/hosts or the DNS of all nodes."
    exit 1
}
taken() { (: <"/dev/tcp/$1/$port") 2>/dev/null; }
while taken "$host" || taken localhost; do
    echo "dtrain: port $port of $host is taken by something else; looking for another"
    port=$((10000 + RANDOM % 10000))
done
"""

_SPARES = """
# Of the job's nodes, @SPARES@ may stay out: all are measured, and the slowest, or who does not
# answer, is left out. The run is on the others.
nodes=$((SLURM_NNODES - @SPARES@)) first=$SLURMD_NODENAME chosen=$PWD/.dtrain-nodes-$SLURM_JOB_ID
trap 'scontrol requeue "$SLURM_JOB_ID"; exit' USR1 # told to leave before anything has begun
rm -f "$chosen"
MASTER_ADDR=$host timeout 120 srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 \\
    --cpus-per-task="$SLURM_CPUS_ON_NODE" \\
    "${pyxis[@]}" "${container[@]}" "${PYTHON:-python}" -m dtrain health --keep="$nodes" \\
    --file="$chosen"
if [[ $(grep -cs . "$chosen") == "$nodes" ]]; then
    on=(--nodes="$nodes" --ntasks="$nodes" --nodelist="$(paste -sd, "$chosen")")
    first=$(head -n 1 "$chosen")
    # Where this node is not among them, they meet at the first that is.
    [[ $first == "$SLURMD_NODENAME" ]] ||
        host=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname)
else
    echo "dtrain: of $SLURM_NNODES nodes no $nodes were found in order: trying this one and others"
    on=(--nodes="$nodes" --ntasks="$nodes" --nodelist="$SLURMD_NODENAME")
fi
rm -f "$chosen"
export DTRAIN_HEALTH=off # they have been measured

at_first() { # runs a command on the first node of the run
    local there=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$first")
    [[ $first != "$SLURMD_NODENAME" ]] || there=()
    "${there[@]}" bash -c "$1"
}
"""

_LEAVE = """\
    for rank in $(ranks); do kill -USR1 "$rank"; done
"""

_LEAVE_AT_FIRST = """\
    at_first "$(declare -f having ranks); "'for rank in $(ranks); do kill -USR1 "$rank"; done'
"""

_PLACE = """
# What a cluster's nodes need before Python runs, and containers: take the # away where it fits. All
# that the job reads and writes (the script, run_dir, this folder) must be seen inside.
#module load cuda
#PYTHON=python container=(apptainer exec --nv --bind "$PWD" image.sif)
#PYTHON=python pyxis=(--container-image=image.sqsh --container-mounts="$PWD:$PWD")
#pyxis+=(--container-workdir="$PWD")
"""

_START_TORCHRUN = """\
srun --quiet --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \\
    --kill-on-bad-exit=1 --wait=60 \\
    "${pyxis[@]}" "${container[@]}" "${PYTHON:-python}" -m dtrain.cluster.torchrun \\
    --nnodes="$SLURM_NNODES" --nproc-per-node="$ranks" --max-restarts="${RESTARTS:-0}" """

_AT_ENDPOINT = """\\
    --rdzv-backend=c10d --rdzv-endpoint="$host:$port" \\
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" """

_START_SRUN = """\
srun --quiet --cpus-per-task="$((threads > 0 ? threads : 1))" --kill-on-bad-exit=1 --wait=60 \\
    "${pyxis[@]}" "${container[@]}" "${PYTHON:-python}" """

_JOB = """
# Here dtrain says how the run stands (a copy of run_dir/status.json); all nodes must see it.
export DTRAIN_STATUS_FILE=$PWD/.dtrain-status-$SLURM_JOB_ID.json
field() { # prints one line of that
    local found
    found=$(sed -n "s/^ \\"$1\\": //p" "$DTRAIN_STATUS_FILE" 2>/dev/null)
    found=${found%,} found=${found#\\"} found=${found%\\"}
    printf '%b\\n' "${found//\\\\\\"/\\"}" | head -n 1
}

before=$(field sentence)
[[ ! $before ]] || echo "dtrain: the start before ended without a word: $before"
rm -f "$DTRAIN_STATUS_FILE"

having() { xargs -r grep -lsxz "$@"; } # of environments, those in which a variable is so
ranks() { # prints this node's ranks. Not by scontrol, which may be missing; nor a rank's children
    local all file parent
    all=$(echo /proc/[0-9]*/environ | having -F "DTRAIN_STATUS_FILE=$DTRAIN_STATUS_FILE" |
        having -F "SLURMD_NODENAME=$SLURMD_NODENAME" | having '@MARK@=.*')
    for file in $all; do
        parent=$(sed -n 's/^PPid:[[:space:]]*//p' "${file%environ}status" 2>/dev/null)
        [[ $all == *"/proc/$parent/"* ]] || echo "$file" | cut -d/ -f3
    done
}

leave() { # passes on to this node's ranks that the job is to leave: all save and end together
    # Before training begins the signal would kill them; after its end there is none to tell.
    until [[ $(field status) == running ]]; do
        kill -0 "$step" 2>/dev/null || return 0
        sleep 1
    done
    # To the ranks only: it would kill torchrun, whose children they are.
@LEAVE@}
trap 'leave; again=yes' USR1
trap ended=yes TERM # SLURM ends the job, and tells the ranks as well

job=$SLURM_JOB_ID # which in an array may stand for all of its jobs
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
ask() { # what SLURM thinks of the job; a controller that is being restarted is given a minute
    local columns=State:20,RestartCnt:20,Reason:100
    for _ in {1..6}; do
        read -r state restarts why < <(squeue -h -j "$job" -O "$columns" 2>&1)
        [[ ! $state =~ ^[A-Z_]+$ ]] && type -P squeue >/dev/null || break
        [[ ! $state ]] || sleep 10 # else SLURM has ended squeue, with the job
    done
}

# srun by itself would take one CPU for a task. If a node or rank is lost, it ends the others.
@START@"$@" &
step=$! again=yes ended='' state=''
while [[ $again ]]; do # a signal ends the wait, and only that
    again=''
    wait "$step"
    code=$?
    [[ ! $ended ]] || ask
    [[ ! $ended || $state != RUNNING ]] || again=yes ended='' # a TERM of somebody else
done
if [[ $ended ]]; then # what is not over in KillWait seconds, SLURM kills: this script as well
    grace=$(scontrol show config 2>/dev/null | sed -n 's/^KillWait *= *\\([0-9]*\\).*/\\1/p')
    for ((left = 4 * (${grace:-30} - 2); left > 0; left--)); do
        kill -0 "$step" 2>/dev/null || break
        sleep 0.25
    done
    kill -0 "$step" 2>/dev/null || { wait "$step"; code=$?; }
fi

tell() { # tell WHAT_SLURM_DID WHAT_NEXT: the cause in dtrain's own words, and the fate
    local sentence
    sentence=$(field sentence)
    sentence=${sentence:-ended with status $code before training began, or without a run_dir}
    rm -f "$DTRAIN_STATUS_FILE"
    echo "dtrain: ${1:+$1: }$sentence$2"
}

# Once more, unless the run is finished, or has failed three times in a row at the same step. And
# not where SLURM has ended the job (scancel), or requeues it by itself (preemption).
ask
requeued=''
[[ $(field status) == finished && $code == 0 ]] && over=yes || over='' # or killed between two fits
if [[ $state == RUNNING && ! $over && $(field requeue) == true ]]; then
    if said=$(scontrol requeue "$job" 2>&1); then
        requeued=yes
        sleep 5 &>/dev/null & # SLURM has its say first, and ends this
        [[ $ended ]] || wait $!
    else
        ask # SLURM may have ended the job meanwhile
    fi
fi
later='; submitted again with the same run_dir it goes on'
if [[ $requeued ]]; then
    tell '' ": requeued as job $job"
elif [[ $state == COMPLETING && $restarts -gt ${SLURM_RESTART_COUNT:-0} ]]; then
    lost=$(sinfo -h -n "$SLURM_JOB_NODELIST" -t down -o %N 2>/dev/null | paste -sd,)
    tell "${lost:+node $lost is lost}" ': SLURM requeues it'
elif [[ $(field status) == finished ]]; then
    [[ $code == 0 ]] && late='' || late="; then the script ended with status $code"
    tell '' "$late"
elif [[ $state == COMPLETING ]]; then
    [[ $why == TimeLimit ]] && by='ended by its time limit' || by='cancelled by SLURM'
    tell "$by" "$later"
elif [[ $(field requeue) != true ]]; then
    tell '' ': not requeued'
elif [[ $state == RUNNING ]]; then
    tell '' ": not requeued (${said##*line *[0-9]: })$later"
    code=1
else
    tell '' ": not requeued, for squeue does not say how the job is ($state $restarts $why)$later"
    code=1
fi
exit "$code"
"""


def render(
    kind: Kind,
    *,
    options: Mapping[str, str | None] | None = None,
    command: Sequence[str] = (),
    python: str = "",
    ranks: int | None = None,
    spares: int = 0,
    health: bool = True,
) -> str:
    """Returns a batch script with ``options`` (no dashes; "" a flag, None without) of sbatch.

    What is empty or None the script takes from sbatch's arguments, ``$PYTHON``, and ``$RANKS`` or
    the node's GPUs. Of its nodes, ``spares`` may stay out. Raises ConfigError where there is no
    such kind, or it cannot have spares.
    """
    if kind not in get_args(Kind):
        raise ConfigError(f"kind={kind!r}: choose one of {', '.join(get_args(Kind))}")
    if spares and (kind != "many_nodes" or not health):
        raise ConfigError("spares: they are for torchrun on several nodes, which are measured")
    torchrun, sweep, several = kind != "srun_per_gpu", kind == "array", kind in _SEVERAL
    wanted: dict[str, str | None] = {
        "job-name": "dtrain",
        "nodes": "2" if several else "1",
        "ntasks-per-node": "1",
        **({"exclusive": ""} if several else {}),
        **({"array": "0-2"} if sweep else {}),
        "output": "%x-%A_%a.log" if sweep else "%x-%j.log",
        "open-mode": "append",
        "requeue": "",
        "signal": "B:USR1@120",
        **(options or {}),
    }
    given = [f"PYTHON={shlex.quote(python)}\n"] if python else []
    given += [f"RANKS={ranks}\n"] if ranks is not None else []
    given += [] if health else ["export DTRAIN_HEALTH=off\n"]
    given += [f"set -- {shlex.join(command)}\n"] if command else []
    if "array" in wanted and any("{task}" in word for word in command):
        given += ['set -- "${@//\\{task\\}/$SLURM_ARRAY_TASK_ID}"\n']
    mark, start = "SLURM_STEP_ID", _START_SRUN
    if torchrun:
        mark = "TORCHELASTIC_RUN_ID"
        start = _START_TORCHRUN + (_AT_ENDPOINT if several else "--standalone ")
    leave = _LEAVE
    if spares:
        leave = _LEAVE_AT_FIRST
        start = start.replace("$SLURM_NNODES", "$nodes").replace(
            "srun", 'srun "${on[@]}" \\\n   ', 1
        )
    parts = [
        "#!/usr/bin/env bash\n",
        _ABOUT[kind] if not command else "# Made by `dtrain submit`.\n",
        *(_directive(name, value) for name, value in wanted.items() if value is not None),
        *(["\n", *given] if given else []),
        _SWEEP if sweep else "",
        _TORCHRUN_SETTINGS if torchrun else _SRUN_SETTINGS,
        _MEET if several else "",
        "" if torchrun else "export MASTER_ADDR=$host MASTER_PORT=$port\n",
        _PLACE,
        _SPARES.replace("@SPARES@", str(spares)) if spares else "",
        _JOB.replace("@MARK@", mark).replace("@LEAVE@", leave).replace("@START@", start),
    ]
    return "".join(parts)


def _directive(name: str, value: str) -> str:
    line = f"#SBATCH --{name}" + (f"={shlex.quote(value)}" if value else "")
    return f"{line:<35} # {_WHY[name]}\n" if name in _WHY else f"{line}\n"
