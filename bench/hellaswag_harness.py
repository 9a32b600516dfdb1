"""
Is `hellaswag.py --style harness` what EleutherAI's lm-evaluation-harness computes? Against that code itself, on a CPU.

    pip install "lm-eval[hf]"
    python bench/hellaswag_harness.py --data data/hellaswag_val.jsonl     (about 3 minutes on 2 cores)

A small random checkpoint with GPT-2's tokens is exported by runs/export_hf.py. lm_eval.evaluate scores the export with
its model class HFLM and its task hellaswag, which reads the questions from a file instead of the hub; hellaswag.py
scores the checkpoint, and the export by --hf; all in fp32, once with a window of 1,024 tokens and once of 100, which
cuts many questions. Checked: log-likelihoods within 1e-3, and the same predictions for acc and acc_norm.
`ratio: X` is the share of predictions that are the same.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def write_model(folder, window):
    """A checkpoint of random weights and its export: their paths."""
    import torch

    torch.manual_seed(0)
    L, C, V = 2, 64, 50257
    config = dict(vocab_size=V, block_size=window, n_layer=L, n_head=2, n_embd=C)
    shapes = dict(embed=(50304, C), head=(50304, C))
    for i in range(L):
        blocks = dict(qkv=(3, C, C), o=(C, C), up=(4 * C, C), down=(C, 4 * C))
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in blocks.items()}
    model = {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    checkpoint, export = os.path.join(folder, f"{window}.pt"), os.path.join(folder, f"export_{window}")
    torch.save(dict(format=1, config=config, tokenizer="gpt2", model=model), checkpoint)
    command = [sys.executable, os.path.join(ROOT, "runs", "export_hf.py"), checkpoint, export]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return checkpoint, export


def theirs(export, data, work):
    """[(four log-likelihoods, acc's prediction, acc_norm's)] of each question."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager, get_task_dict

    config = {
        "include": os.path.join(os.path.dirname(lm_eval.__file__), "tasks", "hellaswag", "hellaswag.yaml"),
        "task": "hellaswag_from_a_file",  # all that is not said here is as in their own file
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": data}},
        "training_split": None,  # examples, of which there are none
    }
    with open(os.path.join(work, "task.yaml"), "w", encoding="utf-8") as f:
        json.dump(config, f)  # YAML too
    tasks = get_task_dict([config["task"]], TaskManager(include_path=work))
    model = HFLM(pretrained=export, device="cpu", dtype="float32", batch_size=8)
    samples = lm_eval.evaluate(model, tasks, log_samples=True, bootstrap_iters=0)["samples"][config["task"]]
    task, found = tasks[config["task"]], []
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        four = [(float(loss), greedy) for loss, greedy in sample["filtered_resps"]]
        scores = [task.process_results({**sample["doc"], "label": label}, four) for label in range(4)]
        predicted = [[score[key] for score in scores].index(1.0) for key in ("acc", "acc_norm")]
        found.append(([loss for loss, _ in four], *predicted))
    return found


def ours(model, data, details):
    command = [sys.executable, os.path.join(ROOT, "hellaswag.py"), *model, "--style", "harness", "--device", "cpu"]
    command += ["--dtype", "float32", "--data", data, "--details", details]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open(details, encoding="utf-8") as f:
        rows = sorted(map(json.loads, f), key=lambda row: row["question"])
    return [([-loss for loss in row["losses"]], row["prediction"], row["prediction_norm"]) for row in rows]


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", required=True, help="HellaSwag's validation set: python data/hellaswag.py")
    flags.add_argument("--questions", type=int, default=200, help="how many, at even distances (default: 200)")
    flags = flags.parse_args()
    same, compared, worst = 0, 0, 0.0
    with tempfile.TemporaryDirectory() as work:
        os.environ |= {"HF_HOME": os.path.join(work, "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        os.environ["TQDM_DISABLE"] = "1"
        try:
            import lm_eval.models.huggingface  # noqa: F401
        except ImportError as error:
            print(f'hellaswag_harness.py: {error}; pip install "lm-eval[hf]"', file=sys.stderr)
            raise SystemExit(2) from None
        with open(flags.data, encoding="utf-8") as f:
            lines = f.readlines()
        count = min(flags.questions, len(lines))
        data = os.path.join(work, "questions.jsonl")
        with open(data, "w", encoding="utf-8") as f:
            f.writelines(lines[i * len(lines) // count] for i in range(count))
        table = []
        for window in (1024, 100):
            checkpoint, export = write_model(work, window)
            expected = theirs(export, data, work)
            for name, model in (("checkpoint", [checkpoint]), ("--hf export", ["--hf", export])):
                found = ours(model, data, os.path.join(work, f"{name}_{window}.jsonl"))
                difference = max(abs(a - b) for old, new in zip(expected, found) for a, b in zip(old[0], new[0]))
                equal = [sum(old[i] == new[i] for old, new in zip(expected, found)) for i in (1, 2)]
                table.append(f"{name:14}{window:6,}{difference:12.1e}{equal[0]:8} of {count}{equal[1]:10} of {count}")
                worst, same, compared = max(worst, difference), same + sum(equal), compared + 2 * count
    print(f"\nlm-eval {importlib.metadata.version('lm-eval')}, {count} questions; how far hellaswag.py is from it\n")
    print(f"{'':14}window  difference       same acc      same acc_norm", *table, sep="\n")
    print(f"ratio: {same / compared:.2f}")
    raise SystemExit(0 if same == compared and worst < 1e-3 else 1)


if __name__ == "__main__":
    main()
