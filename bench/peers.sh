#!/usr/bin/env bash
# Makes the environment that bench/compare_mtcnn.py runs the `mtcnn` package in: TensorFlow on
# the CPU and the package, apart from the project's own environment and ignored by git.
#   bash bench/peers.sh [python]        # about 2 minutes; prints the two versions
set -euo pipefail
cd "$(dirname "$0")/.."
python="${1:-python3}"
if [ ! -x .venv-peers/bin/python ]; then
    "$python" -m venv .venv-peers
fi
.venv-peers/bin/python -m pip install --quiet "mtcnn==1.0.0" tensorflow-cpu lz4 joblib
.venv-peers/bin/python -c \
    'from importlib.metadata import version as v; print("mtcnn", v("mtcnn"), "tensorflow", v("tensorflow-cpu"))'
