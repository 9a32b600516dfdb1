"""
Is `finetune.py --method dpo` what TRL computes? Loss, rewards and gradients of one batch of pairs, on a CPU.

    pip install -r requirements-dev.txt trl
    python bench/dpo_oracle.py                 (15 seconds on 2 cores)

Theirs is TRL's DPOTrainer with its own collator, its loss "sigmoid" and a reference model, on NanoChatForCausalLM of
transformers. Ours reads the same stories from a ranking. Both are in fp32 and begin with the same weights, which come
from a formula and need no random numbers. It prints both sides' figures, and theirs as tests/test_finetune.py holds
them. `ratio: X` is the share of the figures that are the same to 1e-5 of their size.
"""

import importlib.metadata
import json
import os
import sys
import tempfile

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
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
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            i = torch.arange(p.numel(), dtype=torch.float64)
            p.copy_((torch.sin(0.618 * i * i + number) + phase * torch.sin(0.27 * i * i)).view_as(p) * 0.2)
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
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ranked.jsonl")
        with open(path, "w", encoding="utf-8") as f:
            for number, (prompt, rests) in enumerate(GROUPS):
                told = {key: dict(id=0, prompt=prompt, text=prompt + rest) for key, rest in zip("BACD", rests)}
                f.write(json.dumps({"group": number, "stories": told, "best": "B"}) + "\n")
        stories, groups = script.read_groups(path, script.get_tokenizer("bytes"), WINDOW)
    first, model, device = make_model(0.0), make_model(0.3), torch.device("cpu")
    pairs = torch.cat([torch.from_numpy(group) for group in groups])  # (5, 2)
    loss = script.compare(model, first, stories, pairs, 2, BETA, 1 / len(pairs))[0].item()  # in three micro-batches
    with torch.no_grad():
        pi_logps, ref_logps = (script.story_logps(m, stories, device) for m in (model, first))
    rewards = BETA * (pi_logps - ref_logps)[pairs].mean(0)
    gradients = {name: p.grad[:V] if name in ("embed", "head") else p.grad for name, p in model.named_parameters()}
    return gradients, figures(loss, rewards.tolist(), gradients)


def theirs():
    """The same of TRL's trainer."""
    from datasets import Dataset
    from test_train_gpt import as_nanochat
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    rows = [dict(prompt=prompt, chosen=rests[0], rejected=rest) for prompt, rests in GROUPS for rest in rests[1:]]
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(V - 1)} | {"<|endoftext|>": V - 1}, chr(0)))
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(beta=BETA, max_length=WINDOW + 1, loss_type="sigmoid", report_to="none", disable_tqdm=True)
        settings |= dict(use_cpu=True, bf16=False, gradient_checkpointing=False, output_dir=folder)
        trainer = DPOTrainer(
            as_nanochat(make_model(0.3)),
            as_nanochat(make_model(0.0)),
            DPOConfig(**settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>"),
        )
    batch = []  # the tokens themselves, for the trainer's own tokenization would add an end to each story
    for row in rows:
        ids = {f"{key}_ids": list(text.encode()) for key, text in row.items()}
        batch.append(ids | {"prompt_ids": [V - 1] + ids["prompt_ids"]})
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(batch))
    loss.backward()
    gradients = {}
    grad = {name: p.grad for name, p in trainer.model.named_parameters()}
    for name, _ in make_model(0.0).named_parameters():
        if name.startswith("blocks."):
            _, i, kind = name.split(".")
            names = dict(qkv="self_attn.q_proj self_attn.k_proj self_attn.v_proj", o="self_attn.o_proj")
            names |= dict(up="mlp.fc1", down="mlp.fc2")
            parts = [grad[f"model.layers.{i}.{part}.weight"] for part in names[kind].split()]
            gradients[name] = torch.stack(parts) if kind == "qkv" else parts[0]
        else:
            gradients[name] = grad["lm_head.weight" if name == "head" else "model.embed_tokens.weight"]
    metrics = trainer._metrics["train"]
    rewards = [metrics[f"rewards/{key}"][0] for key in ("chosen", "rejected")]
    return gradients, figures(loss.item(), rewards, gradients)


def main():
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    try:
        import trl  # noqa: F401
    except ImportError as error:
        print(f"dpo_oracle.py: {error}; pip install -r requirements-dev.txt trl", file=sys.stderr)
        raise SystemExit(2) from None
    (expected, their_figures), (found, our_figures) = theirs(), ours()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("trl", "transformers", "torch"))
    print(f"\n{versions}\n\n{'':24}{'TRL':>14}{'finetune.py':>14}{'difference':>12}")
    close = 0
    for name, value in their_figures.items():
        difference = abs(our_figures[name] - value)
        close += difference < 1e-5 * max(1, abs(value))
        print(f"{name:24}{value:14.7f}{our_figures[name]:14.7f}{difference:12.1e}")
    worst = max(
        ((found[name] - gradient).abs().max() / gradient.abs().max()).item() for name, gradient in expected.items()
    )
    print(f"\nlargest difference of a gradient's element: {worst:.1e} of the largest element")
    print(
        "\nfor tests/test_finetune.py:\n"
        + " ".join(f"{name} {value:.7f}" for name, value in their_figures.items())
        + "\n"
    )
    print(f"ratio: {close / len(their_figures):.2f}")
    raise SystemExit(0 if close == len(their_figures) and worst < 1e-5 else 1)


if __name__ == "__main__":
    main()
