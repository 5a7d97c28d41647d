#!/usr/bin/env bash
# Creates .venv-peers, the environment of the detectors that benchmarks compare with: mtcnn on
# TensorFlow, and facenet-pytorch without its pins (it requires a PyTorch of 2024). Ignored by git.
#   bash bench/peers.sh [python]        # takes some minutes; prints the versions
set -euo pipefail
cd "$(dirname "$0")/.."
python="${1:-python3}"
if [ ! -x .venv-peers/bin/python ]; then
    "$python" -m venv .venv-peers
fi
pip=(.venv-peers/bin/python -m pip install --quiet)
"${pip[@]}" "mtcnn==1.0.0" tensorflow-cpu lz4 joblib torch torchvision pillow requests tqdm
"${pip[@]}" --no-deps facenet-pytorch
.venv-peers/bin/python -c 'from importlib.metadata import version
for name in ("mtcnn", "tensorflow-cpu", "facenet-pytorch", "torch"): print(name, version(name))'
