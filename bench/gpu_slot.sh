#!/usr/bin/env bash
# The first quarter of an hour on a GPU: one H100 or H200 with torch 2.11 to 2.14, transformers, lightning, peft, pytest,
# pytest-xdist and hypothesis; no network, no vllm, no flash-attn, and longrl not installed.
#
#   bash bench/gpu_slot.sh             # all of it: 14 minutes at most
#   bash bench/gpu_slot.sh 1           # kernels against the float64 oracle; encode, prefill, decode, update: 7 minutes
#   bash bench/gpu_slot.sh 2           # sharding.offload, one step of fit on 131k tokens, FSDP2 over NCCL: 7 minutes
#   bash bench/gpu_slot.sh --cpu --tiny    # the same code in a minute or two, to try it; its numbers mean nothing
#
# Results go to $OUT (runs/gpu_slot), written after every row. $WHEELS is a folder of wheels of what that machine lacks,
# which are unpacked beside the results and installed nowhere. Fill it with the Python of that machine's version, e.g.
#   python3.12 -m pip download --no-deps -d wheels antlr4-python3-runtime av datasets dill docstring-parser einops \
#       flash-linear-attention fla-core importlib-resources jsonargparse latex2sympy2-extended math-verify multiprocess \
#       pysubs2 typeshed-client
# A step that fails or runs out of time does not end the others; the exit status is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."

PART=all
if [[ "${1:-}" =~ ^[12]$ ]]; then PART=$1; shift; fi
FLAGS=("$@")  # for the scripts
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu_slot}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline
if [ -n "${WHEELS:-}" ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$OUT/site" "$WHEELS"/*.whl
  export PYTHONPATH=$PYTHONPATH:$OUT/site
fi
STATUS=0

# step SECONDS NAME COMMAND...: its output also in $OUT/NAME.log
step() {
  local limit=$1 name=$2
  shift 2
  echo "=== $(date +%T) $name"
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log" || {
    echo "=== $name: status $?"
    STATUS=1
  }
}

if [[ " ${FLAGS[*]:-} " != *" --cpu "* ]]; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$OUT/gpu.txt"
fi
if [ "$PART" != 2 ]; then
  mapfile -t GPU_TESTS < <(grep -rlE '^@pytest\.mark\.gpu' tests --include='test_*.py')
  OMP_NUM_THREADS=2 step 130 tests "$PYTHON" -m pytest "${GPU_TESTS[@]}" -m gpu -q -n 6 --maxfail 8 -p no:cacheprovider
  step 320 gpu "$PYTHON" bench/gpu.py --minutes 4.5 --json "$OUT/gpu.json" --profile "$OUT/update.txt" "${FLAGS[@]}"
fi
if [ "$PART" != 1 ]; then
  step 390 hour_step "$PYTHON" bench/hour_step.py --json "$OUT/hour_step.json" "${FLAGS[@]}"
fi
echo "=== $(date +%T) done, status $STATUS; results in $OUT"
exit "$STATUS"
