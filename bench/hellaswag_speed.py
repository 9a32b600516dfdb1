"""
How fast is HellaSwag scored? Questions per second beside the plain way, on this machine's CPU, and the same answers?

    python bench/hellaswag_speed.py --data data/hellaswag_val.jsonl     (about 4 minutes on 2 cores)

The model is train_gpt.py's at GPT-2's 124M with random weights everywhere, so that its answers differ. The plain way is
that of build-nanogpt: a question at a time, its context before each of the four endings, rows padded to the longest,
logits of every position, fp32. Ours is hellaswag.py's: contexts once, in batches, their endings going on from keys and
values; in fp32 and in the type that --dtype auto takes here. All take the same --questions, tokenization included: the
plain way half of them before ours and half after. Fewer --questions take less time. Checked: in fp32 every prediction
is the plain way's and no loss is further from it than 1e-4 a token; in the other type 99% of predictions are. The last
line is `ratio: X`: our questions/s, in the type of --dtype auto, over the plain way's.
"""

import argparse
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
TOKENS_AT_ONCE = 1024  # what hellaswag.py takes on a CPU


def build(hellaswag, dtype):
    """The model, its activations and weights in dtype; it counts the positions that it computes."""
    import torch

    torch.manual_seed(0)
    model = hellaswag.GPT(hellaswag.Config(50257, 1024, 12, 6, 768), dtype).eval()
    with torch.no_grad():
        model.head.normal_(std=0.02)
        for block in model.blocks:
            block.o.normal_(std=0.02 / 24**0.5)
            block.down.normal_(std=0.02 / 24**0.5)
    hidden, model.positions = model.hidden, 0

    def counted(idx, *rest, **named):
        model.positions += idx.numel()
        return hidden(idx, *rest, **named)

    model.hidden = counted
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def plain(model, encode, rows):
    """Losses of the four endings of each row, summed over tokens (n, 4)."""
    import torch
    import torch.nn.functional as F

    losses = torch.zeros(len(rows), 4)
    for i, row in enumerate(rows):
        context, endings = encode(row["ctx"]), [encode(" " + ending) for ending in row["endings"]]
        T = len(context) + max(map(len, endings))
        tokens, mask = torch.zeros(4, T, dtype=torch.long), torch.zeros(4, T)
        for j, ending in enumerate(endings):
            tokens[j, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[j, len(context) : len(context) + len(ending)] = 1
        with torch.no_grad():
            logits = model(tokens)[:, :-1]  # (4, T - 1, V)
            each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, T - 1)
        losses[i] = (each * mask[:, 1:]).sum(1)
    return losses


def ours(hellaswag, model, encode, rows):
    import torch

    questions, losses = [hellaswag.completion_question(encode, row, 1024) for row in rows], torch.zeros(len(rows), 4)
    for chosen, four in hellaswag.score(model, questions, TOKENS_AT_ONCE):
        losses[chosen] = four
    return losses


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", required=True, help="HellaSwag's validation set, as hellaswag.py downloads it")
    flags.add_argument("--questions", type=int, default=300, help="how many, from the first on (default: 300)")
    flags = flags.parse_args()
    import torch

    import hellaswag

    rows = hellaswag.read_hellaswag(flags.data)[: flags.questions]
    encode = hellaswag.get_tokenizer("gpt2").encode_ordinary
    auto = hellaswag.get_device("cpu", "auto")[1]
    model = build(hellaswag, torch.float32)
    ways = {("plain", "float32"): (plain, model)}
    for dtype in dict.fromkeys((torch.float32, auto)):
        made = build(hellaswag, dtype).pack()
        ways["hellaswag.py", str(dtype)[6:]] = (lambda *rest: ours(hellaswag, *rest), made)
    for way, made in ways.values():  # the first products are slow
        way(made, encode, rows[:2])
        made.positions = 0
    losses, seconds = {name: [] for name in ways}, dict.fromkeys(ways, 0.0)
    half, (first, *others) = len(rows) // 2, ways
    for name, part in ((first, rows[:half]), *((name, rows) for name in others), (first, rows[half:])):
        way, made = ways[name]
        start = time.perf_counter()
        losses[name].append(way(made, encode, part))
        seconds[name] += time.perf_counter() - start
        print(f"{' '.join(name)}: {len(part)} questions", file=sys.stderr, flush=True)

    sizes = torch.tensor([[len(encode(" " + ending)) for ending in row["endings"]] for row in rows])
    losses = {name: torch.cat(parts) for name, parts in losses.items()}
    expected = losses["plain", "float32"]
    print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}; {len(rows)} questions\n")
    heads = f"{'questions/s':>12}{'positions a question':>22}{'same predictions':>18}{'loss differs':>14}"
    print(f"{'way':14}{'dtype':10}{heads}")
    good = True
    for (way, dtype), found in losses.items():
        same = [(found / n).argmin(1) == (expected / n).argmin(1) for n in (1, sizes)]  # acc's and acc_norm's
        share, worst = torch.cat(same).float().mean().item(), ((found - expected).abs() / sizes).max().item()
        positions = ways[way, dtype][1].positions / len(rows)
        print(f"{way:14}{dtype:10}{len(rows) / seconds[way, dtype]:12.2f}{positions:22.0f}{share:18.1%}{worst:14.1e}")
        good &= (share == 1 and worst < 1e-4) if dtype == "float32" else share >= 0.99
    print("loss differs: at most, a token. " + ("As it should be." if good else "NOT AS IT SHOULD BE."))
    print(f"ratio: {seconds['plain', 'float32'] / seconds['hellaswag.py', str(auto)[6:]]:.2f}")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
