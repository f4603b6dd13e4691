#!/usr/bin/env bash
# All that only a GPU can show, in one command, in about five minutes:
#     pip install -r requirements-gpu.txt -r requirements-dev.txt -r requirements-torch.txt
#     benchmarks/gpu.sh [FOLDER WITH MNIST [FOLDER FOR THE OUTPUT [STAGE …]]]
# In stages, the quick and telling ones first. Each has a time limit, and its output in a file of
# its own; a stage that fails is named at the end. Nothing is installed; MNIST is downloaded if the
# folder lacks it.
set -uo pipefail
cd "$(dirname "$0")/.."
data=${1:-data}
out=${2:-$(mktemp -d)}
wanted=${*:3}
for name in $wanted; do
  [[ " kernels epochs continued quick step_time record cores " == *" $name "* ]] && continue
  echo "gpu.sh: there is no stage $name" >&2
  exit 2
done
mkdir -p "$out"
save=$(mktemp -d)
trap '{ kill -- -$job -$watch; } 2> /dev/null; rm -rf "$save"' EXIT
trap 'exit 130' INT TERM
export PYTHONUNBUFFERED=1
failed=() job= watch=

stage() { # NAME SECONDS COMMAND …
  local name=$1 limit=$2
  shift 2
  [[ -z $wanted || " $wanted " == *" $name "* ]] || return 0
  echo "── $name"
  SECONDS=0
  limited "$limit" "$@" > "$out/$name.txt" 2>&1 || failed+=("$name")
  grep -v '^[[:space:]]*$' "$out/$name.txt" | tail -n 30
  echo "   ($SECONDS s)"
}
limited() { # like timeout, for functions of this script too, and for all that they started
  local limit=$1 status
  shift
  set -m # each job has a process group of its own
  "$@" & job=$!
  (sleep "$limit" && kill -- -$job) & watch=$!
  set +m
  wait $job
  status=$?
  { kill -- -$watch && wait $watch; } 2> /dev/null
  return $status
}
where=(--data-dir "$data" --save-dir "$save" --device gpu)
train() { python mnist_resnet9.py "${where[@]}" "$@"; }
seeds() {
  for seed in 21 22 23 24 25; do train --recipe "$1" --seed $seed --tag "$1_$seed" || return 1; done
  python benchmarks/accuracy/seeds.py --save-dir "$save" "$1"_2{1,2,3,4,5}
}
quick() { seeds quick; }
record() { seeds record; }

# Five epochs of the reference experiment, and two of the PyTorch version.
epochs() {
  train --epochs-max 5 --tag reference && tail -n 2 "$save/reference/log.txt"
  python torch_version/resnet9_torch.py "${where[@]}" --epochs-max 2 --tag reference
}

# A run that is stopped within an epoch and continued has the bits of one that was not.
continued() {
  local same=(--epochs-max 12 --recipe quick --seed 3)
  train "${same[@]}" --tag whole > /dev/null
  for wait in 6 6; do
    timeout --foreground -s TERM $wait python mnist_resnet9.py "${where[@]}" "${same[@]}" --tag parts
  done
  train "${same[@]}" --tag parts
  python - "$save" << 'PY'
import sys, numpy as np
files = (f"{sys.argv[1]}/{tag}/checkpoint_last.npz" for tag in ("whole", "parts"))
whole, parts = (dict(np.load(file)) for file in files)
log = open(f"{sys.argv[1]}/parts/log.txt").read()
same = whole.keys() == parts.keys()
same = same and all(np.array_equal(whole[name], parts[name]) for name in whole)
print("stopped:", log.count("Stopped after step"), "times; the same bits:", same)
sys.exit(not same)
PY
}

# The CPU's step on more and more of its cores, ours and PyTorch's.
cores() {
  for count in 1 2 4 8 16; do
    [ "$count" -le "$(nproc)" ] || continue
    python benchmarks/speed/step_time.py --steps 20 --threads $count \
      --sides torch 'torch channels_last' || return 1
  done
}

python benchmarks/speed/gpu_step_time.py --check || exit 2
nvidia-smi --query-gpu=name,driver_version --format=csv || true
lscpu | grep -E 'Model name|per core' || true
parallel=()
python -c "import xdist" 2> /dev/null && parallel=(-n 6)
tests=(tests/test_gpu.py tests/test_gpu_kernels.py)
quick_tests=(-m "not long and not exhaustive" -k "not emulated")
stage kernels 150 python -m pytest -q -rs "${parallel[@]}" "${tests[@]}" "${quick_tests[@]}"
stage epochs 90 epochs
stage continued 90 continued
stage quick 90 quick
stage step_time 200 python benchmarks/speed/gpu_step_time.py --data-dir "$data"
stage record 120 record
stage cores 120 cores
echo "Output in $out; failed: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
