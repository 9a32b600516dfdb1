"""
What does fine-tuning give, and how fast is it? Tokens/s beside transformers' Trainer, and the loss on unseen tales.

    pip install transformers accelerate
    python bench/finetuning.py                 (5 minutes on 2 cores)
    python bench/finetuning.py --part loss     (9 minutes)

Speed: a model of GPT-2's vocabulary, 4 layers and --width 512, ours by finetune.py, and what runs/export_hf.py makes of
it by the Trainer with its defaults (AdamW) and bf16 where the CPU has it, on rows of 256 tokens, 16 a step; seconds of
training steps only, and the two take turns.
Loss: a small model of bytes is pretrained on data/plain.txt (train_gpt.py) for --max_iters steps and for a fifth
more: its validation loss has stopped falling when the longer run ends no lower. The better one is fine-tuned on nine
tenths of data/tales.txt (finetune.py, at --lr_scale) and compared on the other tenth with the base, and with a model
that was trained on the same tales alone for the time of both. The last line is `ratio: X`: our tokens/s over the
Trainer's, or the base's loss over the fine-tuned one's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from common import DEMO

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
T, B = 256, 16


def trainer(folder, tokens, steps, bf16):
    """Seconds that transformers' Trainer takes for the steps after the first two."""
    import torch
    from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    tokens = torch.tensor(tokens[: (steps + 2) * B * T]).view(-1, T)
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = dict(per_device_train_batch_size=B, max_steps=steps + 2, bf16=bf16, use_cpu=True, report_to=[])
    settings.update(
        logging_strategy="no", save_strategy="no", disable_tqdm=True, output_dir=os.path.join(folder, "out")
    )
    rows = [dict(input_ids=row, labels=row) for row in tokens]
    theirs = Trainer(model, TrainingArguments(**settings), train_dataset=rows, callbacks=[Clock()])
    theirs.remove_callback(PrinterCallback)
    theirs.train()
    return times[-1] - times[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="of the model whose speed is measured")
    parser.add_argument("--steps", type=int, default=4, help="of a turn in which speed is measured")
    parser.add_argument("--max_iters", type=int, default=300, help="of pretraining")
    parser.add_argument("--lr_scale", type=float, default=0.5, help="of fine-tuning, in the half on loss")
    parser.add_argument("--keep", help="a folder for the models (default: a temporary one)")
    parser.add_argument("--part", choices=["speed", "loss"], default="speed", help="which half")
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
        print(f"{time.perf_counter() - started:4.0f} s: {script} {' '.join(map(str, arguments[:8]))}", file=sys.stderr)
        return done.stdout

    def rows(out_dir):
        with open(os.path.join(folder, out_dir, "log.jsonl"), encoding="utf-8") as f:
            return list(map(json.loads, f))

    import torch

    import finetune

    bf16 = finetune.get_device("cpu", "auto")[1] == torch.bfloat16
    with open(os.path.join(ROOT, "data", "tales.txt"), encoding="utf-8") as f:
        tales = f.read()
    stories = [story.strip() for story in tales.split("<|endoftext|>") if story.strip()]
    cut = len(stories) * 9 // 10
    for name, some in (("learned.txt", stories[:cut]), ("unseen.txt", stories[cut:])):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.write("\n<|endoftext|>\n".join(some) + "\n")

    if flags.part == "speed":
        torch.manual_seed(0)
        config = dict(vocab_size=50257, block_size=T, n_layer=4, n_head=flags.width // 64, n_embd=flags.width)
        config |= dict(tie_weights=False, embed_norm=True, logit_softcap=15.0)
        model = finetune.GPT(config)
        torch.nn.init.normal_(model.head, std=0.02)
        whole = dict(format=1, config=config, tokenizer="gpt2", model=model.state_dict())
        torch.save(whole, os.path.join(folder, "random.pt"))
        tokens = finetune.get_tokenizer("gpt2").encode_ordinary(tales)
        run("runs/export_hf.py", "random.pt", "hf", "--overwrite")
        seconds = {"Trainer": [], "finetune.py": []}
        for _ in range(3):
            seconds["Trainer"].append(trainer(os.path.join(folder, "hf"), tokens, flags.steps, bf16) / flags.steps)
            settings = f"--max_tokens {(flags.steps + 2) * B * T} --total_batch_size {B * T} --batch_size {B}".split()
            settings += "--sample_every 0 --val_loss_every 0 --val_share 0.01 --overwrite --out_dir speed".split()
            run("finetune.py", "--init", "random.pt", "--data", "learned.txt", *settings)
            times = [row["train_time_ms"] / 1000 for row in rows("speed") if "train_loss" in row]
            seconds["finetune.py"].append((times[-1] - times[1]) / flags.steps)
        best = {name: sorted(times)[1] for name, times in seconds.items()}
        print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}, {'bf16' if bf16 else 'fp32'}\n")
        print(f"{'fine-tuning, ' + str(flags.width) + ' wide':32}{'tokens/s':>10}   s a step, the three turns")
        for name, times in seconds.items():
            turns = "  ".join(f"{s:.2f}" for s in times)
            print(f"{name:32}{B * T / best[name]:10,.0f}   {turns}")
        ratio = best["Trainer"] / best["finetune.py"]

    if flags.part == "loss":
        plain = os.path.join(ROOT, "data", "plain.txt")
        for name, text in (("plain", plain), ("learned", "learned.txt")):
            run("data/prepare.py", text, "--tokenizer", "bytes", "--out", name, "--overwrite")

        def pretrain(out_dir, name, steps):
            size = f"--n_layer 4 --n_embd 192 --n_head 3 --max_iters {steps} --warmdown_frac 0.5".split()
            shards = "--train_files", f"{name}_train_*.bin", "--val_files", f"{name}_val_*.bin"
            run("train_gpt.py", *DEMO, *size, *shards, "--val_loss_every", 0, "--out_dir", out_dir)
            last = [row for row in rows(out_dir) if "val_loss" in row][-1]
            return last["val_loss"], last["train_time_ms"] / 1000

        def unseen(out_dir):
            """Nats a byte over the unseen tales, each after <|endoftext|>, in windows of the model."""
            _, _, model, _ = finetune.open_checkpoint(os.path.join(folder, out_dir))
            tokens, total, count = [], 0.0, 0
            for story in stories[cut:]:
                tokens += [256, *story.encode()]
            for i in range(0, len(tokens) - 1, T):
                x, y = torch.tensor([tokens[i : i + T]]), torch.tensor([tokens[i + 1 : i + T + 1]])
                with torch.no_grad():
                    total += model(x[:, : y.size(1)], y, reduction="sum").item()
                count += y.numel()
            return total / count

        half, time_half = pretrain("base", "plain", flags.max_iters)
        longer, time_longer = pretrain("longer", "plain", flags.max_iters * 6 // 5)
        base, time_base = ("base", time_half) if half <= longer else ("longer", time_longer)
        settings = "--lr_scale", flags.lr_scale, "--sample_every", 0, "--out_dir", "tuned", "--overwrite"
        run("finetune.py", "--init", base, "--data", "learned.txt", *settings)
        time_tuned = rows("tuned")[-1]["train_time_ms"] / 1000
        steps = (flags.max_iters if base == "base" else flags.max_iters * 6 // 5) * (time_base + time_tuned) / time_base
        _, time_alone = pretrain("alone", "learned", round(steps))
        losses = {name: unseen(name) for name in (base, "tuned", "alone")}
        print(f"\npretraining: {flags.max_iters} steps end at {half:.4f}, a fifth more at {longer:.4f}")
        print(f"{'nats a byte of unseen tales':32}{'loss':>10}   seconds of training")
        print(f"{'base, plain prose only':32}{losses[base]:10.4f}{time_base:10.0f}")
        print(f"{'base, then finetune.py':32}{losses['tuned']:10.4f}{time_base:10.0f} + {time_tuned:.0f}")
        print(f"{'tales only':32}{losses['alone']:10.4f}{time_alone:10.0f}")
        print(f"fine-tuning took {1 - losses['tuned'] / losses[base]:.1%} off the base's loss; ", end="")
        print(f"{time.perf_counter() - started:.0f} s in all")
        ratio = losses[base] / losses["tuned"]
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    main()
