#!/usr/bin/env bash
# Everything that only a GPU can tell, in one call of less than eight minutes: bash benchmarks/gpu.sh
#
#   1. checks: every Triton kernel against its reference (python -m benchmarks.gpu_checks)
#   2. kernels: each layer beside cuBLAS and the other rivals, the best configuration searched (python -m benchmarks.kernels)
#   3. decode: a randomly initialised Qwen2.5-7B, tokens a second with and without a CUDA graph (python -m benchmarks.decode)
#   4. inductor: the same through torch.compile, where there is time left
#
# From a bare checkout: nothing is installed and nothing is downloaded. It needs a python with torch and triton (PYTHON=...);
# parts 3 and 4 need transformers too, and what needs more than there is is left out, and said to be. Every part writes its
# results while it runs. They go to benchmarks/results; or, where OUT names a folder, all into one file in it, gpu.tar.gz,
# renewed after each part, beside gpu.log, because machines that are lent hand back few files.
#
# TOTAL: the seconds that all of it may take; CHECKS, DECODE: those that part 1 takes at most and that are left for part 3;
# part 2 has the rest. The configurations that it finds are used by parts 3 and 4. Exit status: 0 when all that ran is right, 1
# when a check failed or a part broke off, 2 without a GPU.

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
total=${TOTAL:-465} checks=${CHECKS:-95} decode=${DECODE:-135}
kept=${OUT:-benchmarks/results}
mkdir -p "$kept" || exit 2
kept=$(cd "$kept" && pwd)

# The folder kernels/ is the package fxc_kernels; a copy, because configurations found here are added to it.
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
cp -R kernels "$packages/fxc_kernels"
export PYTHONPATH="$packages:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

if ! why=$("$python" -c 'import torch, triton
assert torch.cuda.is_available(), "torch finds no CUDA device"
from fxc_kernels.cuda.dispatch import chip_of
print(torch.cuda.get_device_name(0), "torch", torch.__version__, "triton", triton.__version__)
print(chip_of(torch.device("cuda", 0)))' 2>&1); then
    echo "nothing was checked or measured: ${why##*$'\n'}" >&2
    exit 2
fi
echo "${why%$'\n'*}"
chip=${why##*$'\n'}

out=$kept
[ -z "${OUT:-}" ] || out=$packages/results
mkdir -p "$out"
: > "$kept/gpu.log"

keep() {
    [ -z "${OUT:-}" ] && return
    tar -czf "$packages/gpu.tar.gz" -C "$out" . && mv "$packages/gpu.tar.gz" "$kept/gpu.tar.gz"
}
trap 'keep; rm -rf "$packages"' EXIT
trap 'exit 1' INT TERM

failed=0
summary=()

# part NAME SECONDS "MODULES IT NEEDS" COMMAND...
part() {
    local name=$1 limit=$2 needs=$3 missing status began=$SECONDS
    shift 3
    # shellcheck disable=SC2086
    missing=$("$python" -c 'import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' $needs)
    if [ -n "$missing" ]; then
        summary+=("$name: left out, because python has no $missing")
        return
    fi
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$python" "$@" 2>&1 | tee "$out/gpu-$name.log" | tee -a "$kept/gpu.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) summary+=("$name: done in $((SECONDS - began)) s") ;;
        124 | 137) failed=1 summary+=("$name: FAILED, not over after $limit s; what it had by then is written") ;;
        *) failed=1 summary+=("$name: FAILED with status $status, see gpu-$name.log") ;;
    esac
    keep
}

part checks "$checks" "" -m benchmarks.gpu_checks --out "$out" --seconds $((checks > 30 ? checks - 15 : checks))

# What is wanted most comes first: what there is no time for is at the end.
kernels=$((total - decode - SECONDS))
part kernels "$kernels" "" -m benchmarks.kernels --device cuda --tune --budget-seconds $((kernels > 60 ? kernels - 35 : kernels)) \
    --scheme int4_g128,int8,fp8,sparse24,int8_sparse24 --m 1,16,64,2048 --rounds 11 \
    --shapes 8192,8192,qwen2.5-7b:gate_up,qwen2.5-7b:down,qwen2.5-7b:qkv,qwen2.5-7b:o,qwen2.5-7b:head --out "$out"
if [ -n "$chip" ] && [ -f "$out/$chip.json" ]; then
    mkdir -p "$packages/fxc_kernels/cuda/tables"
    cp "$out/$chip.json" "$packages/fxc_kernels/cuda/tables/"
    summary+=("configurations: those of $chip.json were used for decode")
fi

needs="transformers safetensors networkx rich"
left=$((total - SECONDS))
part decode "$left" "$needs" -m benchmarks.decode --model qwen2.5-7b --device cuda --passes int4,int8,fp8 --batch 1,16 \
    --prompt 128 --new 128 --prefill 2048 --seconds $((left > 60 ? left - 35 : left)) --out "$out"

left=$((total - SECONDS))
if [ "$left" -ge "${INDUCTOR:-120}" ]; then
    part inductor "$left" "$needs" -m benchmarks.decode --model qwen2.5-7b --device cuda --passes int4 --backend inductor \
        --batch 1 --prompt 128 --new 128 --prefill 0 --seconds $((left > 100 ? left - 70 : left)) --out "$out/inductor"
else
    summary+=("inductor: left out, because $left s were left")
fi

{
    echo "== summary, after $SECONDS s; files in $kept"
    printf '%s\n' "${summary[@]}"
    grep -h '^FAIL' "$out/gpu-checks.log" 2>/dev/null
    grep -h '^| .* decode ' "$out"/gpu-decode.log "$out"/gpu-inductor.log 2>/dev/null
} | tee "$out/gpu-summary.log" | tee -a "$kept/gpu.log"
exit $failed
