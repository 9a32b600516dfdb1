#!/usr/bin/env bash
# Set up what the tests need in .venv, then run them: bash runs/test.sh [arguments for pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "runs/test.sh: Python 3.10 or newer is needed; name one in PYTHON" >&2; exit 2; }
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet -r requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -q "$@"
