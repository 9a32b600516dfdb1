#!/usr/bin/env bash
# The whole journey of the original post on 8 GPUs: from FineWeb to a writer of scary stories that is read aloud.
#
#     bash runs/ghoul.sh --dry_run     prints every command and carries out none
#     bash runs/ghoul.sh               all of it; interrupted, the same line goes on
#     bash runs/ghoul.sh --dpo         with one more stage: learning from the judgements themselves
#
# Beforehand: creepypastas.xlsx, from Kaggle by hand (the script says how), and a key of OpenAI in OPENAI_API_KEY.
# GPUS=4 takes so many instead of all, as many as divide the 480 rows of a step. Everything goes to out/ghoul.
#
# What to expect. All of this is computed, not measured: nobody has run this script from end to end.
#   FLOPs       1,549,467,648 parameters, tied, so all of them multiply: 6 x 1,549,467,648 = 9.297e9 a token, and
#               12 x 52 layers x width 1,536 x context 1,024 = 0.981e9 for attention: 10.278e9 a token.
#               15,258 steps x 491,520 = 7,499,612,160 tokens: 7.71e19 FLOPs.
#   Time        8 H100 (SXM) at their published 989 TFLOP/s of dense bf16 are 7.91e15 FLOP/s. If 40% of that is reached
#               (assumed): 7.71e19 / (0.40 x 7.91e15) = 24,400 s, 6.8 hours; at 30% 9.0 hours, at 50% 5.4. The
#               original reports about 8 hours on 8 H100 for this, which would be 34%.
#   Money       6.8 hours x 8 GPUs = 54 GPU hours: 108 to 162 dollars at 2 to 3 dollars (assumed) for an hour of one;
#               in the 8 hours of the original 128 to 192. Validation, HellaSwag, stories and saving come on top.
#               Fine-tuning on 3 x 8.7 M tokens adds 0.35%.
#   The judge   about 0.83 dollars for 200 requests and a few more for votes that are split: `rank.py --dry_run` on 400
#               made-up stories of 225 words, at OpenAI's prices of August 2025. Reading aloud is not counted.
#   Disk        15 GB of shards. The checkpoint to go on from is 12.7 GB (weights and momenta in fp32), and while the
#               next one is written there are two; 16 milestones of 6.2 GB; then 12.7 GB for each of the two or three
#               fine-tunings: some 170 GB in all.
set -euo pipefail
cd "$(dirname "$0")/.."

refuse() { echo "runs/ghoul.sh: $1" >&2; exit 2; }
dry_run="" dpo=""
for flag in "$@"; do
    case $flag in
        --dry_run) dry_run=yes ;;
        --dpo) dpo=yes ;;
        *) refuse "'$flag' is unknown; usage: bash runs/ghoul.sh [--dry_run] [--dpo]" ;;
    esac
done
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
[[ $gpus =~ ^(0|[1-9][0-9]*)$ ]] || refuse "GPUS='$gpus' is not a number"
python=${PYTHON:-$(command -v .venv/bin/python || echo python3)}
torchrun="$python -m torch.distributed.run --standalone --nproc_per_node=$((gpus > 0 ? gpus : 8))"

# what would be missing only after hours is asked for now
if [ -z "$dry_run" ]; then
    [ -e creepypastas.xlsx ] || refuse "creepypastas.xlsx is not here: download the dataset thomaskonstantin/3500-popular-creepypastas at kaggle.com (it takes an account), unpack it, and put that file beside README.md"
    [ -n "${OPENAI_API_KEY:-}" ] || refuse "the environment variable OPENAI_API_KEY is not set: gpt-4o is the judge and reads the story aloud"
    "$python" -c "import openpyxl" 2>/dev/null || refuse "reading .xlsx takes one more package: $python -m pip install openpyxl"
    [ "$gpus" != 0 ] || refuse "nvidia-smi lists no GPU here; GPUS=1 goes ahead all the same"
    [ $((480 % gpus)) = 0 ] || refuse "$gpus GPUs do not divide the 480 rows of a step; GPUS=N takes N of them"
fi

run() { # shows a command and carries it out
    echo "$1"
    if [ -z "$dry_run" ]; then eval "$1"; fi
}
make() { # the same, unless the file is there already: make FILE COMMAND
    echo "$2"
    if [ -z "$dry_run" ] && [ ! -e "$1" ]; then eval "$2"; fi
}
opening="'It was a dark and stormy night'"
run "mkdir -p out/ghoul"

# the CreepyPasta stories as one text: first, since it takes seconds and would show that the file is not the right one
make out/ghoul/stories.txt "$python data/prepare.py creepypastas.xlsx --column body --text out/ghoul/stories.txt"

# FineWeb: 75 shards of 100 M tokens hold the 7,499,612,160 of the run
run "$python data/fineweb.py 75"

# the questions of HellaSwag, which are asked during pretraining, and after it
run "$python data/hellaswag.py"

# without this, a process that comes back may read addresses of dead ones
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# pretraining: the original's model, steps and learning rates; weights for good every 1,000 steps; a process that is
# lost comes back, three times
model="--n_layer 52 --n_head 12 --n_embd 1536 --tie_weights --no-embed_norm --logit_softcap 0"
steps="--total_batch_size 491520 --batch_size 12 --max_iters 15258 --warmdown_frac 0.2857"
rates="--matrix_lr 0.00705 --down_lr 0.0141 --embed_lr 0.0018 --weight_decay 0"
every="--hellaswag_every 1000 --milestone_every 1000"
run "$torchrun --max-restarts=3 train_gpt.py $model $steps $rates $every --out_dir out/ghoul/gpt --resume"

# HellaSwag over the milestones, beside the published figures of GPT-2 and GPT-3
run "$torchrun hellaswag.py out/ghoul/gpt/milestone_*.pt --details out/ghoul/hellaswag.jsonl"

# fine-tuning: three passes over the CreepyPasta stories (the folder of a run stands for its newest checkpoint)
run "$torchrun finetune.py --init out/ghoul/gpt --data out/ghoul/stories.txt --out_dir out/ghoul/finetune --resume"

# 400 stories
run "$python sample.py out/ghoul/finetune --prompt $opening --num 400 --max_new_tokens 300 --out out/ghoul/400.jsonl"

# gpt-4o chooses the scariest of every four: ranked.jsonl, and the winners in best.jsonl; never more than 5 dollars
run "$python rank.py out/ghoul/400.jsonl --out out/ghoul/ranked.jsonl --max_cost 5"

# fine-tuning on the winners: 50,000 tokens, as for all stories that a model wrote
run "$python finetune.py --init out/ghoul/finetune --data out/ghoul/best.jsonl --out_dir out/ghoul/best --resume"

# what the original did not have: learning from winners and losers (DPO)
if [ -n "$dpo" ]; then
    run "$python finetune.py --init out/ghoul/finetune --data out/ghoul/ranked.jsonl --method dpo --out_dir out/ghoul/dpo --resume"
fi

# a story, read aloud
make out/ghoul/story.mp3 "$python sample.py out/ghoul/best --prompt $opening --narrate out/ghoul/story.mp3"
