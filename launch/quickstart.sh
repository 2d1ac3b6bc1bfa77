#!/usr/bin/env bash
# From a fresh clone to a trained model: sets up .venv, then trains on scikit-learn's digits
# on every GPU of this machine, or on two CPU processes.
#
#   launch/quickstart.sh [ARGUMENTS OF examples/digits.py]
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
launch/setup.sh examples report
exec launch/torchrun.sh examples/digits.py \
    --run-dir "runs/quickstart-$(date +%Y%m%d-%H%M%S)" "$@"
