#!/usr/bin/env bash
# Set up what the tests need in .venv, then run them: bash runs/test.sh [arguments for pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "runs/test.sh: Python 3.10 or newer is needed; name one in PYTHON" >&2; exit 2; }
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
# pip's PyTorch for Linux comes with gigabytes for NVIDIA's cards; without one the small build does, if it can be fetched
nvidia-smi >/dev/null 2>&1 || .venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/python -m pip install --quiet \
    --timeout 10 --retries 1 --index-url https://download.pytorch.org/whl/cpu "$(grep ^torch requirements.txt)" 2>/dev/null \
    || echo "the small build of PyTorch cannot be fetched: pip takes the usual one"
.venv/bin/python -m pip install --quiet -r requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -q "$@"
