"""
Is `finetune.py --method dpo` what TRL computes? Loss, rewards and gradients of one batch of pairs, on a CPU.

    pip install -r requirements-dev.txt trl
    python bench/dpo_oracle.py                 (30 seconds on 2 cores)

Theirs is TRL's DPOTrainer with its own collator, its loss "sigmoid" and a reference model, in fp32 as ours. The last
lines are its figures for tests/test_finetune.py, and `ratio: X`, the share of them that is the same to 1e-5.
"""

import argparse
import os
import sys
import tempfile

import numpy as np
import torch

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # tests/test_finetune.py imports this file
from common import as_transformers, show  # noqa: E402

import finetune as script  # noqa: E402

BETA, WINDOW, V = 0.3, 48, 257
GROUPS = [  # a prompt, and how the winner and the losers go on; some of them are cut where the window ends
    ("It was a dark and stormy night", (" and the door", "; nobody knocked.", "!", " that had no end, no end, no end")),
    ("The cellar ", ("hummed a song without a last line, and another", "was dry", "listened back")),
]


def make_model(phase):
    """A model whose weights are sines of squares: as good as random, and the same on every machine."""
    sizes = dict(vocab_size=V, block_size=WINDOW, n_layer=2, n_head=2, n_embd=16)
    model = script.GPT(sizes | dict(tie_weights=False, embed_norm=True, logit_softcap=15.0))
    for number, p in enumerate(model.parameters()):
        i = torch.arange(p.numel(), dtype=torch.float64)
        p.data.copy_((torch.sin(0.618 * i * i + number) + phase * torch.sin(0.27 * i * i)).view_as(p) * 0.2)
    return model


def figures(loss, rewards, gradients):
    """What the test holds: loss, mean rewards of winners and losers, of each gradient the size and a projection."""
    found = {"loss": loss, "winners": rewards[0], "losers": rewards[1]}
    for name, gradient in gradients.items():
        pattern = torch.sin(torch.arange(gradient.numel(), dtype=torch.float64) ** 2).view_as(gradient)
        found[f"{name}.size"] = gradient.double().norm().item()
        found[f"{name}.along"] = (gradient.double() * pattern).sum().item()
    return found


def ours():
    """The gradients by name, and the figures, of finetune.py."""
    stories, pairs = [], []
    for prompt, rests in GROUPS:
        pairs += [(len(stories), len(stories) + loser) for loser in range(1, len(rests))]
        for rest in rests:
            stories.append((np.array([V - 1, *(prompt + rest).encode()][: WINDOW + 1]), 1 + len(prompt)))
    first, model, pairs = make_model(0.0), make_model(0.3), torch.tensor(pairs)  # (5, 2)
    loss = script.compare(model, first, stories, pairs, 2, BETA, 1 / len(pairs))[0].item()  # in three micro-batches
    with torch.no_grad():
        pi_logps, ref_logps = (script.story_logps(m, stories, torch.device("cpu")) for m in (model, first))
    rewards = BETA * (pi_logps - ref_logps)[pairs].mean(0)
    gradients = {name: p.grad[:V] if name in ("embed", "head") else p.grad for name, p in model.named_parameters()}
    return gradients, figures(loss, rewards.tolist(), gradients)


def their_model(phase, folder):
    """make_model(phase) of transformers."""
    model, path = make_model(phase), os.path.join(folder, f"{phase}.pt")
    torch.save(dict(format=1, config=model.config, tokenizer="bytes", model=model.state_dict()), path)
    model = as_transformers(path)
    model.get_input_embeddings().padding_idx = None  # or <|endoftext|>, the export's padding, would not learn
    return model


def by_our_names(model):
    """The gradients of a model of transformers."""
    grad = {name: p.grad for name, p in model.named_parameters()}
    gradients = {"embed": grad["model.embed_tokens.weight"], "head": grad["lm_head.weight"]}
    for i in range(2):
        layer = f"model.layers.{i}"
        gradients[f"blocks.{i}.qkv"] = torch.stack([grad[f"{layer}.self_attn.{c}_proj.weight"] for c in "qkv"])
        for name, long in (("o", "self_attn.o_proj"), ("up", "mlp.fc1"), ("down", "mlp.fc2")):
            gradients[f"blocks.{i}.{name}"] = grad[f"{layer}.{long}.weight"]
    return gradients


def theirs(folder):
    """The same of TRL's trainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    models, rows, batch = [their_model(phase, folder) for phase in (0.3, 0.0)], [], []
    for prompt, (best, *others) in GROUPS:
        rows += [dict(prompt=prompt, chosen=best, rejected=other) for other in others]
    for row in rows:  # the tokens themselves, for the trainer's own tokenization would add an end to each story
        ids = {f"{key}_ids": list(text.encode()) for key, text in row.items()}
        batch.append(ids | {"prompt_ids": [V - 1] + ids["prompt_ids"]})
    settings = dict(beta=BETA, max_length=WINDOW + 1, loss_type="sigmoid", report_to="none", disable_tqdm=True)
    settings |= dict(use_cpu=True, bf16=False, gradient_checkpointing=False, output_dir=folder)
    more = dict(
        train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(models[0].name_or_path)
    )
    trainer = DPOTrainer(*models, DPOConfig(**settings), **more)
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(batch))
    loss.backward()
    gradients = by_our_names(trainer.model)
    rewards = [trainer._metrics["train"][f"rewards/{key}"][0] for key in ("chosen", "rejected")]
    return gradients, figures(loss.item(), rewards, gradients)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        expected, their_figures = theirs(folder)
    found, our_figures = ours()
    differences = {name: abs(our_figures[name] - value) for name, value in their_figures.items()}
    close = [differences[name] < 1e-5 * max(1, abs(value)) for name, value in their_figures.items()]
    rows = [(name, *(f"{each[name]:.7f}" for each in (their_figures, our_figures))) for name in their_figures]
    show(("", "TRL", "finetune.py", "difference"), *((*row, f"{differences[row[0]]:.1e}") for row in rows))
    worst = max(((found[name] - each).abs().max() / each.abs().max()).item() for name, each in expected.items())
    print(f"largest difference of a gradient's element: {worst:.1e} of the largest element")
    print("for tests/test_finetune.py:", *(f"{name} {value:.7f}" for name, value in their_figures.items()))
    print(f"ratio: {sum(close) / len(close):.2f}")
    raise SystemExit(0 if all(close) and worst < 1e-5 else 1)


if __name__ == "__main__":
    main()
