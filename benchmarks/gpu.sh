#!/usr/bin/env bash
# Correctness gate, operator benchmarks and, where there is one, the training step on one GPU, in under eight minutes:
#
#   benchmarks/gpu.sh [folder for the results] [who] [commit]
#
# Needs no network and no installation: torch 2.11+ with CUDA, triton, pytest, pytest-benchmark; $PYTHON names the
# interpreter (default python3). A red gate ends everything. Writes <what>_<gpu>_<yyyymm>_<who>.{json,md}.
set -uo pipefail
out=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/results}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
who=${2:-anonymous}
commit=${3:-}
limit=465 # seconds for everything
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" # compile times of an earlier run must not decide what is measured

# within SECONDS COMMAND...: at most so long, and never past the limit; an interrupt lets pytest write what it has
within() {
  local seconds=$1 left=$((limit - SECONDS))
  shift
  ((left < seconds)) && seconds=$left
  ((seconds < 5)) && return 124
  timeout --signal=INT --kill-after=20 "$seconds" "$@"
}

bench() { # NAME SECONDS ARGUMENTS...
  local name=$1 seconds=$2 code
  shift 2
  within "$seconds" "$python" -m pytest "benchmarks/test_$name.py" --device cuda -q --show-capture=no \
    -p no:cacheprovider --benchmark-disable-gc --benchmark-columns=median,iqr,rounds \
    --benchmark-json "$scratch/$name.json" "$@"
  code=$?
  echo "== $name: exit code $code after $SECONDS s"
  ((code == 0)) || remarks+=(--remark "$name: ended with exit code $code (1: a gate is red, 2 or 124: out of time); its other rows are missing")
  [[ -s $scratch/$name.json ]] && files+=("$scratch/$name.json")
}

files=()
remarks=()
within 170 "$python" -m benchmarks.gpu_gate --json "$scratch/gate.json" || {
  echo "The correctness gate is red or did not end: nothing is measured." >&2
  exit 1
}
bench diffusion_step 200 --seconds 4
bench adamw_ema 170 --seconds 5
if [[ -e benchmarks/test_train_step.py ]]; then
  bench train_step 300
else
  remarks+=(--remark "train_step: benchmarks/test_train_step.py does not exist in this commit")
fi
((${#files[@]})) || {
  echo "No benchmark wrote anything." >&2
  exit 1
}
"$python" benchmarks/report.py --json "${files[@]}" --gate "$scratch/gate.json" --out "$out" --what ops --who "$who" \
  ${commit:+--commit "$commit"} "${remarks[@]}"
