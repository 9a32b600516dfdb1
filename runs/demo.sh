#!/usr/bin/env bash
# From characters to a scary story on a laptop's CPU: bash runs/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "runs/demo.sh: Python 3.10 or newer is needed; name one in PYTHON" >&2; exit 2; }

echo "== packages: torch, numpy, tiktoken, requests, into .venv"
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
.venv/bin/python -c 'import torch, numpy, tiktoken, requests' 2>/dev/null || .venv/bin/python -m pip install -r requirements.txt

echo "== the tales, and a bigram model of their characters"
.venv/bin/python train_char.py --model bigram --out_dir out/demo/bigram

echo "== a small transformer on the same characters"
.venv/bin/python train_char.py --out_dir out/demo/char

echo "== and its story"
.venv/bin/python sample.py out/demo/char/ckpt.pt --prompt "It was a dark and stormy night" --max_new_tokens 1000 --seed 2
