"""
Does learning from a judge please the judge, and what else changes? Win rates over the demo's fine-tuned model.

    bash runs/demo.sh && python bench/preference.py      (GRPO: 9 minutes on 2 cores; --method dpo: 3)

Three seeds. grpo: 50 steps with the offline judge on 200 openings. dpo: four stories to each of them, ranked by the
same judge, and learned from at half the usual rates, as in the demo. Then both models write two stories to each of 100
held-out openings, and `rank.py --against` compares them: the win rate with its 95% interval (Wilson), words a story,
and the repetition, the share of a story's runs of four words that came before in it. `ratio: X` is the mean of the
three win rates over 50%.
"""

import argparse
import os
import re

from common import ROOT, run, show

SEEDS = 1, 2, 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", default=os.path.join(ROOT, "out/demo"), help="what runs/demo.sh has written")
    parser.add_argument("--method", default="grpo", choices=["grpo", "dpo"], help="how to learn")
    flags = parser.parse_args()
    folder = os.path.join(flags.demo, f"bench_{flags.method}")
    os.makedirs(folder, exist_ok=True)
    openings, held_out = f"{folder}/openings.txt", f"{folder}/held_out.txt"
    write = "data/stories.py", "--voice", "scary"
    run(*write, "--openings", 200, "--seed", 1, "--out", openings)
    run(*write, "--openings", 100, "--seed", 2, "--split", "val", "--out", held_out)
    tuned, models = f"{flags.demo}/tuned", ("--scary", f"{flags.demo}/tuned", "--plain", f"{flags.demo}/gpt")

    table, rates = [("seed", "win rate", "95% interval", "words before", "after", "repetition before", "after")], []
    for seed in SEEDS:
        learned, before, after = f"{folder}/{seed}", f"{folder}/before{seed}.jsonl", f"{folder}/after{seed}.jsonl"
        learn = [
            "finetune.py",
            "--init",
            tuned,
            "--out_dir",
            learned,
            "--overwrite",
            "--sample_every",
            0,
            "--seed",
            seed,
        ]
        learn += ["--method", flags.method, "--max_new_tokens", 220]
        if flags.method == "grpo":
            learn += ["--prompts", openings, "--judge", "local", *models]
        else:
            told, ranked = f"{folder}/told{seed}.jsonl", f"{folder}/ranked{seed}.jsonl"
            run("sample.py", tuned, "--prompt_file", openings, "--num", 4, "--seed", seed, "--out", told)
            run("rank.py", told, "--judge", "local", *models, "--out", ranked)
            learn += ["--data", ranked, "--lr_scale", 0.1]
        run(*learn)
        for checkpoint, out in ((tuned, before), (learned, after)):
            if os.path.exists(out):
                os.remove(out)
            run("sample.py", checkpoint, "--prompt_file", held_out, "--num", 2, "--seed", seed, "--out", out)
        compare = (
            "rank.py",
            after,
            "--against",
            before,
            "--judge",
            "local",
            *models,
            "--out",
            f"{folder}/pairs{seed}.jsonl",
        )
        said = run(*compare)[1]
        rate, low, high = re.search(r": ([\d.]+)% of .*?interval: ([\d.]+)% to ([\d.]+)%", said, re.S).groups()
        (words_after, words), (repeated_after, repeated) = [
            re.findall(pattern, said) for pattern in (r"([\d.]+) words a story", r"([\d.]+%) of its runs")
        ]
        rates.append(float(rate))
        lengths = float(words), float(words_after), repeated, repeated_after
        table.append((str(seed), f"{rate}%", f"{low}% to {high}%", *lengths))
    show(*table)
    print(f"ratio: {sum(rates) / len(rates) / 50:.2f}")


if __name__ == "__main__":
    main()
