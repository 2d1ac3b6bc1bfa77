#!/usr/bin/env bash
# Everything that reads the code without running it. All checks run, also after one has failed.
#
#   launch/lint.sh
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
launch/setup.sh dev
python=.venv/bin/python
failed=()

check() { # check NAME COMMAND ...
    printf '%s: ' "$1"
    "${@:2}" || failed+=("$1")
}

check "ruff check" "$python" -m ruff check .
check "ruff format" "$python" -m ruff format --check .
check "mypy --strict" "$python" -m mypy --strict
check "imports" "$python" -c 'from importlinter.cli import lint_imports_command as run; run()' \
    --no-logo
check "torch.distributed" "$python" tools/check_imports.py
check "picture of the rooms" "$python" tools/draw_rooms.py --check

if [[ ${#failed[@]} -gt 0 ]]; then
    printf '\nlint failed:%s\n' "$(printf ' [%s]' "${failed[@]}")" >&2
    exit 1
fi
