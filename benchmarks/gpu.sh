#!/usr/bin/env bash
# All that only a GPU can show, in one command:
#     pip install -r requirements-dev.txt -r requirements-torch.txt
#     benchmarks/gpu.sh
# Tests (those on CuPy are in tests/test_gpu.py: every operation, logits and gradients agree with the CPU's), step times
# and kernels against PyTorch, then two epochs of MNIST by CuPy, PyTorch and the CPU, from one seed.
set -euo pipefail
cd "$(dirname "$0")/.."

python benchmarks/gpu_step_time.py --check || exit 2
nvidia-smi --query-gpu=name,driver_version --format=csv || true
python -m pytest -rs
python benchmarks/gpu_step_time.py --batch 8 64 256 1024
python benchmarks/gpu_step_time.py --tf32 --skip-compile

save=$(mktemp -d)
trap 'rm -rf "$save"' EXIT
same=(--epochs-max 2 --learning-rate 1e-3 --dropout 0.5 --save-dir "$save")
python mnist_resnet9.py "${same[@]}" --tag gpu --device gpu
python torch_version/resnet9_torch.py "${same[@]}" --tag gpu --device gpu
python mnist_resnet9.py "${same[@]}" --tag cpu --device cpu
python - "$save" <<'PY'
import csv, pathlib, sys
print("\ntwo epochs of MNIST                         seconds of the second   test accuracy")
accuracies = {}
for tag, name in {"gpu": "CuPy", "torch_gpu": "PyTorch on the GPU", "cpu": "NumPy on the CPU"}.items():
    last = list(csv.DictReader((pathlib.Path(sys.argv[1]) / tag / "metrics.csv").open()))[-1]
    accuracies[tag] = float(last["test_accuracy"])
    print(f"  {name:40s}  {float(last['seconds']):21.2f}   {accuracies[tag]:13.2%}")
apart = max(accuracies.values()) - min(accuracies.values())
print(f"  {'apart' if apart > 0.005 else 'within noise'}: {apart:.2%} between the best and the worst")
sys.exit(apart > 0.005)
PY
