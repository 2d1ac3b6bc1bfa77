#!/usr/bin/env bash
# What can only be seen on a GPU, in one call of at most nine minutes, on a machine that has a Python
# with torch and CUDA, and no network. All parts run, also after one has failed: what must be right
# side by side, as far as cores allow, and then what is timed, alone.
#
#   launch/gpu_check.sh              writes gpu_check.txt and gpu.json to $OUT (benchmarks/results)
#   launch/gpu_check.sh --dry-run    the same code on the CPU, in two minutes; writes to $OUT if set
#   launch/gpu_check.sh --pack 3.12  where there is a network and .venv: collects in .wheels what
#                                    the other machine, with that Python, may lack; take it along
#
# PYTHON=/path/to/python3 chooses the interpreter, BUDGET=240 the seconds for all of it.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
say() { printf 'gpu_check: %s\n' "$*"; }
die() { say "$*" >&2 && exit 1; }

dry=''
case ${1:-} in
'') ;;
--dry-run) dry=1 ;;
--pack)
    [[ -n ${2:-} ]] || die "--pack which Python? That of the machine with the GPU, such as 3.12."
    python=${PYTHON:-.venv/bin/python}
    type -P "$python" >/dev/null || die "--pack needs .venv: launch/setup.sh test"
    exec "$python" tools/wheels.py pack .wheels "$2"
    ;;
*) die "what is $1? --dry-run, --pack or nothing" ;;
esac

python=${PYTHON:-python3}
work=$(mktemp -d)
running=() # of what runs side by side: process ids
leave() {
    [[ ${#running[@]} -eq 0 ]] || kill -- "${running[@]}" 2>/dev/null || true
    rm -rf -- "$work"
}
trap leave EXIT
out=${OUT:-$([[ -n $dry ]] && echo "$work" || echo benchmarks/results)}
mkdir -p -- "$out"
log=$out/gpu_check.txt
: >"$log"
budget=${BUDGET:-540} # seconds, for all of it
side=$(($(nproc) / 2)) # so many tests at once; most of their time is one thread's
side=$((side < 1 ? 1 : side))

unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT OMP_NUM_THREADS \
    PYTHONWARNINGS "${!ACCELERATE_@}" "${!SLURM_@}" "${!TORCHELASTIC_@}"
[[ -z $dry ]] || export OMP_NUM_THREADS=1 # the tensors are tiny
export PYTHONPATH="$root" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# ------------------------------------------------------------------ what is here

is_there() { # is_there PACKAGE ...: at least one of them
    "$python" -c 'import sys; from importlib.util import find_spec as f
sys.exit(not any(map(f, sys.argv[1:])))' "$@"
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$python is no Python 3.11 or newer; PYTHON=/path/to/python3 chooses another."
is_there torch || die "$python has no torch; PYTHON=/path/to/python3 chooses another."
if [[ -d .wheels ]]; then
    "$python" tools/wheels.py unpack .wheels "$work/site" | tee -a "$log"
    export PYTHONPATH="$PYTHONPATH:$work/site"
fi
missing=()
for package in numpy accelerate safetensors rich; do
    is_there "$package" || missing+=("$package")
done
if [[ ${#missing[@]} -gt 0 ]]; then
    die "$python has no ${missing[*]}, without which dtrain does not run. Where there is a network," \
        "launch/gpu_check.sh --pack collects in .wheels what may be missing: bring that along."
fi
gpus=$("$python" -c 'import torch, dtrain, dtrain.callbacks, dtrain.sinks
print(torch.cuda.device_count() if torch.cuda.is_available() else 0)') ||
    die "dtrain cannot be imported."
[[ -n $dry || $gpus != 0 ]] || die "torch sees no GPU here; --dry-run needs none."

# ------------------------------------------------------------------ the parts

summary=() failed=''

verdict() { # verdict NAME STATUS SECONDS LIMIT
    local told
    case $2 in
    0) told=passed ;;
    124 | 137) told="FAILED: not done after $4 s" failed=1 ;;
    *) told="FAILED with status $2" failed=1 ;;
    esac
    summary+=("$(printf '%-42s %s, %d s' "$1" "$told" "$3")")
}

seconds_for() { # seconds_for SECONDS: so many, or what is left
    local left=$((budget - SECONDS))
    left=$((left < 1 ? 1 : left)) # 0 would be no limit
    echo $((left < $1 ? left : $1))
}

part() { # part NAME SECONDS COMMAND ...
    local started=$SECONDS status=0 left
    left=$(seconds_for "$2")
    printf '\n=== %s\n' "$1"
    if [[ $left -lt 10 ]]; then
        summary+=("$(printf '%-42s LEFT OUT: no time was left' "$1")") failed=1
        return
    fi
    timeout --kill-after=10 "$left" "${@:3}" || status=$?
    verdict "$1" "$status" $((SECONDS - started)) "$left"
}

names=() limits=()

beside() { # beside NAME SECONDS COMMAND ...: starts it, once there are cores for it
    local number=${#names[@]} left
    while [[ $(jobs -pr | wc -l) -ge $side ]]; do sleep 0.2; done
    left=$(seconds_for "$2")
    names+=("$1") limits+=("$left")
    (
        began=$SECONDS status=0 inner=''
        trap '[[ -z $inner ]] || kill "$inner" 2>/dev/null' TERM EXIT
        timeout --kill-after=10 "$left" "${@:3}" >"$work/$number.log" 2>&1 &
        inner=$!
        wait "$inner" || status=$?
        inner=''
        echo "$status $((SECONDS - began))" >"$work/$number.told"
    ) &
    running+=($!)
}

collect() { # waits for all of them, and prints what each has said
    local number status seconds
    [[ ${#names[@]} -gt 0 ]] || return 0
    for number in "${!names[@]}"; do
        wait "${running[number]}" || true
        printf '\n=== %s\n' "${names[number]}"
        cat -- "$work/$number.log"
        read -r status seconds <"$work/$number.told"
        verdict "${names[number]}" "$status" "$seconds" "${limits[number]}"
    done
    running=()
}

left_out() { summary+=("$(printf '%-42s left out: %s' "$1" "$2")"); }

machine() {
    "$python" - <<'EOF'
import platform

import torch

print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
for number in range(torch.cuda.device_count()):
    print(f"GPU {number}: {torch.cuda.get_device_properties(number)}")
if torch.cuda.is_available() and torch.distributed.is_nccl_available():
    print(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
EOF
    type -P nvidia-smi >/dev/null || return 0
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || return 0
}

gpu_test() { # gpu_test NAME FILE: in a process each, because a failure of CUDA's spoils the process
    beside "$1" 170 "$python" -m pytest -q -s "tests/gpu/$2" --device "$([[ -n $dry ]] && echo cpu || echo cuda)"
}

all_parts() {
    machine
    if is_there pytest; then
        # What takes longest comes first.
        gpu_test 'one, two and three ranks; NCCL' test_ranks_on_gpus.py
        [[ -n $dry ]] || gpu_test 'faults: a kernel, memory, ranks' test_faults.py
        gpu_test 'no host sync in a step' test_no_sync.py
        gpu_test 'figures: bf16, fp16, optimizers, compile' test_same_figures.py
        gpu_test 'votes and errors a step late' test_late_votes.py
        gpu_test 'batches: right, and not waited for' test_data_path.py
        gpu_test 'graph=True: captured micro-steps' test_graph.py
        gpu_test 'resumed runs: the same bits' test_resume.py
        collect
    else
        left_out 'all tests' "$python has no pytest; --pack brings it"
        failed=1
    fi
    bench=("$python" benchmarks/gpu.py --json "$out/gpu.json" --seconds $((budget - SECONDS - 20)))
    if [[ -n $dry ]]; then
        part 'benchmarks/gpu.py' 120 "${bench[@]}" --tiny --device cpu
    else
        part 'benchmarks/gpu.py' "$budget" "${bench[@]}"
    fi
    printf '\n=== summary, after %d s%s\n' "$SECONDS" "${dry:+ (a dry run: no GPU was used)}"
    printf '%s\n' "${summary[@]}"
    if [[ -z $dry && $gpus == 1 ]]; then
        echo 'one GPU: ranks met over gloo; NCCL between ranks was not tried'
    fi
    [[ -z $failed ]]
}

# Not in a pipe's subshell: what failed must be known here.
exec > >(tee -a "$log") 2>&1
tee_pid=$!
status=0
all_parts || status=1
exec >&- 2>&-
wait "$tee_pid" || true
exit "$status"
