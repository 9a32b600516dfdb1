"""
Turn a checkpoint of the original post's code into one of these scripts.

    python runs/import_post.py checkpoint.pt out/post/ckpt.pt
    python sample.py out/post/ckpt.pt

The post is "G(houlish) P(retrained) T(errifier)", Halloween 2024. Its code is github.com/brendanhogan/nbn-gpt, and its
author published the 1.5B weights as bhogan/ghoulish_pretrained_terrifier on Hugging Face. FILE is what that code saves
when it pretrains, fine-tunes or runs GRPO, or the weights alone. Only weights are read, and their shapes give the
sizes. OUT gets them in fp32, without the state of an optimizer: it can be sampled, scored and trained further.

It is the same model but for rounding: the post's rotary tables are in bf16, and its norms add fp32's epsilon, not 1e-6.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import contextlib
import os
import sys

import torch
import torch.nn.functional as F


def get_flags():
    flags = Flags()
    add = flags.add_argument
    add("file", metavar="FILE", help="a checkpoint of the post's code")
    add("out", metavar="OUT", help="the checkpoint to write")
    add("--head_size", type=number(int, 2), default=128, help="width of a head: not in the file")
    add("--block_size", type=number(int, 1, 2**20), default=1024, help="context in tokens: not in the file")
    add("--overwrite", default=False, action=argparse.BooleanOptionalAction, help="replace OUT when it is there")
    return flags.parse_args()


# --- command line: the same in every script (tests/test_copies.py) ---


def fail(message, code=2):
    """End with one line on stderr: code 2 for what the user can put right, 1 when the work itself failed."""
    if code != 2 or int(os.environ.get("LOCAL_RANK", 0)) == 0:  # under torchrun all ranks see the same mistake
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    raise SystemExit(code)


class Flags(argparse.ArgumentParser):
    """Flat flags: --help shows the script's docstring and every default, a mistake gets one line."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    def __init__(self):
        super().__init__(description=sys.modules["__main__"].__doc__, formatter_class=self.Help, allow_abbrev=False)

    def error(self, message):
        fail(message)


def number(kind, low, high=float("inf")):
    """The type of a flag that takes an int or a float from low to high."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            bounds = f"of {low} or more" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number {bounds}")
        return value

    return parse


def run(main):
    """Call main(); Ctrl-C, a full disk, and a reader of the output that has left (`| head`) leave no traceback."""
    code, said = 0, None
    try:
        try:
            main()
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code, said = 130, "interrupted"
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what stdout still holds would fail again
        code, said = 1, f"{error.filename or 'the work stopped'}: {error.strerror or error}"
        if isinstance(error, BrokenPipeError):
            code, said = 141, None
    if said:
        print(f"{os.path.basename(sys.argv[0])}: {said}", file=sys.stderr)
    if "WORLD_SIZE" in os.environ:  # gloo's threads may abort Python's own shutdown (PyTorch issue 190489)
        os._exit(code)
    raise SystemExit(code)


# --- end of command line ---


# --- save checkpoint: the same in every script (tests/test_copies.py) ---


def save_checkpoint(path, checkpoint):
    """Write a dict of plain values and tensors so that `path` is at every moment either the old file or the new one.

    Exits with code 1 when the disk refuses; the old file then still stands.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        fail(f"{path}: could not be written ({str(error).splitlines()[0]}); what was saved before is whole", code=1)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


# --- end of save checkpoint ---


TABLE = "transformer_blocks.token_embedding_table.weight"
GPT2_TOKENS = 50257  # the post's table has 50304 rows, a rounder number: the last ones stand for nothing


def read_weights(path):
    """The weights in a checkpoint of the post's code, mapped from the disk: {name without prefixes: tensor}."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # fine-tuning saved its flags, which are plain
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        fail(f"{path}: {error.strerror or error}")
    except Exception as error:  # damaged files raise nearly everything
        if "unsupported" not in str(error).lower():
            fail(f"{path}: is not a file that torch.save wrote, or is damaged")
        fail(
            f"{path}: holds objects that only code can rebuild, so it was not opened; if you trust its maker, save its "
            "weights alone: torch.save(torch.load(FILE, 'cpu', weights_only=False)['model_state_dict'], NEW)"
        )
    weights = checkpoint.get("model_state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict):
        fail(f"{path}: holds no weights (a dict of tensors, by itself or as 'model_state_dict')")
    if {"format", "config", "model"} <= set(weights):
        fail(f"{path}: is a checkpoint of these scripts already")
    theirs = {}
    for key, tensor in weights.items():
        name = str(key).replace("_orig_mod.", "").removeprefix("module.")  # torch.compile's and DDP's
        if name in theirs:
            fail(f"{path}: holds {name!r} twice, with and without a prefix")
        theirs[name] = tensor
    if TABLE not in theirs:
        fail(f"{path}: is not a checkpoint of the post's code: it has no '{TABLE}'")
    return theirs


def take(path, theirs, key, *shape):
    """Remove one weight from `theirs`: a tensor in fp32, finite and of that shape, or the script ends here."""
    wanted = " x ".join(map(str, shape))
    if key not in theirs:
        fail(f"{path}: has no '{key}', which would be {wanted}")
    tensor = theirs.pop(key)
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        fail(f"{path}: '{key}' is not a tensor of floating-point numbers")
    if tensor.layout != torch.strided or tensor.is_meta:
        fail(f"{path}: '{key}' is not a plain tensor with all its numbers")
    if tensor.shape != shape:
        fail(f"{path}: '{key}' is {' x '.join(map(str, tensor.shape)) or 'one number'}, and should be {wanted}")
    tensor = tensor.detach().float().contiguous()  # what is fp32 already stays on the disk
    if not tensor.isfinite().all():
        fail(f"{path}: '{key}' holds NaN or infinity")
    return tensor


def convert(path, theirs, head_size, block_size):
    """A checkpoint of ours from the weights of the post's model, which are taken out of `theirs` one by one."""
    table = theirs[TABLE]
    if not isinstance(table, torch.Tensor) or table.dim() != 2 or not table.numel():
        fail(f"{path}: '{TABLE}' is not a matrix, a row for each token")
    rows, C = table.shape
    if C % head_size or head_size % 2:
        fail(f"--head_size {head_size}: does not divide the model's width of {C} into heads of an even width")
    table, head = take(path, theirs, TABLE, rows, C), take(path, theirs, "lm_head.weight", rows, C)
    if not torch.equal(table, head):
        fail(f"{path}: 'lm_head.weight' differs from '{TABLE}'; in the post's model they are one")
    if rows < GPT2_TOKENS:
        fail(f"{path}: '{TABLE}' has {rows} rows, and GPT-2's tokenizer, which the post uses, {GPT2_TOKENS} tokens")
    model = {"embed": F.pad(table[:GPT2_TOKENS], (0, 0, 0, -GPT2_TOKENS % 64))}  # our padding: never looked at

    n_layer = len({key.split(".")[2] for key in theirs if key.startswith("transformer_blocks.transformers.")})
    for i in range(max(1, n_layer)):
        attention = f"transformer_blocks.transformers.{i}.multihead_attention"
        mlp = f"transformer_blocks.transformers.{i}.feed_forward_layer"
        q, k, v = (take(path, theirs, f"{attention}.{x}values.weight", C, C) for x in ("query_", "key_", ""))
        model[f"blocks.{i}.qkv"] = torch.stack((q, k, v))  # (3, C, C)
        model[f"blocks.{i}.o"] = take(path, theirs, f"{attention}.projection.weight", C, C)
        model[f"blocks.{i}.up"] = take(path, theirs, f"{mlp}.feed_forward_layer.weight", 4 * C, C)
        model[f"blocks.{i}.down"] = take(path, theirs, f"{mlp}.feed_forward_projection.weight", C, 4 * C)
    if theirs:
        fail(f"{path}: {min(theirs)!r} is not a weight of the post's model")

    config = dict(vocab_size=GPT2_TOKENS, block_size=block_size, n_layer=n_layer, n_head=C // head_size, n_embd=C)
    config.update(tie_weights=True, embed_norm=False, logit_softcap=0.0)
    rates = dict(matrix_lr=0.00705, down_lr=0.0141, embed_lr=0.0018, weight_decay=0.0)  # the post's, for finetune.py
    return {"format": 1, "config": config, "tokenizer": "gpt2", "model": model, "train": {"flags": rates}}


def main():
    flags = get_flags()
    if not os.path.basename(flags.out):
        fail(f"{flags.out!r}: names no file to write")
    if os.path.lexists(flags.out):
        if os.path.exists(flags.file) and os.path.exists(flags.out) and os.path.samefile(flags.file, flags.out):
            fail(f"{flags.out}: is FILE itself; choose another name for OUT")
        if not os.path.isfile(flags.out):
            fail(f"{flags.out}: is not a file; name the checkpoint to write")
        if not flags.overwrite:
            fail(f"{flags.out}: is there already; choose another name, or give --overwrite")
    checkpoint = convert(flags.file, read_weights(flags.file), flags.head_size, flags.block_size)
    folder = os.path.dirname(flags.out) or "."
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        fail(f"{folder}: cannot be made a folder ({error.strerror})")
    if not os.access(folder, os.W_OK):
        fail(f"{folder}: nothing can be written there")
    try:
        save_checkpoint(flags.out, checkpoint)
    finally:  # Ctrl-C leaves no gigabytes behind
        with contextlib.suppress(OSError):
            os.remove(f"{flags.out}.{os.getpid()}.tmp")
    config, parameters = checkpoint["config"], sum(tensor.numel() for tensor in checkpoint["model"].values())
    print(
        f"{flags.out}: {config['n_layer']} layers, width {config['n_embd']}, {config['n_head']} heads of "
        f"{flags.head_size}, context {flags.block_size}, {GPT2_TOKENS} tokens: {parameters:,} parameters"
    )


if __name__ == "__main__":
    run(main)
