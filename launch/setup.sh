#!/usr/bin/env bash
# Makes .venv in the repository root and installs dtrain into it, in editable mode, with the
# versions of constraints.txt. Called again with nothing changed, it returns at once.
#
#   launch/setup.sh [EXTRA ...]       e.g. launch/setup.sh test examples
#
# PYTHON=/path/to/python3.12 chooses the interpreter for a new .venv.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
python=.venv/bin/python
stamp=.venv/.dtrain-setup # two lines: what was installed (a hash), and the extras it was with

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*" && exit 1; }

# ------------------------------------------------------------------ is there anything to do?

sha256() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; }

has_extras() { # has_extras "INSTALLED ..." EXTRA ...
    local installed=" $1 " extra
    for extra in "${@:2}"; do [[ $installed == *" $extra "* ]] || return 1; done
}

# The path is part of it: an editable install of a repository that was moved points nowhere.
key=$({ printf '%s\n' "$root" && cat pyproject.toml constraints.txt; } | sha256)
key=${key%% *}
installed_key='' installed_extras=''
if [[ -f $stamp ]]; then
    { read -r installed_key && read -r installed_extras; } <"$stamp" || true
fi
if [[ $key == "$installed_key" && -x $python ]] && has_extras "$installed_extras" "$@"; then
    exit 0
fi

for extra in "$@"; do
    grep -q "^$extra = \[" pyproject.toml ||
        die "dtrain has no extra named '$extra'; pyproject.toml lists those it has."
done
# What was there stays there: asking for fewer extras takes nothing away.
extras=$(printf '%s ' "$installed_extras" "$@" |
    tr ' ' '\n' | sed '/^$/d' | sort -u | paste -sd, -)

# ------------------------------------------------------------------ helpers for doing it

log=$(mktemp)
trap 'rm -f -- "$log"' EXIT

quietly() { # runs a command; its output is shown only if it fails
    "$@" >"$log" 2>&1 && return
    say "this failed: $*"
    tail -n 30 -- "$log" >&2
    exit 1
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
can_make_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

find_python() { # the first Python that will do; else the first that lacks only its venv module
    local names=(python3 python3.13 python3.12 python3.11 python3.14 python) name without_venv=''
    [[ -z ${PYTHON:-} ]] || names=("$PYTHON")
    for name in "${names[@]}"; do
        new_enough "$name" || continue
        if can_make_venv "$name"; then
            printf '%s' "$name"
            return
        fi
        without_venv=${without_venv:-$name}
    done
    printf '%s' "$without_venv"
}

apt_install() { # does nothing where that is not ours to do
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || return 0
    say "installing $* with apt-get"
    quietly apt-get update -qq
    quietly env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@"
}

make_venv() {
    local base
    base=$(find_python)
    if [[ -z $base && -z ${PYTHON:-} ]]; then
        apt_install python3 python3-venv
        base=$(find_python)
    fi
    if [[ -z $base ]]; then
        die "no Python 3.11 or newer found (looked for: ${PYTHON:-python3, python3.11 to 3.14})." \
            "Install one, for example: apt-get install python3 python3-venv"
    fi
    if ! can_make_venv "$base"; then
        apt_install python3-venv
        can_make_venv "$base" ||
            die "$base lacks its venv module. Install it: apt-get install python3-venv"
    fi
    say "making .venv with $("$base" --version)"
    quietly "$base" -m venv --clear .venv
}

# ------------------------------------------------------------------ doing it

[[ -x $python ]] || make_venv # a .venv that is there is completed, not made anew
new_enough "$python" || die ".venv has $("$python" --version), dtrain needs 3.11: delete .venv."
"$python" -m pip --version >/dev/null 2>&1 || quietly "$python" -m ensurepip

say "installing dtrain${extras:+ with ${extras//,/, }} (a few minutes the first time)"
pip=("$python" -m pip install --quiet --no-input --disable-pip-version-check -c constraints.txt)
# With setuptools here first, pip builds with it and need not fetch a second one for the build.
quietly "${pip[@]}" setuptools
quietly "${pip[@]}" --no-build-isolation -e ".${extras:+[$extras]}"

printf '%s\n%s\n' "$key" "${extras//,/ }" >"$stamp"
say "done"
