"""
Does learning from judgements please the judge? Win rate of DPO over the model it began with, by the offline judge.

    python bench/preference.py                 (about 9 minutes on 2 cores)

A small model of bytes is pretrained on data/plain.txt and fine-tuned on data/tales.txt. Then for each of three seeds:
it writes 16 stories to each of 25 openings, the offline judge chooses the best of each of the 100 groups of four that
share an opening, and `finetune.py --method dpo` learns from that. Both models then write 8 stories to each of 25 new
openings; the judge compares the two stories of the same opening and number, by the scores that rank.py gives as its
reasons. `ratio: X` is wins over losses of the model after DPO, all seeds together.
"""

import argparse
import os
import re
import statistics
import tempfile

from common import ROOT, pretrain, read_rows, run, show

SIZE = "--n_layer 4 --n_embd 192 --n_head 3 --max_iters 240 --warmdown_frac 0.5".split()
TUNE = "finetune.py --device cpu --overwrite --sample_every 0".split()
JUDGE = "--judge local --scary sft --plain base --device cpu --out".split()
SEEDS = 1, 2, 3


def judge(folder, told):
    """The judge's scores of the stories in a file, in the order of their ids, as rank.py explains its choices."""
    scores = {}
    run("rank.py", told, *JUDGE, f"judged_{told}", folder=folder)
    for row in read_rows(folder, f"judged_{told}"):
        for label, score in re.findall(r"\b([A-D]) (\S+) \(", row["reasoning"]):
            scores[row["stories"][label]["id"]] = float(score)
    return [score for _, score in sorted(scores.items())]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", metavar="DIR", help="a folder for the models and stories (default: a temporary one)")
    flags = parser.parse_args()
    temporary = tempfile.TemporaryDirectory()
    folder = os.path.abspath(flags.keep or temporary.name)
    os.makedirs(folder, exist_ok=True)
    openings, new_openings = (os.path.join(ROOT, "bench", name) for name in ("openings.txt", "new_openings.txt"))
    plain, tales = (os.path.join(ROOT, "data", name) for name in ("plain.txt", "tales.txt"))
    run("data/prepare.py", plain, "--tokenizer", "bytes", "--out", "plain", "--overwrite", folder=folder)
    pretrain(folder, "plain", "base", *SIZE)
    run(*TUNE, "--init", "base", "--data", tales, "--lr_scale", 1, "--out_dir", "sft", folder=folder)

    table = [("seed", "wins", "losses", "win rate", "characters a story before", "after")]
    for seed in SEEDS:
        dpo, told, ranked = f"dpo{seed}", f"told{seed}.jsonl", f"ranked{seed}.jsonl"
        write = "--device", "cpu", "--max_new_tokens", 250, "--seed", seed, "--out"
        run("sample.py", "sft", "--prompt_file", openings, "--num", 16, *write, told, folder=folder)
        run("rank.py", told, *JUDGE, ranked, folder=folder)
        learn = "--init", "sft", "--data", ranked, "--method", "dpo", "--out_dir", dpo, "--seed", seed
        run(*TUNE, *learn, folder=folder)
        scores, lengths = [], []
        for checkpoint, out in (("sft", f"before{seed}.jsonl"), (dpo, f"after{seed}.jsonl")):
            run("sample.py", checkpoint, "--prompt_file", new_openings, "--num", 8, *write, out, folder=folder)
            scores.append(judge(folder, out))
            lengths.append(statistics.mean(len(story["text"]) for story in read_rows(folder, out)))
        wins = sum(after > before for before, after in zip(*scores))
        losses = sum(after < before for before, after in zip(*scores))
        table.append((str(seed), wins, losses, f"{wins / max(1, wins + losses):.1%}", *lengths))
    show(*table)
    wins, losses = (sum(row[i] for row in table[1:]) for i in (1, 2))
    print(f"win rate {wins / (wins + losses):.1%}")
    print(f"ratio: {wins / max(1, losses):.2f}")


if __name__ == "__main__":
    main()
