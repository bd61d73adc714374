#!/usr/bin/env bash
# Correctness gate and benchmarks on one GPU, in slices of less than ten minutes, the most useful first, each useful alone:
#
#   benchmarks/gpu.sh SLICE [folder for the results] [who] [commit]
#
#   tests      the kernels' own tests and the captured step's on the device, and what `doctor` says
#   xl2-b32    a training step of DiT-XL/2, 32 samples
#   xl2-b256   the same, 256 samples, with settings that fit 80 GB
#   adaln      single ops of a block: gate + residual + norm + modulate, bias + GELU, attention
#   s2         a training step of DiT-S/2, 32 samples, as one CUDA graph
#   adamw      the optimizer
#   diffusion  noise, losses and gradient
#   group-norm the U-Net's norm, where its benchmark is there
#
# Needs no network and no installation: torch 2.11+ with CUDA, triton, pytest, pytest-benchmark; $PYTHON names the
# interpreter (default python3). The training steps also need pydantic, pyyaml, rich and safetensors, and DeepSpeed for
# its provider; wheels can be carried along: unpack them into a folder (pip install --no-index --no-deps --target site
# *.whl) and put it on PYTHONPATH. An op whose gate is red is named and left out, the others are measured; the gate of the
# same code on the same device is not run again within an hour ($GATE_CACHE). Our rows come first in every case, and a
# rival that fails, or takes more than BENCH_RIVAL_SECONDS, costs its own row only.
# Writes <slice>_<gpu>_<yyyymm>_<who>.{json,md}. Further settings by the environment:
#   BENCH_COMPILE_SECONDS for trying modes of torch.compile, per case; default 60; inf tries all of them
#   BENCH_RIVAL_SECONDS   for building and checking a rival; default 150
#   BENCH_OURS_TORCH      settings of ours-torch; the slices xl2-b256 and s2 have defaults
#   LIMIT                 seconds for everything (570)
#   DEVICE=cpu            a rehearsal without a GPU: the smallest cases, whose numbers mean nothing
set -uo pipefail
slice=${1:-}
out=$(realpath -m "${2:-$(dirname "${BASH_SOURCE[0]}")/results}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
who=${3:-anonymous}
commit=${4:-}
device=${DEVICE:-cuda}
limit=${LIMIT:-570}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" # compile times of an earlier run must not decide what is measured
export BENCH_COMPILE_SECONDS=${BENCH_COMPILE_SECONDS:-60} BENCH_RIVAL_SECONDS=${BENCH_RIVAL_SECONDS:-150}
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

files=()
remarks=()
bench() { # NAME ARGUMENTS...: what is left of the time, but for the page's
  local name=$1 code file rehearsal=()
  shift
  file=$(find benchmarks -name "test_$name.py")
  [[ -n $file ]] || {
    remarks+=(--remark "$name: there is no such benchmark")
    return
  }
  [[ $device == cpu ]] && rehearsal=(--quick --seconds 0.1)
  within $((limit - SECONDS - 10)) "$python" -m pytest "$file" --device "$device" -q --show-capture=no \
    -p no:cacheprovider --benchmark-disable-gc --benchmark-columns=median,iqr,rounds \
    --benchmark-json "$scratch/$name.json" "$@" "${rehearsal[@]}"
  code=$?
  echo "== $name: exit code $code after $SECONDS s"
  ((code == 0)) || remarks+=(--remark "$name: ended with exit code $code (1: a gate is red, 2 or 124: out of time); its other rows are missing")
  [[ -s $scratch/$name.json ]] && files+=("$scratch/$name.json")
}

train_step() { # CASE SETTINGS-OF-OURS
  local missing
  missing=$("$python" -c 'import pydantic, rich, safetensors, yaml' 2>&1) || {
    echo "The training step needs more packages, on PYTHONPATH: ${missing##*$'\n'}" >&2
    exit 1
  }
  export BENCH_OURS_TORCH=${BENCH_OURS_TORCH-$2}
  if [[ $device == cpu ]]; then
    BENCH_OURS_TORCH=${BENCH_OURS_TORCH//engine.cuda_graph=true/} bench train_step
  else
    bench train_step --seconds 4 -k "$1"
  fi
}

case $slice in
tests)
  where=(tests/kernels tests/unit/engines/test_cuda_graph.py)
  [[ $device == cpu ]] && where=(tests/kernels/test_contract.py)
  # Code is looked at where there is no GPU, and the interpreter needs an older NumPy than many images have.
  within $((limit - 40)) "$python" -m pytest "${where[@]}" -q -p no:cacheprovider -k "not ahead_of_time and not interpreter"
  code=$?
  within 30 "$python" -m speed_engine doctor || echo "doctor: exit code $?"
  exit $code
  ;;
xl2-b32 | xl2-b256 | adaln | s2 | adamw | diffusion | group-norm) ;;
*)
  echo "usage: benchmarks/gpu.sh tests|xl2-b32|xl2-b256|adaln|s2|adamw|diffusion|group-norm [results] [who] [commit]" >&2
  exit 2
  ;;
esac

within 170 "$python" -m benchmarks.gate.gpu --device "$device" --json "$scratch/gate.json" \
  --reuse "${GATE_CACHE:-${TMPDIR:-/tmp}/speed-engine-gate}"
[[ -s $scratch/gate.json ]] || {
  echo "The correctness gate did not end: nothing is measured." >&2
  exit 1
}
case $slice in
xl2-b32) train_step XL2-b32 "" ;;
xl2-b256) train_step XL2-b256 "model.residual=compute model.recompute=selective" ;;
s2) train_step S2-b32 "engine.cuda_graph=true" ;;
adaln) bench adaln --seconds 0.5 ;;
adamw) bench adamw_ema --seconds 3 ;;
diffusion) bench diffusion_step --seconds 2 ;;
group-norm) bench group_norm_silu --seconds 0.5 ;;
esac
((${#files[@]})) || {
  echo "No benchmark wrote anything." >&2
  exit 1
}
"$python" -m benchmarks.report.page --json "${files[@]}" --gate "$scratch/gate.json" --out "$out" --what "$slice" \
  --who "$who" ${commit:+--commit "$commit"} "${remarks[@]}"
