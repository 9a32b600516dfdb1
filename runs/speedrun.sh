#!/usr/bin/env bash
# GPT-2's 124M to a validation loss of 3.28 on FineWeb, timed, once for each seed: bash runs/speedrun.sh [SEED...]
#
#     bash runs/speedrun.sh                 seeds 1 2 3, as records/README.md asks for
#     bash runs/speedrun.sh --dry_run 4 5   only prints the commands for these
#
# GPUS=4 takes so many instead of all. Interrupted, the same line goes on; its clock does too.
# Computed, not measured: all 3,600 steps are 1.61e18 FLOPs, 8.5 minutes on 8 H100 (989 TFLOP/s each) if 40% of their
# peak is reached. Whether 3.28 is reached within them is for the first run on GPUs to show.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=""
if [ "${1:-}" = --dry_run ]; then dry_run=yes; shift; fi
[ $# -gt 0 ] || set -- 1 2 3
for seed in "$@"; do
    [[ $seed =~ ^[0-9]+$ ]] || { echo "runs/speedrun.sh: '$seed' is not a seed; usage: bash runs/speedrun.sh [--dry_run] [SEED...]" >&2; exit 2; }
done
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
[[ $gpus =~ ^(0|[1-9][0-9]*)$ ]] || { echo "runs/speedrun.sh: GPUS='$gpus' is not a number" >&2; exit 2; }
if [ "$gpus" = 0 ] && [ -z "$dry_run" ]; then
    echo "runs/speedrun.sh: nvidia-smi lists no GPU here; GPUS=1 goes ahead all the same" >&2
    exit 2
fi
python=${PYTHON:-$(command -v .venv/bin/python || echo python3)}
torchrun="$python -m torch.distributed.run --standalone --nproc_per_node=$((gpus > 0 ? gpus : 8))"
run() {
    echo "$1"
    if [ -z "$dry_run" ]; then eval "$1"; fi
}

# 3,600 steps of 524,288 tokens are 1.89 B: in 19 shards of 100 M nothing is read twice
run "$python data/fineweb.py 19"

# --target_loss ends a run at its first validation, every 250 steps, that is not above it
for seed in "$@"; do
    run "$torchrun train_gpt.py --target_loss 3.28 --seed $seed --out_dir out/speedrun/$seed --resume"
done

# the last validation of each: its loss and its train_time are the record's
for seed in "$@"; do
    run "grep ^step:.*val_loss out/speedrun/$seed/log.txt | tail -n 1"
done
