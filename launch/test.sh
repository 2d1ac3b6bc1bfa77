#!/usr/bin/env bash
# Runs the tests.
#
#   launch/test.sh             all but the slow ones
#   launch/test.sh --slow      the slow ones: every pair of callbacks, every way to hang, and more
#   launch/test.sh ARGUMENTS   of pytest; such as tests/laws -k resume, slow ones included
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
launch/setup.sh test

# Tests make their own ranks. In a shell that is itself one rank of a job, or that has set a
# launcher up, they would meet the wrong ones.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_NAME ROLE_RANK \
    ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT NODE_RANK NNODES RANKS RESTARTS OMP_NUM_THREADS \
    TORCH_DISTRIBUTED_DEBUG TORCH_DISABLE_SHARE_RDZV_TCP_STORE PYTHONWARNINGS \
    "${!ACCELERATE_@}" "${!GLOO_@}" "${!OMPI_@}" "${!PMI_@}" "${!RDZV_@}" "${!SLURM_@}" \
    "${!TORCHELASTIC_@}"

# Many processes import dtrain here: the first one compiles it for all.
unset PYTHONDONTWRITEBYTECODE

# Ranks look up the names of their peers' addresses. Where a name server loses a question, ask again
# after 1 second, not 5.
export RES_OPTIONS="${RES_OPTIONS:-timeout:1 attempts:5}"

case ${1:-} in
'') set -- -m 'not slow' ;;
--slow) set -- -m slow "${@:2}" ;;
esac
set -- .venv/bin/python -m pytest "$@"

# Where that is allowed, tests have two things of their own, which nobody else sees:
# - A hosts file with the name of 127.0.0.1 as IPv6 writes it. Sixteen times a start each rank asks for
#   that, and no server needs to be asked.
# - Shared memory, so that what a test finds left there is not of tests that run at the same time.
with_own() { # in a mount namespace of its own: does what it is asked, with both
    local folder
    folder=$(mktemp -d)
    mount -t tmpfs hosts "$folder"
    { cat /etc/hosts && printf '\n::ffff:127.0.0.1 localhost-as-ipv6\n'; } >"$folder/hosts"
    mount --bind "$folder/hosts" /etc/hosts
    umount "$folder"
    rmdir "$folder"
    mount -t tmpfs -o mode=1777 shm /dev/shm
    exec "$@"
}
if [[ $EUID == 0 && -d /dev/shm ]] && unshare --mount mount -t tmpfs hosts /tmp 2>/dev/null; then
    set -- unshare --mount bash -c "set -e; $(declare -f with_own); with_own \"\$@\"" test "$@"
fi
exec "$@"
