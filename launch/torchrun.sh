#!/usr/bin/env bash
# Starts a training script under torchrun: one rank per GPU, or two CPU ranks without GPUs.
#
#   launch/torchrun.sh SCRIPT [ARGUMENTS OF SCRIPT]
#
# Environment:
#   RANKS           ranks on this node         (default: its GPUs, or 2 without)
#   RESTARTS        restarts after a failure   (default: 0)
#   NNODES          nodes in all               (default: 1)
# and with several nodes, the same on each:
#   RDZV_ENDPOINT   HOST:PORT where they meet  (default: MASTER_ADDR:MASTER_PORT)
#   RDZV_ID         the name of the run        (default: dtrain)
#   NODE_RANK       this node's number; 0 where that port is opened (default: found out there)
set -euo pipefail

fail() { printf 'torchrun.sh: %s\n' "$*" >&2 && exit 2; }
whole() { [[ $2 =~ ^[0-9]+$ && $2 -ge $3 ]] || fail "$1 is '$2'; it must be a number from $3 up."; }

[[ $# -gt 0 ]] || fail "which script? Usage: launch/torchrun.sh SCRIPT [ARGUMENTS OF SCRIPT]"
[[ $1 == -* || -f $1 ]] || fail "there is no script '$1' (seen from $PWD)."

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python || command -v python3) ||
    fail "no Python found. launch/setup.sh makes one in .venv."

gpus() { # torch is asked, as it knows CUDA_VISIBLE_DEVICES; but not where there can be no GPU
    if command -v nvidia-smi >/dev/null || compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
        "$python" -c 'import torch; print(torch.cuda.device_count())'
    else
        echo 0
    fi
}

ranks=${RANKS:-$(gpus)}
[[ -n ${RANKS:-} || $ranks != 0 ]] || ranks=2
restarts=${RESTARTS:-0}
nodes=${NNODES:-1}
whole RANKS "$ranks" 1
whole RESTARTS "$restarts" 0
whole NNODES "$nodes" 1

if [[ -z ${RDZV_ENDPOINT:-} && $nodes -gt 1 && -n ${MASTER_ADDR:-} ]]; then
    RDZV_ENDPOINT=$MASTER_ADDR:${MASTER_PORT:-29500}
fi
if [[ -n ${RDZV_ENDPOINT:-} && -n ${NODE_RANK:-} && $restarts == 0 ]]; then
    # Who knows its place, and is not to start again, need not keep in touch with the other agents.
    # An agent that does is stuck for a quarter of an hour if the network is cut, and puts out a
    # node whose clock is some seconds off.
    whole NODE_RANK "$NODE_RANK" 0
    rendezvous=(--rdzv-backend=static "--node-rank=$NODE_RANK" "--rdzv-endpoint=$RDZV_ENDPOINT")
elif [[ -n ${RDZV_ENDPOINT:-} ]]; then
    rendezvous=(--rdzv-backend=c10d "--rdzv-endpoint=$RDZV_ENDPOINT" "--rdzv-id=${RDZV_ID:-dtrain}")
    if [[ -n ${NODE_RANK:-} ]]; then
        rendezvous+=("--rdzv-conf=is_host=$([[ $NODE_RANK == 0 ]] && echo true || echo false)")
    fi
elif [[ $nodes -gt 1 ]]; then
    fail "NNODES is $nodes: set RDZV_ENDPOINT=HOST:PORT (or MASTER_ADDR) to where the nodes meet."
else
    rendezvous=(--standalone)
fi

# In torch 2.13 the agent shares one store between all restart attempts, which then fail with
# "Connection refused" until they are used up. With this, each attempt opens a store of its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Ranks share the cores. (torchrun would take one thread for each rank, and warn.)
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    threads=$((cores / ranks))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

# After torchrun's summary one sentence says what became of the run, where dtrain is installed.
torchrun=dtrain.cluster.torchrun
"$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("dtrain") is None)' ||
    torchrun=torch.distributed.run

exec "$python" -m "$torchrun" "--nnodes=$nodes" "--nproc-per-node=$ranks" \
    "--max-restarts=$restarts" "${rendezvous[@]}" "$@"
