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
# Not with --gpus-per-task: a task must see all GPUs of its node, and takes the one of its number.
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

# The ranks meet at this node, the first of the job; $(hostname -i) where names do not resolve.
# The port follows from the job's number: jobs on one host do not meet.
MASTER_ADDR=$(hostname) MASTER_PORT=$((10000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
"""

_MEET = """
# The nodes meet at this one, the first of the job; $(hostname -i) where names do not resolve.
# The port follows from the job's number: jobs on one host do not meet.
endpoint=$(hostname):$((10000 + SLURM_JOB_ID % 10000))
"""

_SPARES = """
# Of the job's nodes, @SPARES@ may stay out: all are measured, and the slowest, or who does not
# answer, is left out. The run is on the others.
nodes=$((SLURM_NNODES - @SPARES@)) first=$SLURMD_NODENAME chosen=$PWD/.dtrain-nodes-$SLURM_JOB_ID
trap 'scontrol requeue "$SLURM_JOB_ID"; exit' USR1 # told to leave before anything has begun
rm -f "$chosen"
MASTER_ADDR=$(hostname) timeout 120 srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 \\
    --cpus-per-task="$SLURM_CPUS_ON_NODE" \\
    "${PYTHON:-python}" -m dtrain health --keep="$nodes" --file="$chosen"
if [[ $(grep -cs . "$chosen") == "$nodes" ]]; then
    on=(--nodes="$nodes" --ntasks="$nodes" --nodelist="$(paste -sd, "$chosen")")
    first=$(head -n 1 "$chosen")
    # Where this node is not among them, they meet at the first that is.
    [[ $first == "$SLURMD_NODENAME" ]] ||
        endpoint=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname):${endpoint##*:}
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

_LEAVE_AT_FIRST = """\
    # To the ranks only: it would kill torchrun, whose children they are.
    at_first "$(declare -f tasks); "'pkill -USR1 -P "$(tasks | paste -sd, -)"'
"""

_LEAVE_TORCHRUN = """\
    # To the ranks only: it would kill torchrun, whose children they are.
    pkill -USR1 -P "$(tasks | paste -sd, -)"
"""

_START_TORCHRUN = """\
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 --wait=60 \\
    "${PYTHON:-python}" -m torch.distributed.run --nnodes="$SLURM_NNODES" \\
    --nproc-per-node="$ranks" --max-restarts="${RESTARTS:-0}" """

_AT_ENDPOINT = """--rdzv-backend=c10d \\
    --rdzv-endpoint="$endpoint" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" """

_START_SRUN = """\
srun --cpus-per-task="$((threads > 0 ? threads : 1))" --kill-on-bad-exit=1 --wait=60 \\
    "${PYTHON:-python}" """

_JOB = """
# Here dtrain says how the run stands (a copy of run_dir/status.json); all nodes must see it.
export DTRAIN_STATUS_FILE=$PWD/.dtrain-status-$SLURM_JOB_ID.json
rm -f "$DTRAIN_STATUS_FILE"
stands() { grep -Eqs "\\"$1\\": \\"?$2\\"?" "$DTRAIN_STATUS_FILE"; }

tasks() { # prints the processes on this node that srun started
    scontrol listpids "$SLURM_JOB_ID" "$SLURMD_NODENAME" |
        awk '$3 ~ /^[0-9]+$/ && $4 ~ /^[0-9]+$/ { print $1 }'
}

leave() { # passes on to this node's ranks that the job is to leave: all save and end together
    # Before training begins, and after its end, the signal would kill them.
    until stands status running; do
        kill -0 "$step" 2>/dev/null || return 0
        sleep 1
    done
@LEAVE@}
trap 'leave; again=yes' USR1
trap again=yes TERM # SLURM ends the job, and tells the ranks as well: wait for them

# srun by itself would take one CPU for a task. If a node or rank is lost, it ends the others.
@START@"$@" &
step=$! again=yes
while [[ $again ]]; do # a signal ends the wait, and only that
    again=''
    wait "$step"
    code=$?
done

# Once more, unless the run is finished, or has failed three times in a row at the same step. And
# not where SLURM has ended the job (scancel), or requeues it by itself (preemption).
job=$SLURM_JOB_ID # which in an array may stand for all of its jobs
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
if stands requeue true && ! stands status finished &&
    [[ $(squeue -h -j "$job" -o %T) == RUNNING ]]; then
    echo "The run is not finished: requeueing job $job."
    rm -f "$DTRAIN_STATUS_FILE"
    exec scontrol requeue "$job"
fi
rm -f "$DTRAIN_STATUS_FILE"
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
    leave, start = "    tasks | xargs -r kill -USR1\n", _START_SRUN
    if torchrun:
        leave = _LEAVE_TORCHRUN
        start = _START_TORCHRUN + (_AT_ENDPOINT if several else "--standalone ")
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
        _MEET if several and torchrun else "",
        _SPARES.replace("@SPARES@", str(spares)) if spares else "",
        _JOB.replace("@LEAVE@", leave).replace("@START@", start),
    ]
    return "".join(parts)


def _directive(name: str, value: str) -> str:
    line = f"#SBATCH --{name}" + (f"={shlex.quote(value)}" if value else "")
    return f"{line:<35} # {_WHY[name]}\n" if name in _WHY else f"{line}\n"
