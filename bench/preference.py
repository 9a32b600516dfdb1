"""
Does learning from judgements please the judge? Win rate of DPO over the model it began with, by the offline judge.

    python bench/preference.py                 (about 9 minutes on 2 cores)

A small model of bytes is pretrained on data/plain.txt (train_gpt.py) and fine-tuned on data/tales.txt (finetune.py).
Then for each of three seeds: it writes 16 stories to each of 25 openings (sample.py), the offline judge chooses the
best of each of the 100 groups of four, which share an opening (rank.py --judge local, with the two models), and
`finetune.py --method dpo` learns from that. Both models then write 8 stories to each of 25 new openings; the judge
compares the two stories of the same opening and number, as rank.py does. The length of the stories is shown too, and
how much of them is repetition, for a judge can be pleased in wrong ways. The last line is `ratio: X`: wins over losses
of the model after DPO, all seeds together.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from common import DEMO

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
SIZE = "--n_layer 4 --n_embd 192 --n_head 3 --max_iters 240 --warmdown_frac 0.5"
LEARNED = """It was a dark and stormy night
The house had been empty for years
Nobody had told the children about the well
When the lamp went out
My grandmother never spoke of the attic
The last train had gone
There was a knock at the door
We found the boat on the third morning
The doctor closed the curtains
In the winter that the river froze
I had not slept for two nights
The old man at the inn warned us
The letter had no stamp
Something was walking on the roof
Her brother came back from the sea
The dog would not go into the barn
At midnight the bell began to ring
The new teacher cast no shadow
They dug where the map said
The photograph had changed again
It began with a smell of earth
The snow had covered every track
On the day of the funeral
The mirror in the hall was hung too high
No bird sang in that wood""".split("\n")
NEW = """The key did not fit any door
Every clock in the house had stopped
The fog came up from the marsh
She heard her own voice downstairs
The graves at the back of the church had no names
The captain locked himself in his cabin
A light was burning in the mill
The twins stopped talking in the autumn
I bought the chair from a dead man's sister
The road was not on the map
Under the floor there was a second floor
The cat stared at the corner
My father's coat was hanging in the hall
The telephone rang in the empty flat
He counted thirteen steps
The scarecrow had been moved
In the deepest part of the mine
The nurse said that nobody had died
The tide went out and did not return
The piano played one note
We were told never to look at the window
The stranger knew my name
The candle burned with a blue flame
The forest was closer than before
Behind the wall the scratching went on""".split("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--dpo", default="", help="more flags for finetune.py --method dpo")
    parser.add_argument("--keep", help="a folder for the models and stories (default: a temporary one)")
    flags = parser.parse_args()
    temporary = tempfile.TemporaryDirectory()
    folder = os.path.abspath(flags.keep or temporary.name)
    os.makedirs(folder, exist_ok=True)
    started = time.perf_counter()

    def run(script, *arguments):
        command = [sys.executable, os.path.join(ROOT, script), *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        print(f"{time.perf_counter() - started:4.0f} s: {script} {' '.join(map(str, arguments[:6]))}", file=sys.stderr)
        return done.stdout

    def write(name, text):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.write(text)

    def read(name):
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            return sorted(map(json.loads, f), key=lambda row: row["id"])

    write("learned.txt", "\n".join(LEARNED))
    write("new.txt", "\n".join(NEW))
    plain, tales = (os.path.join(ROOT, "data", name) for name in ("plain.txt", "tales.txt"))
    run("data/prepare.py", plain, "--tokenizer", "bytes", "--out", "plain", "--overwrite")
    shards = "--train_files", "plain_train_*.bin", "--val_files", "plain_val_*.bin"
    run("train_gpt.py", *DEMO, *SIZE.split(), *shards, "--out_dir", "base")
    run("finetune.py", "--init", "base", "--data", tales, "--out_dir", "sft", "--overwrite", "--lr_scale", 1)

    import rank

    os.chdir(folder)
    local = argparse.Namespace(scary="sft", plain="base", device="cpu", dtype="auto", repetition_penalty=1.0)
    judges = rank.load_judges(local)

    def score(story):
        """The judge's score of a story, as rank.py takes it, and the share of the story that is repetition."""
        (points,), (again,) = rank.score(local, *judges, [story])
        return points, again

    rows = []
    for seed in range(1, flags.seeds + 1):
        dpo, told = f"dpo{seed}", f"told{seed}.jsonl"
        settings = "--max_new_tokens", 250, "--seed", seed
        run("sample.py", "sft", "--prompt_file", "learned.txt", "--num", 16, "--out", told, *settings)
        run("rank.py", told, "--judge", "local", "--scary", "sft", "--plain", "base", "--out", f"ranked{seed}.jsonl")
        learn = "--data", f"ranked{seed}.jsonl", "--method", "dpo", "--out_dir", dpo, "--seed", seed, "--overwrite"
        log = run("finetune.py", "--init", "sft", *learn, *flags.dpo.split())
        last = [line for line in log.splitlines() if line.startswith("step:")][-1]
        print(last, file=sys.stderr)
        found = {}
        for name, checkpoint in (("before", "sft"), ("after", dpo)):
            path = f"{name}{seed}.jsonl"
            run("sample.py", checkpoint, "--prompt_file", "new.txt", "--num", 8, "--out", path, *settings)
            found[name] = read(path)
        judged = {name: list(map(score, stories)) for name, stories in found.items()}
        wins = sum(a > b for (a, _), (b, _) in zip(judged["after"], judged["before"]))
        losses = sum(a < b for (a, _), (b, _) in zip(judged["after"], judged["before"]))
        repeated = [statistics.mean(share for _, share in judged[name]) for name in found]
        length = [statistics.mean(len(row["text"]) for row in found[name]) for name in found]
        rows.append((seed, wins, losses, wins / (wins + losses), *length, *repeated))
        if seed == 1:
            for name in found:
                print(f"\n{name}: {found[name][0]['text']}\n", file=sys.stderr)
    print(f"\n{'seed':6}{'wins':>6}{'losses':>8}{'win rate':>10}   characters: before, after   repeated: before, after")
    for seed, wins, losses, rate, a, b, c, d in rows:
        print(f"{seed:<6}{wins:6}{losses:8}{rate:10.1%}{a:23.0f}{b:7.0f}{c:21.1%}{d:7.1%}")
    rates = [row[3] for row in rows]
    print(f"win rate {statistics.mean(rates):.1%}, from {min(rates):.1%} to {max(rates):.1%}; ", end="")
    print(f"{time.perf_counter() - started:.0f} s in all")
    print(f"ratio: {sum(row[1] for row in rows) / max(1, sum(row[2] for row in rows)):.2f}")


if __name__ == "__main__":
    main()
