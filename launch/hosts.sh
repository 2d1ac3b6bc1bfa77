#!/usr/bin/env bash
# Trains on all hosts of a PBS or LSF job, or on those named in HOSTS: launch/torchrun.sh on each.
#
#   qsub -l select=2:ngpus=8 -- "$PWD/launch/hosts.sh" train.py [ARGUMENTS OF train.py]
#   bsub -n 2 -R "span[ptile=1]" -gpu num=8 launch/hosts.sh train.py
#   HOSTS="alpha beta" launch/hosts.sh train.py
#
# Environment:
#   RANKS   ranks on each host             (default: its GPUs, or 2 without)
#   PORT    where they meet, on the first  (default: follows from the job's number)
#   RSH     starts a command on a host     (default: pbs_tmrsh, blaunch, or ssh -tt)
set -euo pipefail

fail() { printf 'hosts.sh: %s\n' "$*" >&2 && exit 2; }
[[ $# -gt 0 ]] || fail "which script? Usage: launch/hosts.sh SCRIPT [ARGUMENTS OF SCRIPT]"
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

rsh='ssh -tt' # a terminal for each, so that a run ends with its connection
if [[ -n ${PBS_NODEFILE:-} ]]; then
    mapfile -t hosts < <(awk '!seen[$1]++ { print $1 }' "$PBS_NODEFILE")
    cd -- "${PBS_O_WORKDIR:-$PWD}"
    ! command -v pbs_tmrsh >/dev/null || rsh=pbs_tmrsh
elif [[ -n ${LSB_MCPU_HOSTS:-} ]]; then # host and slots by turns
    mapfile -t hosts < <(xargs -n 2 <<<"$LSB_MCPU_HOSTS" | awk '{ print $1 }')
    rsh=blaunch
else
    read -r -a hosts <<<"${HOSTS:-}"
fi
[[ ${#hosts[@]} -gt 0 ]] || fail "no PBS or LSF job, and HOSTS is empty: which hosts?"

job=${PBS_JOBID:-${LSB_JOBID:-0}}
job=${job%%[!0-9]*}
port=${PORT:-$((10000 + 10#${job:-0} % 10000))}
pids=()
for i in "${!hosts[@]}"; do
    printf -v command '%q ' "NNODES=${#hosts[@]}" "NODE_RANK=$i" "RDZV_ENDPOINT=${hosts[0]}:$port" \
        ${RANKS:+"RANKS=$RANKS"} bash "$root/launch/torchrun.sh" "$@"
    # What these start does not have this shell's environment.
    printf -v command 'cd %q && exec env PATH=%q %s' "$PWD" "$PATH" "$command"
    ${RSH:-$rsh} "${hosts[i]}" "$command" </dev/null &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
code=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do # a signal ends a wait, and only that
        status=0
        wait "$pid" || status=$?
    done
    wait "$pid" || status=$?
    [[ $code != 0 ]] || code=$status
done
exit "$code"
