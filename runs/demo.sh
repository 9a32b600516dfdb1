#!/usr/bin/env bash
# From nothing to a writer of scary stories, every stage, on a laptop's CPU; stopped, the same command goes on:
#     bash runs/demo.sh            about 7.5 minutes on two cores with AVX-512 and bf16, 16 with AVX2 (computed)
#     bash runs/demo.sh --quick    40 seconds: every stage at its smallest, to see that all of it works
#     bash runs/demo.sh --api      GPT-4o ranks and compares the stories (a thousand short requests, some two dollars),
#                                  with the key in OPENAI_API_KEY; what follows --api goes to rank.py:
#                                  --base_url http://localhost:8000/v1 --model llama3
# Everything is written to out/demo; remove that folder to begin again. The last files are timeline.md and, where
# matplotlib is installed, curves.png.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "runs/demo.sh: Python 3.10 or newer is needed; name one in PYTHON" >&2; exit 2; }

sizes=(--n_layer 2 --n_head 2 --n_embd 256 --block_size 256 --batch_size 16 --logit_softcap 0)
rates=(--matrix_lr 0.03 --embed_lr 0.3 --head_lr 0.01 --weight_decay 0 --warmdown_frac 0.5)
plain=48000 scary=20000 few=3000 iters=840 char_iters=300 openings=100 best_tokens=15000 length=220 batch=8192 vocab=2048
if [ "${1:-}" = --quick ]; then
    plain=300 scary=60 few=60 iters=20 char_iters=20 openings=10 best_tokens=2000 length=60 batch=1024 vocab=1024
    sizes+=(--n_layer 1 --n_head 1 --n_embd 64 --batch_size 4)
    shift
fi
judge=(--judge local --scary out/demo/tuned --plain out/demo/gpt) told=2
if [ "${1:-}" = --api ]; then
    shift
    if [ -n "${OPENAI_API_KEY:-}" ] || [ $# -gt 0 ]; then judge=(--judge openai "$@") told=1; else echo "no key in OPENAI_API_KEY: the offline judge ranks"; fi
elif [ $# -gt 0 ]; then
    echo "runs/demo.sh: $1: what is this? Known are --quick, then --api and flags of rank.py" >&2; exit 2
fi

echo "== packages: torch, numpy, tiktoken, requests, into .venv"
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
# pip's PyTorch for Linux comes with gigabytes for NVIDIA's cards; without one the small build does, if it can be fetched
nvidia-smi >/dev/null 2>&1 || .venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/python -m pip install --quiet \
    --timeout 10 --retries 1 --index-url https://download.pytorch.org/whl/cpu "$(grep ^torch requirements.txt)" 2>/dev/null \
    || echo "the small build of PyTorch cannot be fetched: pip takes the usual one"
.venv/bin/python -c 'import torch, numpy, tiktoken, requests' 2>/dev/null || .venv/bin/python -m pip install -r requirements.txt
python=.venv/bin/python
mkdir -p out/demo

# stage NAME WHAT COMMAND...: run a command, unless an earlier run of this script came to its end
stage() {
    local mark="out/demo/$1.done"
    echo; echo "== $2"
    if [ -e "$mark" ]; then echo "is there already"; return; fi
    echo "$ ${*:3}"; "${@:3}"
    touch "$mark"
}

begun=$SECONDS
stage plain "everyday stories, by a program" \
    $python data/stories.py --num $plain --out out/demo/plain.txt
stage scary "frightening ones" \
    $python data/stories.py --voice scary --num $scary --out out/demo/scary.txt
stage few "a small part of those, for models of characters" \
    $python data/stories.py --voice scary --num $few --out out/demo/few.txt
stage held_out "frightening ones that no stage learns from" \
    $python data/stories.py --voice scary --split val --num 200 --out out/demo/held_out.txt
stage openings "openings of stories that are held out, too" \
    $python data/stories.py --voice scary --split val --openings $openings --out out/demo/openings.txt
stage bigram "a bigram model of the frightening stories' characters" \
    $python train_char.py --data out/demo/few.txt --model bigram --out_dir out/demo/bigram --overwrite --max_new_tokens 500
stage char "a small transformer on the same characters" \
    $python train_char.py --data out/demo/few.txt --out_dir out/demo/char --overwrite --max_iters $char_iters --val_loss_every $((char_iters / 5))
stage tokens "a tokenizer, learned from both kinds of stories" \
    $python data/prepare.py out/demo/plain.txt out/demo/scary.txt --tokenizer bpe --vocab_size $vocab --out out/demo/all --overwrite
stage shards "the everyday stories, as shards of its tokens" \
    $python data/prepare.py out/demo/plain.txt --tokenizer out/demo/all_bpe.json --out out/demo/plain --overwrite
stage gpt "pretraining on everyday stories" \
    $python train_gpt.py "${sizes[@]}" --total_batch_size $batch "${rates[@]}" --max_iters $iters --out_dir out/demo/gpt --tokenizer out/demo/plain_bpe.json \
    --train_files "out/demo/plain_train_*.bin" --val_files "out/demo/plain_val_*.bin" --max_new_tokens $length \
    --val_loss_every $((iters / 15)) --val_tokens 65536 --sample_every $((iters / 3)) --milestone_every $((iters / 3)) --save_every 100 --resume
stage tuned "fine-tuning on frightening stories" \
    $python finetune.py --init out/demo/gpt --data out/demo/scary.txt --out_dir out/demo/tuned --lr_scale 0.7 --total_batch_size $batch \
    --epochs 1 --val_share 0.01 --max_new_tokens $length --save_every 50 --resume
stage written "four stories to each of the openings" \
    $python sample.py out/demo/tuned --prompt_file out/demo/openings.txt --num 4 --max_new_tokens $length --out out/demo/stories.jsonl
stage ranked "the scariest of every four" \
    $python rank.py out/demo/stories.jsonl "${judge[@]}" --out out/demo/ranked.jsonl
stage best "fine-tuning on the winners" \
    $python finetune.py --init out/demo/tuned --data out/demo/best.jsonl --out_dir out/demo/best --max_tokens $best_tokens \
    --max_new_tokens $length --resume
stage dpo "learning from the judgements: DPO" \
    $python finetune.py --init out/demo/tuned --data out/demo/ranked.jsonl --method dpo --lr_scale 0.1 --out_dir out/demo/dpo \
    --max_new_tokens $length --resume

echo; echo "== the same opening, continued by every stage"
$python runs/timeline.py "Bigram of characters=out/demo/bigram" "Small transformer of characters=out/demo/char" \
    "Pretraining on everyday stories=out/demo/gpt" "Fine-tuning on frightening ones=out/demo/tuned" \
    "Fine-tuning on the winners=out/demo/best" "DPO on the judgements=out/demo/dpo" --out out/demo/timeline.md
echo; cat out/demo/timeline.md
if $python -c 'import matplotlib' 2>/dev/null; then
    $python runs/plot.py out/demo/char out/demo/gpt out/demo/tuned out/demo/dpo --out out/demo/curves
else
    echo "pictures of the losses: $python -m pip install matplotlib; $python runs/plot.py out/demo/gpt out/demo/tuned"
fi

echo; echo "== who writes scarier? stories by each to the same openings"
for name in gpt tuned best dpo; do
    $python sample.py out/demo/$name --prompt_file out/demo/openings.txt --num $told --max_new_tokens $length --out out/demo/${name}_told.jsonl
done
for pair in tuned-gpt best-tuned dpo-tuned dpo-best; do
    $python rank.py out/demo/${pair%-*}_told.jsonl --against out/demo/${pair#*-}_told.jsonl "${judge[@]}" --out out/demo/$pair.jsonl |
        sed -nE 's|out/demo/([a-z]+)_told.jsonl|\1|g; /^win rate|^95%/p'
done
echo "$((SECONDS - begun)) s; more stories: $python sample.py out/demo/dpo"
