"""
How fast is fine-tuning? Tokens/s beside transformers' Trainer.

    pip install transformers accelerate
    python bench/finetuning.py                 (5 minutes on 2 cores)

A model of GPT-2's vocabulary, 4 layers and width 512, by finetune.py, and by the Trainer with its defaults and bf16
where the CPU has it, on data/tales.txt: rows of 256 tokens, 16 a step. Seconds of training steps only; the two take
turns, three times. `ratio: X` is our tokens/s over the Trainer's.
"""

import argparse
import copy
import os
import statistics
import tempfile
import time

import tiktoken
import torch
from common import BF16, ROOT, as_transformers, read_rows, run, show, write_random

T, B, STEPS = 256, 16, 4  # STEPS of a turn


def trainer(model, rows, folder):
    """Seconds a step that transformers' Trainer takes, after the first two steps."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    settings = dict(per_device_train_batch_size=B, max_steps=STEPS + 2, bf16=BF16, use_cpu=True, report_to=[])
    settings |= dict(logging_strategy="no", save_strategy="no", disable_tqdm=True, output_dir=folder)
    theirs = Trainer(model, TrainingArguments(**settings), train_dataset=rows, callbacks=[Clock()])
    theirs.remove_callback(PrinterCallback)
    theirs.train()
    return (times[-1] - times[1]) / STEPS


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    tales, tokens = os.path.join(ROOT, "data", "tales.txt"), (STEPS + 2) * B * T
    with open(tales, encoding="utf-8") as f:
        idx = torch.tensor(tiktoken.get_encoding("gpt2").encode_ordinary(f.read())[:tokens])
    rows, theirs, ours = [dict(input_ids=row, labels=row) for row in idx.view(-1, T)], [], []
    settings = f"--max_tokens {tokens} --total_batch_size {B * T} --batch_size {B} --device cpu --overwrite "
    settings += "--sample_every 0 --val_loss_every 0 --val_share 0.01"
    with tempfile.TemporaryDirectory() as folder:
        path, out_dir = os.path.join(folder, "random.pt"), os.path.join(folder, "run")
        write_random(path, 8, T, n_layer=4, n_embd=512)
        model = as_transformers(path)
        for _ in range(3):
            theirs.append(trainer(copy.deepcopy(model), rows, folder))
            run("finetune.py", "--init", path, "--data", tales, "--out_dir", out_dir, *settings.split())
            times = [row["train_time_ms"] for row in read_rows(out_dir, "log.jsonl") if "train_loss" in row]
            ours.append((times[-1] - times[1]) / 1000 / STEPS)
    table = [("bf16" if BF16 else "fp32", "tokens/s", "seconds a step, three turns")]
    for name, times in (("the Trainer of transformers", theirs), ("finetune.py", ours)):
        table.append((name, B * T / statistics.median(times), ", ".join(f"{each:.2f}" for each in times)))
    show(*table)
    print(f"ratio: {statistics.median(theirs) / statistics.median(ours):.2f}")


if __name__ == "__main__":
    main()
