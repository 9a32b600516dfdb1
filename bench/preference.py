"""
Does learning from a judge please the judge, and what else changes? Win rates over the demo's fine-tuned model.

    bash runs/demo.sh && python bench/preference.py      (5 minutes on 2 cores)
    python bench/preference.py --method ending           (7)

Three seeds. grpo: 50 steps with the offline judge on 200 openings. ending: the same with a server of OpenAI's kind
that prefers stories with one ending. dpo: four stories to each opening, ranked by the offline judge, and learned from
at half the usual rates, as in the demo. Then both models write two stories to each of 100 held-out openings, and
`rank.py --against` compares them by the offline judge: the win rate with its 95% interval (Wilson), words a story, and
the repetition, the share of a story's runs of four words that came before in it. `ratio: X` is the mean win rate over
50%.
"""

import argparse
import http.server
import json
import os
import re
import threading

from common import ROOT, read_rows, run, show

SEEDS = 1, 2, 3
ENDING = re.compile(r"somebody took (his|her) hand\.\s*\Z")


class Judge(http.server.BaseHTTPRequestHandler):
    """Prefers of two stories the one with the ending, and otherwise the first."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        a, b = re.search(r"--- Story A ---\n(.*)\n\n--- Story B ---\n(.*)", message, re.S).groups()
        answer = "B" if ENDING.search(b) and not ENDING.search(a) else "A"
        usage = dict(prompt_tokens=0, completion_tokens=0)
        data = json.dumps(dict(choices=[dict(message=dict(content=answer))], usage=usage)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def write(checkpoint, prompts, num, seed, out):
    """Stories to the prompts in a file, written anew; returns them."""
    if os.path.exists(out):
        os.remove(out)
    run("sample.py", checkpoint, "--prompt_file", prompts, "--num", num, "--seed", seed, "--out", out)
    return read_rows(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", default=os.path.join(ROOT, "out/demo"), help="what runs/demo.sh has written")
    parser.add_argument("--method", default="grpo", choices=["grpo", "ending", "dpo"], help="how to learn")
    flags = parser.parse_args()
    demo, folder = flags.demo, os.path.join(flags.demo, f"bench_{flags.method}")
    os.makedirs(folder, exist_ok=True)
    openings, held_out = f"{folder}/openings.txt", f"{folder}/held_out.txt"
    run(*"data/stories.py --voice scary --openings 200 --seed 1 --out".split(), openings)
    run(*"data/stories.py --voice scary --openings 100 --seed 2 --split val --out".split(), held_out)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    local = f"--judge local --scary {demo}/tuned --plain {demo}/gpt".split()
    url = f"http://127.0.0.1:{server.server_port}/v1"

    head, rates = (
        "seed, win rate, 95% interval, words before, after, repetition before, after, ending before, after",
        [],
    )
    table = [head.split(", ")]
    for seed in SEEDS:
        if flags.method == "dpo":
            write(f"{demo}/tuned", openings, 4, seed, f"{folder}/told.jsonl")
            run("rank.py", f"{folder}/told.jsonl", *local, "--out", f"{folder}/ranked.jsonl")
            learn = f"--method dpo --lr_scale 0.1 --data {folder}/ranked.jsonl".split()
        else:
            judge = local if flags.method == "grpo" else f"--judge openai --base_url {url}".split()
            learn = "--method", "grpo", "--prompts", openings, "--max_new_tokens", 220, *judge
        learned = "--out_dir", f"{folder}/learned", "--overwrite", "--sample_every", 0, "--seed", seed
        run("finetune.py", "--init", f"{demo}/tuned", *learn, *learned)
        before, after = f"{folder}/before.jsonl", f"{folder}/after.jsonl"
        stories = (
            write(f"{demo}/tuned", held_out, 2, seed, before),
            write(f"{folder}/learned", held_out, 2, seed, after),
        )
        said = run("rank.py", after, "--against", before, *local, "--out", f"{folder}/pairs.jsonl")[1]
        rate, low, high = re.search(r": ([\d.]+)% of .*?interval: ([\d.]+)% to ([\d.]+)%", said, re.S).groups()
        words = map(float, reversed(re.findall(r"([\d.]+) words a story", said)))
        repeated = reversed(re.findall(r"([\d.]+%) of its runs", said))
        ended = [f"{sum(bool(ENDING.search(x['text'])) for x in some) / len(some):.1%}" for some in stories]
        rates.append(float(rate))
        table.append((str(seed), f"{rate}%", f"{low}% to {high}%", *words, *repeated, *ended))
    show(*table)
    print(f"ratio: {sum(rates) / len(rates) / 50:.2f}")


if __name__ == "__main__":
    main()
