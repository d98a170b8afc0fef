#!/usr/bin/env bash
# Everything that only a GPU can tell, in one call of at most eight minutes: bash benchmarks/gpu.sh
#
#   1. checks: every Triton kernel against its reference (benchmarks/gpu_checks.py)
#   2. kernels: each layer beside cuBLAS and the other rivals, the best configuration searched (python -m benchmarks.kernels)
#   3. decode: a randomly initialised Qwen2.5-7B, tokens a second with and without a CUDA graph (benchmarks/decode.py)
#
# From a bare checkout: nothing is installed and nothing is downloaded. It needs a python with torch and triton (PYTHON=...); parts
# that need more are left out, and said to be. Results go to OUT (benchmarks/results), one log a part. The configurations that part
# 2 finds are used by part 3. CHECKS, KERNELS and DECODE are the seconds that the parts may take. Exit status: 0 when all that ran
# is right, 1 when a check failed or a part broke off, 2 without a GPU.

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
checks=${CHECKS:-100} kernels=${KERNELS:-150} decode=${DECODE:-210}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)

if ! why=$("$python" -c 'import torch, triton
assert torch.cuda.is_available(), "torch finds no CUDA device"
print(torch.cuda.get_device_name(0), "torch", torch.__version__, "triton", triton.__version__)' 2>&1); then
    echo "nothing was checked or measured: ${why##*$'\n'}" >&2
    exit 2
fi
echo "$why"

# The folder kernels/ is the package fxc_kernels; a copy, because configurations found here are added to it.
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
cp -R kernels "$packages/fxc_kernels"
export PYTHONPATH="$packages:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

failed=0
summary=()

# part NAME SECONDS "MODULES IT NEEDS" COMMAND...
part() {
    local name=$1 limit=$2 needs=$3 missing status began=$SECONDS
    shift 3
    missing=$("$python" -c 'import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' $needs)
    if [ -n "$missing" ]; then
        summary+=("$name: left out, because python has no $missing")
        return
    fi
    echo "== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" "$python" "$@" 2>&1 | tee "$out/gpu-$name.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) summary+=("$name: done in $((SECONDS - began)) s") ;;
        124 | 137) failed=1 summary+=("$name: FAILED, not over after $limit s; what it had by then is written") ;;
        *) failed=1 summary+=("$name: FAILED with status $status, see gpu-$name.log") ;;
    esac
}

part checks "$checks" "" -m benchmarks.gpu_checks --out "$out" --seconds $((checks - 15))

part kernels "$kernels" "typer rich numpy" -m benchmarks.kernels --device cuda --tune --budget-seconds $((kernels - 25)) \
    --out "$out"
chip=$("$python" -c 'import torch
from fxc_kernels.dispatch import chip_of
print(chip_of(torch.device("cuda")))')
if [ -n "$chip" ] && [ -f "$out/$chip.json" ]; then
    mkdir -p "$packages/fxc_kernels/tables"
    cp "$out/$chip.json" "$packages/fxc_kernels/tables/"
    summary+=("configurations: those of $chip.json were used for decode")
fi

part decode "$decode" "transformers safetensors networkx rich" -m benchmarks.decode --model qwen2.5-7b --device cuda \
    --passes int4,int8,fp8 --backend eager,inductor --batch 1,16 --prompt 128 --new 128 --prefill 2048 \
    --seconds $((decode - 50)) --out "$out"

echo "== summary, after $SECONDS s; files in $out"
printf '%s\n' "${summary[@]}"
grep -h '^FAIL' "$out/gpu-checks.log" 2>/dev/null
grep -h '^| .* decode ' "$out/gpu-decode.log" 2>/dev/null
exit $failed
