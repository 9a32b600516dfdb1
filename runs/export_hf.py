"""
Write a checkpoint as a folder that Hugging Face transformers opens.

    pip install "transformers>=5,<6"
    python runs/export_hf.py out/gpt out/hf --dtype bfloat16

DIR gets model.safetensors, configs, the tokenizer and a model card, README.md. runs/import_hf.py is the way back.

The model becomes a NanoChat, which always normalizes the embedding. Without that norm and without a softcap, as the
1.5B of the original post are, it becomes an Apertus, which can be told to compute the same. The tokenizer puts
<|endoftext|> before every text, since stories begin after it. Characters have no such token, but <|unk|> and <|pad|>
behind them, which generate() never writes. Greedy text is that of sample.py --temperature 0 up to the context length;
beyond it sample.py drops the first half, transformers goes on to positions that the model was not trained on.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests", "transformers>=5.0,<6"]
# ///

import argparse
import json
import os
import shutil
import sys

import tiktoken
import torch
import torch.nn.functional as F


def get_flags():
    form, usage = argparse.RawDescriptionHelpFormatter, argparse.SUPPRESS  # a mistake gets one line
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, usage=usage)
    add = parser.add_argument
    add("checkpoint", help="a .pt file, or the folder of a run")
    add("folder", metavar="DIR", help="the folder to write")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights (default: float32)")
    add("--overwrite", default=False, action=argparse.BooleanOptionalAction, help="replace an earlier export in DIR")
    return parser.parse_args()


def fail(message, code=2):
    print(f"export_hf.py: {message}", file=sys.stderr)
    raise SystemExit(code)


def to_transformers(config, model, rows):
    """Config and weights of a checkpoint as transformers has them, with so many rows of embedding and head."""
    V, C, H = config["vocab_size"], config["n_embd"], config["n_head"]
    theirs = dict(vocab_size=rows, hidden_size=C, intermediate_size=4 * C, num_hidden_layers=config["n_layer"])
    theirs.update(num_attention_heads=H, max_position_embeddings=config["block_size"], rms_norm_eps=1e-6)
    theirs.update(rope_parameters=dict(rope_type="default", rope_theta=10000.0), hidden_act="relu2")
    theirs.update(tie_word_embeddings=config["tie_weights"])
    nanochat = config["embed_norm"]
    if nanochat:
        theirs.update(model_type="nanochat", architectures=["NanoChatForCausalLM"])
        theirs["final_logit_softcapping"] = float(config["logit_softcap"]) or None
    else:
        theirs.update(model_type="apertus", architectures=["ApertusForCausalLM"])
    up, down = ("fc1", "fc2") if nanochat else ("up_proj", "down_proj")
    weights = {"model.embed_tokens.weight": F.pad(model["embed"][:V], (0, 0, 0, rows - V))}  # without our padding
    if not config["tie_weights"]:
        weights["lm_head.weight"] = F.pad(model["head"][:V], (0, 0, 0, rows - V))
    for i in range(config["n_layer"]):
        layer = f"model.layers.{i}"
        q, k, v = model[f"blocks.{i}.qkv"]
        if not nanochat:
            # Apertus turns the other way round, which is the same for halves of q and k that have changed places. It
            # norms them before it turns them, which is the same, too. Its norms have parameters: ones.
            q, k = (w.unflatten(0, (H, 2, -1)).flip(1).reshape(C, C) for w in (q, k))
            ones = {"self_attn.q_norm": C // H, "self_attn.k_norm": C // H}
            for name, size in (ones | {"attention_layernorm": C, "feedforward_layernorm": C}).items():
                weights[f"{layer}.{name}.weight"] = torch.ones(size)
        for name, weight in (("q", q), ("k", k), ("v", v), ("o", model[f"blocks.{i}.o"])):
            weights[f"{layer}.self_attn.{name}_proj.weight"] = weight
        weights[f"{layer}.mlp.{up}.weight"] = model[f"blocks.{i}.up"]
        weights[f"{layer}.mlp.{down}.weight"] = model[f"blocks.{i}.down"]
    if not nanochat:
        weights["model.norm.weight"] = torch.ones(C)
    return theirs, weights


def merges_of(ranks):
    """The merges of a BPE in their order, from its ranks {bytes of a token: id}."""
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        parts = [token[i : i + 1] for i in range(len(token))]  # two are left by the merges before this one
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append(parts)
    return merges


def to_tokenizer(spec):
    """A tokenizers.Tokenizer with the ids of a checkpoint's "tokenizer", and the names of its special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if "chars" in spec:
        ids = {c: i for i, c in enumerate([*spec["chars"], "<|unk|>", "<|pad|>"])}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<|unk|>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()  # nothing between the characters
        tokenizer.add_special_tokens(["<|unk|>", "<|pad|>"])
        return tokenizer, dict(unk_token="<|unk|>", pad_token="<|pad|>")
    if spec == "gpt2":
        gpt2 = tiktoken.get_encoding("gpt2")
        ranks = {gpt2.decode_single_token_bytes(i): i for i in range(gpt2.eot_token)}
    else:
        tokens = [chr(i) for i in range(256)] if spec == "bytes" else spec["bpe"]
        ranks = {token.encode("latin-1"): i for i, token in enumerate(tokens)}
    letters = bytes_to_unicode()  # the published form of BPE spells every byte as a letter that can be seen
    eot, spelled = "<|endoftext|>", {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {spelled[token]: i for token, i in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(spelled[a], spelled[b]) for a, b in merges_of(ranks)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits as GPT-2 does
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([eot])
    tokenizer.post_processor = processors.TemplateProcessing(f"{eot} $A", special_tokens=[(eot, len(ranks))])
    return tokenizer, dict(bos_token=eot, eos_token=eot, pad_token=eot)


def model_card(checkpoint, path, folder, theirs, weights, dtype):
    """What a visitor of the folder reads first, in the form of Hugging Face's model cards."""
    config, tokenizer, step = checkpoint["config"], checkpoint["tokenizer"], checkpoint.get("train", {}).get("step")
    tokens = {"gpt2": "GPT-2's BPE", "bytes": "bytes"}.get(str(tokenizer), "an alphabet or a BPE of its own")
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {os.path.basename(os.path.abspath(folder))}

A language model of {sum(weight.numel() for weight in weights.values()):,} parameters: {config["n_layer"]} layers,
width {config["n_embd"]}, {config["n_head"]} heads, a context of {config["block_size"]} tokens ({tokens}).
In {dtype}, from {path}{f", step {step}" if step else ""}. For transformers 5, as {theirs["architectures"][0]}:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"  # this one
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("It was a dark and stormy night", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.8)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```
"""


def main():
    flags = get_flags()
    path = os.path.join(flags.checkpoint, "ckpt.pt") if os.path.isdir(flags.checkpoint) else flags.checkpoint
    if os.path.exists(flags.folder) and os.listdir(flags.folder) and not flags.overwrite:
        fail(f"{flags.folder}: is not empty; name another folder, or give --overwrite")
    try:
        from safetensors.torch import save_file

        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = dict(tie_weights=False, embed_norm=True, logit_softcap=15.0) | checkpoint["config"]
        if "kind" in config:
            fail(f"{path}: a model of kind {config['kind']!r}, which only train_char.py runs")
        if not config["embed_norm"] and config["logit_softcap"]:
            fail(f"{path}: no model of transformers has a softcap without a norm after the embedding")
        tokenizer, special = to_tokenizer(checkpoint["tokenizer"])
        rows = tokenizer.get_vocab_size()
        theirs, weights = to_transformers(config, checkpoint["model"], rows)
    except ImportError:
        fail('needs transformers 5: pip install "transformers>=5,<6"')
    except Exception as error:  # damaged files raise nearly everything
        fail(f"{path}: can't be exported, or is damaged: {error!r:.200}")
    weights = {name: weight.to(getattr(torch, flags.dtype)).contiguous() for name, weight in weights.items()}
    ids = dict(bos_token_id=None, eos_token_id=None)
    for name in set(special) - {"unk_token"}:
        ids[f"{name}_id"] = tokenizer.token_to_id(special[name])
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=config["block_size"], **special)
    settings.update(padding_side="left", model_input_names=["input_ids", "attention_mask"])  # what generate() takes
    texts = {
        "config.json": json.dumps(dict(theirs, **ids, dtype=flags.dtype), indent=2),
        "generation_config.json": json.dumps(dict(ids, suppress_tokens=[*range(config["vocab_size"], rows)] or None)),
        "tokenizer_config.json": json.dumps(settings, indent=2),
        "tokenizer.json": tokenizer.to_str(),
        "README.md": model_card(checkpoint, path, flags.folder, theirs, weights, flags.dtype),
    }

    temporary = os.path.normpath(flags.folder) + ".tmp"  # nothing half-written in DIR
    try:
        os.makedirs(temporary, exist_ok=True)
        for name, text in texts.items():
            with open(os.path.join(temporary, name), "w", encoding="utf-8") as f:
                f.write(text)
        save_file(weights, os.path.join(temporary, "model.safetensors"), metadata={"format": "pt"})
        shutil.copymode(os.path.join(temporary, "README.md"), os.path.join(temporary, "model.safetensors"))
        os.makedirs(flags.folder, exist_ok=True)
        for name in os.listdir(temporary):
            os.replace(os.path.join(temporary, name), os.path.join(flags.folder, name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{flags.folder}: {theirs['architectures'][0]} in {flags.dtype}, {rows:,} tokens")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(f"{error.filename or 'the work stopped'}: {error.strerror or error}", 2 if error.filename else 1)
