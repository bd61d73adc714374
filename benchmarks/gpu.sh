#!/usr/bin/env bash
# Correctness gate, operator benchmarks and the training step on one GPU, in under eight minutes:
#
#   benchmarks/gpu.sh [folder for the results] [who] [commit]
#
# Needs no network and no installation: torch 2.11+ with CUDA, triton, pytest, pytest-benchmark; $PYTHON names the
# interpreter (default python3). The training step also needs pydantic, pyyaml, rich and safetensors, and DeepSpeed for
# its provider. A red gate ends everything. Writes <what>_<gpu>_<yyyymm>_<who>.{json,md}.
#
# Everything does not fit into eight minutes. What does is chosen by the environment:
#   PARTS                 of diffusion_step adamw_ema train_step adaln; default all, in this order
#   TRAIN_CASES           pytest -k of the training step's cases; default 'S2-b32 or XL2-b256'
#   BENCH_COMPILE_SECONDS for trying modes of torch.compile, per case; default 45; inf tries all of them
#   LIMIT, WHAT           seconds for everything (465); first part of the page's name (ops)
# For the claim "best of torch.compile":
#   PARTS=train_step TRAIN_CASES=XL2-b256 BENCH_COMPILE_SECONDS=inf LIMIT=590 WHAT=step benchmarks/gpu.sh results me
set -uo pipefail
out=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/results}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
who=${2:-anonymous}
commit=${3:-}
parts=${PARTS:-diffusion_step adamw_ema train_step adaln}
limit=${LIMIT:-465}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" # compile times of an earlier run must not decide what is measured
export BENCH_COMPILE_SECONDS=${BENCH_COMPILE_SECONDS:-45}
# Providers whose steps differ by tens of gigabytes take turns: pieces of fixed size would not fit the next one.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# within SECONDS COMMAND...: at most so long, and never past the limit; an interrupt lets pytest write what it has
within() {
  local seconds=$1 left=$((limit - SECONDS))
  shift
  ((left < seconds)) && seconds=$left
  ((seconds < 5)) && return 124
  timeout --signal=INT --kill-after=20 "$seconds" "$@"
}

bench() { # NAME SECONDS ARGUMENTS...
  local name=$1 seconds=$2 code file
  shift 2
  file=$(find benchmarks -name "test_$name.py")
  within "$seconds" "$python" -m pytest "$file" --device cuda -q --show-capture=no \
    -p no:cacheprovider --benchmark-disable-gc --benchmark-columns=median,iqr,rounds \
    --benchmark-json "$scratch/$name.json" "$@"
  code=$?
  echo "== $name: exit code $code after $SECONDS s"
  ((code == 0)) || remarks+=(--remark "$name: ended with exit code $code (1: a gate is red, 2 or 124: out of time); its other rows are missing")
  [[ -s $scratch/$name.json ]] && files+=("$scratch/$name.json")
}

files=()
remarks=()
within 170 "$python" -m benchmarks.gate.gpu --json "$scratch/gate.json" || {
  echo "The correctness gate is red or did not end: nothing is measured." >&2
  exit 1
}
for part in $parts; do
  case $part in
  diffusion_step) bench diffusion_step 110 --seconds 2 ;;
  adamw_ema) bench adamw_ema 90 --seconds 3 ;;
  train_step)
    if missing=$("$python" -c 'import pydantic, rich, safetensors, yaml' 2>&1); then
      [[ " $parts " == *" adaln "* ]] && reserve=70 || reserve=10
      bench train_step $((limit - SECONDS - reserve)) --seconds 4 -k "${TRAIN_CASES:-S2-b32 or XL2-b256}"
    else
      remarks+=(--remark "train_step: ${missing##*$'\n'}")
    fi
    ;;
  adaln) bench adaln 120 --seconds 0.5 ;;
  *) remarks+=(--remark "there is no benchmark $part") ;;
  esac
done
((${#files[@]})) || {
  echo "No benchmark wrote anything." >&2
  exit 1
}
"$python" -m benchmarks.report.page --json "${files[@]}" --gate "$scratch/gate.json" --out "$out" --what "${WHAT:-ops}" \
  --who "$who" ${commit:+--commit "$commit"} "${remarks[@]}"
