"""
Turn a model of others into a checkpoint of these scripts, to be sampled, scored and trained further.

    python runs/import_hf.py out/hf out/back/ckpt.pt             a NanoChat of transformers: a folder
    python runs/import_hf.py checkpoint.pt out/post/ckpt.pt      the original post's model: a file
    python finetune.py --init out/back --data data/tales.txt

A folder (pip install "transformers>=5,<6") holds config.json, tokenizer.json and *.safetensors, as `hf download NAME
--local-dir DIR` leaves them; its tokenizer must be GPT-2's, that of bytes, or another BPE of bytes that splits words as
GPT-2's does. What runs/export_hf.py has written in float32 comes back to the bit.

The post is "G(houlish) P(retrained) T(errifier)", Halloween 2024, its code github.com/brendanhogan/nbn-gpt, its weights
bhogan/ghoulish_pretrained_terrifier on Hugging Face. What that code saves can be read, or the weights alone. The model
is the same but for rounding: its rotary tables are in bf16, and its norms take PyTorch's default epsilon, where ours is
1e-6. As its author ran it (PyTorch 2.5.0, bf16 autocast) that is 2^-7 for q and k, in bf16, and 2^-23 elsewhere.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests", "transformers>=5.0,<6"]
# ///

import argparse
import glob
import json
import os
import sys

import tiktoken
import torch
import torch.nn.functional as F


def get_flags():
    form, usage = argparse.RawDescriptionHelpFormatter, argparse.SUPPRESS  # a mistake gets one line
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, usage=usage)
    parser.add_argument("source", help="a folder of transformers, or a file of the post's code")
    parser.add_argument("out", metavar="OUT.pt", help="the checkpoint to write")
    return parser.parse_args()


def fail(message, code=2):
    print(f"import_hf.py: {message}", file=sys.stderr)
    raise SystemExit(code)


def get_tokenizer(theirs):
    """What a checkpoint calls the tokenizer of a tokenizer.json, and how many tokens it has."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    bpe, split = theirs["model"], (theirs["pre_tokenizer"] or {}).get("type")
    if bpe["type"] == "BPE":  # which spells every byte as a letter that can be seen
        byte = {letter: i for i, letter in bytes_to_unicode().items()}
        names = [name for name in sorted(bpe["vocab"], key=bpe["vocab"].get) if byte.keys() >= set(name)]
        tokens = [bytes(byte[letter] for letter in name) for name in names]
        if tokens[:256] == [bytes([i]) for i in range(256)] and not bpe["merges"]:
            return "bytes", 257
        gpt2 = tiktoken.get_encoding("gpt2") if len(tokens) >= 50256 else None  # which may have to be fetched
        if gpt2 and tokens[:50256] == [gpt2.decode_single_token_bytes(i) for i in range(50256)]:
            return "gpt2", 50257
        if {bytes([i]) for i in range(256)} <= {*tokens} and split == "ByteLevel":  # splits as GPT-2 does
            return {"bpe": [token.decode("latin-1") for token in tokens]}, len(tokens) + 1
    raise ValueError(f"its tokenizer, {bpe['type']} of {len(bpe['vocab']):,} tokens, is not one of ours")


def from_transformers(folder):
    """A checkpoint of ours from a folder of transformers; a ValueError says why there is none."""
    from safetensors.torch import load_file

    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        theirs = json.load(f)
    theirs.update(theirs.get("rope_parameters") or {})
    C, H = theirs.get("hidden_size", 0), theirs.get("num_attention_heads")
    wanted = dict(model_type="nanochat", hidden_act="relu2", intermediate_size=4 * C, num_key_value_heads=H)
    for name, value in (wanted | dict(attention_bias=False, rms_norm_eps=1e-6, rope_theta=10000.0)).items():
        if theirs.get(name, value) != value:
            raise ValueError(f"its {name} is {theirs[name]}, and in the model of these scripts {value}")
    with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as f:
        tokenizer, V = get_tokenizer(json.load(f))
    weights = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "*.safetensors")):
        weights.update(load_file(path))
    tied, layers = theirs.get("tie_word_embeddings", False), theirs["num_hidden_layers"]
    model = {"embed": F.pad(weights["model.embed_tokens.weight"][:V], (0, 0, 0, -V % 64))}  # our padding
    if not tied:
        model["head"] = F.pad(weights["lm_head.weight"][:V], (0, 0, 0, -V % 64))
    for i in range(layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        model[f"blocks.{i}.qkv"] = torch.stack([weights[f"{attention}.{name}_proj.weight"] for name in "qkv"])
        model[f"blocks.{i}.o"] = weights[f"{attention}.o_proj.weight"]
        model[f"blocks.{i}.up"] = weights[f"{mlp}.fc1.weight"]
        model[f"blocks.{i}.down"] = weights[f"{mlp}.fc2.weight"]
    config = dict(vocab_size=V, block_size=theirs["max_position_embeddings"], n_layer=layers, n_head=H, n_embd=C)
    config.update(tie_weights=tied, embed_norm=True, logit_softcap=theirs.get("final_logit_softcapping", 15.0) or 0.0)
    return dict(config=config, tokenizer=tokenizer, model=model)


def from_post(path, head_size=128, block_size=1024):
    """A checkpoint of ours from a file of the post's code, which tells all sizes but these two."""
    with torch.serialization.safe_globals([argparse.Namespace]):  # fine-tuning saved its flags, which are plain
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    theirs = {}
    for name, weight in saved.get("model_state_dict", saved).items():
        theirs[name.replace("_orig_mod.", "").removeprefix("module.")] = weight  # torch.compile's and DDP's
    table, V = theirs.pop("transformer_blocks.token_embedding_table.weight"), 50257  # GPT-2's tokens
    if not torch.equal(table, theirs.pop("lm_head.weight")):
        raise ValueError("its head is not its embedding, as in the post's model")
    model, C = {"embed": F.pad(table[:V], (0, 0, 0, -V % 64))}, table.size(1)
    layers = sum(name.endswith("query_values.weight") for name in theirs)
    for i in range(layers):
        attention = f"transformer_blocks.transformers.{i}.multihead_attention"
        mlp = f"transformer_blocks.transformers.{i}.feed_forward_layer"
        q, k, v = [theirs.pop(f"{attention}.{name}values.weight") for name in ("query_", "key_", "")]
        model[f"blocks.{i}.qkv"] = torch.stack((q, k, v))
        model[f"blocks.{i}.o"] = theirs.pop(f"{attention}.projection.weight")
        model[f"blocks.{i}.up"] = theirs.pop(f"{mlp}.feed_forward_layer.weight")
        model[f"blocks.{i}.down"] = theirs.pop(f"{mlp}.feed_forward_projection.weight")
    if theirs:
        raise ValueError(f"{min(theirs)} is not a weight of the post's model")
    config = dict(vocab_size=V, block_size=block_size, n_layer=layers, n_head=C // head_size, n_embd=C)
    config.update(tie_weights=True, embed_norm=False, logit_softcap=0.0)
    rates = dict(matrix_lr=0.00705, down_lr=0.0141, embed_lr=0.0018, weight_decay=0.0)  # the post's, for finetune.py
    return dict(config=config, tokenizer="gpt2", model=model, train=dict(flags=rates))


def main():
    flags = get_flags()
    if os.path.exists(flags.out):
        fail(f"{flags.out}: is there already; choose another name")
    try:
        checkpoint = from_transformers(flags.source) if os.path.isdir(flags.source) else from_post(flags.source)
        model = {name: weight.float().contiguous() for name, weight in checkpoint["model"].items()}
    except ImportError:
        fail('needs transformers 5: pip install "transformers>=5,<6"')
    except Exception as error:  # damaged files raise nearly everything
        fail(f"{flags.source}: can't be imported, or is damaged ({' '.join(str(error).split()):.200})")
    os.makedirs(os.path.dirname(flags.out) or ".", exist_ok=True)
    torch.save(dict(checkpoint, format=1, model=model), flags.out + ".tmp")
    os.replace(flags.out + ".tmp", flags.out)
    print(f"{flags.out}: {sum(weight.numel() for weight in model.values()):,} parameters, {checkpoint['config']}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(f"{error.filename or 'the work stopped'}: {error.strerror or error}", 2 if error.filename else 1)
