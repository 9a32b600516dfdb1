"""runs/import_hf.py with folders of transformers: what runs/export_hf.py has written comes back to the bit."""

import json
import os

import pytest
import torch
import transformers
from test_export_hf import CHARS, POST, main, write_checkpoint
from test_import_post import LAYER, TABLE, post_weights

import finetune
import runs.export_hf as export
import runs.import_hf as script

OWN = {"bpe": [chr(i) for i in range(256)] + ["th", "the", " the"]}


@pytest.mark.parametrize(
    "tokenizer, changes", [("gpt2", dict(tie_weights=True)), ("bytes", {}), (OWN, dict(vocab_size=260))]
)
def test_an_export_comes_back(tmp_path, tokenizer, changes):
    ours = write_checkpoint(tmp_path / "x.pt", tokenizer, **changes)
    assert main(export, tmp_path / "x.pt", tmp_path / "x") == 0
    theirs = transformers.NanoChatForCausalLM.from_pretrained(tmp_path / "x")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")  # several files, as large models have
    os.rename(tmp_path / "x" / "tokenizer.json", tmp_path / "theirs" / "tokenizer.json")
    assert main(script, tmp_path / "theirs", tmp_path / "new" / "ckpt.pt") == 0
    _, checkpoint, back, encoding = finetune.open_checkpoint(str(tmp_path / "new"))
    assert back.config == ours.config and checkpoint["tokenizer"] == tokenizer
    for name, weight in ours.state_dict().items():
        V = encoding.n_vocab if name in ("embed", "head") else None  # behind them stands padding
        assert torch.equal(back.state_dict()[name][:V], weight[:V])


def test_what_cannot_be_imported_gets_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, tokenizer, more in [("bytes", "bytes", {}), ("chars", {"chars": CHARS}, {}), ("post", "bytes", POST)]:
        write_checkpoint(f"{name}.pt", tokenizer, **more)
        assert main(export, f"{name}.pt", name) == 0
    capsys.readouterr()

    def refused(folder, word):
        assert main(script, folder, "new.pt") == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and word in said and not os.path.exists("new.pt"), said

    refused("chars", "WordLevel")
    refused("post", "model_type")
    refused("nowhere", "No such file")
    weights, config = tmp_path / "bytes" / "model.safetensors", tmp_path / "bytes" / "config.json"
    weights.write_bytes(weights.read_bytes()[:20_000])
    refused("bytes", "damaged")
    tokenizer = tmp_path / "bytes" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"BPE"', '"Unigram"'))
    refused("bytes", "Unigram")
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(num_key_value_heads=1)))
    refused("bytes", "num_key_value_heads")
    weights, values = post_weights(128, rows=50257, layers=1), f"transformer_blocks.transformers.0.{LAYER[2]}"
    for word, content in {
        values: {name: weight for name, weight in weights.items() if name != values},
        "head": weights | {"lm_head.weight": weights[TABLE] + 1},
        "router": weights | {f"{values}.router": weights[values]},
        "weights_only": {"model_state_dict": weights, "loss": os.system},  # executes code
    }.items():
        torch.save(content, "file.pt")
        refused("file.pt", word)
