"""
Is `finetune.py --method grpo` what TRL computes? Loss, divergence and gradients of one batch of stories, on a CPU.

    pip install -r requirements-dev.txt trl
    python bench/grpo_oracle.py                 (a minute on 2 cores)

Theirs is TRL's GRPOTrainer, its loss "dr_grpo" and the paper's divergence, with these stories and rewards: the old
log-probabilities are of one model, the loss of the next, the divergence is from a third. The last lines are its figures
for tests/test_grpo.py, and `ratio: X`, the share of them, and of gradients, that is the same.
"""

import argparse
import itertools
import os
import sys
import tempfile

import torch

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # tests/test_grpo.py imports this file
from dpo_oracle import WINDOW, V, by_our_names, make_model, script, show, their_model  # noqa: E402

G, LONGEST, SETTINGS = 3, 20, list(itertools.product((0.0, 0.04), ("none", "group")))  # beta, scale_rewards
FIRST, OLD, NOW = 0.0, -0.1, 0.3  # phases of make_model(): a third of the ratios is clipped
STORIES = {"It was a dark night": (" and the door", "; nobody knocked.", "! No end, no end, no")}
STORIES |= {"The cellar ": ("hummed a song without", "was dry", "listened")}  # shorter than LONGEST: at its end
REWARDS = torch.tensor([[0.5, -1.0, 0.25], [2.0, 0.0, 3.5]])
BEGINS = [[V - 1, *prompt.encode()] for prompt in STORIES for _ in range(G)]
RESTS = [[*rest.encode(), V - 1][:LONGEST] for rests in STORIES.values() for rest in rests]


def figures(beta, loss, kl, gradients):
    """What the test holds: loss, divergence, and of each gradient a projection."""
    flat = [each.double().flatten() for each in gradients.values()]
    along = [(each @ torch.arange(len(each)).double().square().sin()).item() for each in flat]
    return [loss, kl if beta else 0.0, *along]


def ours(beta, scale):
    """The gradients by name, and the figures, of finetune.py."""
    idx, targets = torch.full((2, len(BEGINS), WINDOW), -1)
    for i, (begin, rest) in enumerate(zip(BEGINS, RESTS)):
        idx[i] = torch.tensor((begin + rest + [V - 1] * WINDOW)[:WINDOW])
        targets[i, len(begin) - 1 : len(begin) - 1 + len(rest)] = torch.tensor(rest)
    old_logps = -make_model(OLD)(idx, targets, reduction="none").view(targets.shape).detach()
    flags = dict(beta=beta, norm_spread=scale == "group", clip=0.2, batch_size=4, max_new_tokens=LONGEST)
    args, model = argparse.Namespace(**flags), make_model(NOW)
    sums = script.policy_loss(args, model, make_model(FIRST), (idx, targets, old_logps), REWARDS)
    gradients = {name: p.grad[:V] if name in ("embed", "head") else p.grad for name, p in model.named_parameters()}
    return gradients, figures(beta, *sums.tolist(), gradients)


def theirs(folder, beta, scale):
    """The same of TRL's trainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    first, old, now = [their_model(phase, folder) for phase in (FIRST, OLD, NOW)]
    prompts = [dict(prompt=prompt) for prompt in STORIES for _ in range(G)]
    settings = dict(loss_type="dr_grpo", beta=beta, scale_rewards=scale, num_iterations=2, use_bias_correction_kl=False)
    settings |= dict(num_generations=G, max_completion_length=LONGEST, per_device_train_batch_size=len(prompts))
    more = dict(args=GRPOConfig(**settings, report_to="none", use_cpu=True, bf16=False, output_dir=folder))
    more |= dict(rollout_func=lambda *_: dict(prompt_ids=BEGINS, completion_ids=RESTS, logprobs=None))
    more |= dict(reward_funcs=lambda **_: REWARDS.flatten().tolist(), train_dataset=Dataset.from_list(prompts))
    more |= dict(processing_class=AutoTokenizer.from_pretrained(first.name_or_path))
    trainer = GRPOTrainer(first, **more)  # its reference, if it needs one, is what the folder of this model holds
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.load_state_dict(old.state_dict())
    inputs = trainer._generate_and_score_completions(prompts)
    trainer.model.load_state_dict(now.state_dict())
    loss = trainer.compute_loss(trainer.model.train(), inputs)
    loss.backward()
    gradients = by_our_names(trainer.model)
    return gradients, figures(beta, loss.item(), *trainer._metrics["train"]["kl"] or [0.0], gradients)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    rows, lines, same = [("beta, scale_rewards", "TRL's loss", "finetune.py's", "gradients, apart")], [], []
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            expected, wanted = theirs(folder, *setting)
        found, got = ours(*setting)
        worst = max(((found[name] - each).abs().max() / each.abs().max()).item() for name, each in expected.items())
        same += [abs(a - b) < 1e-6 for a, b in zip(wanted, got)] + [worst < 1e-5]
        rows.append((str(setting), f"{wanted[0]:.7f}", f"{got[0]:.7f}", f"{worst:.1e}"))
        lines.append(" ".join(f"{each:.7f}" for each in wanted))
    show(*rows)
    print("for tests/test_grpo.py:", *lines, f"ratio: {sum(same) / len(same):.2f}", sep="\n")
    raise SystemExit(0 if all(same) else 1)


if __name__ == "__main__":
    main()
