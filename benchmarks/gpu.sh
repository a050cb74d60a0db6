#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without network, within about 8 minutes:
#
#   bash benchmarks/gpu.sh                      where vLLM, and what this project needs, can be imported
#   WHEELHOUSE=DIR bash benchmarks/gpu.sh       installs the wheels of DIR into $SITE first (no index, no dependencies)
#
#   OUT=build/gpu   folder for logs, figures and plots
#   SHAPE=qwen2.5-7b  COUNT=32   the base that is served, and how many deltas
#   LIMIT=470       seconds for all together
#   PARTS="kernels compression bench serve"  what to do
#   FLAGS=          more flags of the servers; empty: vLLM's own defaults, torch.compile included, which starts slowly
#                   (unset: CUDA graphs of decoding steps without torch.compile, else --enforce-eager)
#   PYTHON=python3  SITE=$OUT/site (default a temporary folder)
#
# A part that fails does not stop the others; the exit code is 1 where one did. $OUT/parts.txt lists them.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-build/gpu}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
shape=${SHAPE:-qwen2.5-7b}
count=${COUNT:-32}
parts=${PARTS:-kernels compression bench serve}
began=$SECONDS
limit=${LIMIT:-470}
scratch=$(mktemp -d)
: >"$out/parts.txt"

running=()
cleanup() {
    for pid in "${running[@]:-}"; do [ -n "$pid" ] && kill "$pid" 2>/dev/null; done
    rm -rf "$scratch"
}
trap cleanup EXIT

left() { echo $((limit - SECONDS + began)); }
say() { echo "$*" | tee -a "$out/parts.txt"; }
wanted() { [[ " $parts " == *" $1 "* ]]; }

# part NAME SECONDS COMMAND...: its output goes to $out/NAME.log; ended after SECONDS, or when the time is over.
part() {
    local name=$1 most=$2 start=$SECONDS rc
    shift 2
    if [ "$(left)" -lt "$most" ]; then most=$(left); fi
    if [ "$most" -le 5 ]; then
        say "$name: FAILED: the time was over before it began"
        return 1
    fi
    timeout --kill-after=40 "$most" "$@" >"$out/$name.log" 2>&1
    rc=$?
    case $rc in
        0) say "$name: passed ($((SECONDS - start)) s)" ;;
        124 | 137) say "$name: FAILED: not done after $most s (log: $out/$name.log)" ;;
        *) say "$name: FAILED: exit code $rc (log: $out/$name.log)" ;;
    esac
    if [ "$rc" != 0 ]; then tail -n 15 "$out/$name.log"; fi
    return "$rc"
}

export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# FlashInfer compiles when it is first used, and need not be there.
export VLLM_USE_FLASHINFER_SAMPLER=${VLLM_USE_FLASHINFER_SAMPLER:-0}
export VLLM_CACHE_ROOT=$scratch/vllm TORCHINDUCTOR_CACHE_DIR=$scratch/inductor TRITON_CACHE_DIR=$scratch/triton

if [ -n "${WHEELHOUSE:-}" ]; then
    site=${SITE:-$scratch/site}
    part install 120 "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --upgrade --target "$site" "$WHEELHOUSE"/*.whl || exit 1
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PATH=$site/bin:$PATH
fi
# vLLM finds the plugin by its metadata: where no wheel of it is there, the source gives it.
if ! "$python" -c 'import importlib.metadata as m; m.version("vllm-prinmix")' 2>/dev/null; then
    part plugin 60 "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation \
        --target "$scratch/plugin" . && export PYTHONPATH=$scratch/plugin${PYTHONPATH:+:$PYTHONPATH}
fi
# The checkout comes first, so that what runs is what lies here.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

{
    nvidia-smi
    "$python" --version
    for name in torch triton transformers vllm vllm-prinmix; do
        "$python" -c 'import importlib.metadata as m, sys; print(sys.argv[1], m.version(sys.argv[1]))' "$name" 2>&1 |
            tail -n 1
    done
    git rev-parse HEAD 2>/dev/null
    nproc
    free -g
} >"$out/machine.txt" 2>&1

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    say "machine: FAILED: torch finds no GPU here"
    exit 1
fi

# Needs no GPU, only processor and disk: meanwhile the kernels are compiled and checked.
if wanted serve; then
    "$python" -m benchmarks.generate_delta --shape "$shape" --count "$count" --distinct 2 \
        --out "$scratch/generated" >"$out/generate.log" 2>&1 &
    generating=$!
    running+=("$generating")
fi

if wanted kernels; then
    workers=()
    if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
    part kernels 100 "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" -m gpu \
        tests/kernels/interpreted tests/kernels/test_gpu.py
fi

# Up to 4 of the 28 layers of a 7B model; without the straightforward implementation, to keep to the time.
if wanted compression; then
    part compression 110 "$python" -m benchmarks.compression --device cuda --shape qwen2.5-7b --methods prinmix \
        --reference-layers 0 --budget-seconds 25 --out "$out/compression"
fi

if wanted bench; then
    part bench 175 "$python" -m benchmarks.kernels --device cuda --budget-seconds "${BENCH_SECONDS:-130}" \
        --out "$out/kernels"
fi

if wanted serve; then
    wait "$generating"
    rc=$?
    running=()
    if [ "$rc" != 0 ]; then
        say "generate: FAILED: exit code $rc (log: $out/generate.log)"
    else
        say "generate: passed"
        most=$(($(left) < 400 ? $(left) : 400))
        part serving "$most" "$python" -m benchmarks.gpu_serving --base "$scratch/generated/base" \
            --deltas "$scratch/generated/deltas" --out "$out" --seconds "$((most - 20))" \
            ${FLAGS+"--flags=$FLAGS"}
    fi
fi

echo
echo "$((SECONDS - began)) s; results in $out:"
cat "$out/parts.txt"
! grep -q "FAILED" "$out/parts.txt"
