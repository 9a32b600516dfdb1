"""
Code below `# --- NAME, the same in every script (tests/test_copies.py) ---`, up to the next `# --- `, is the same to
the letter everywhere; and no script needs another one, or more than the four packages.

    python -m pytest tests/test_copies.py              fails when two copies differ
    python tests/test_copies.py --from train_char.py   copies that script's blocks over the others
"""

import ast
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("runs/*.py")])
MARKER = "the same in every script (tests/test_copies.py)"
BLOCK = re.compile(rf"^# --- ([\w ]+), {re.escape(MARKER)} ---\n.*?(?=\n*(?:^# --- |\Z))", re.M | re.S)
MORE = {"transformers", "tokenizers", "safetensors", "openpyxl", "matplotlib"}  # what a part of some scripts takes


def blocks(text):
    return {match[1]: match[0] for match in BLOCK.finditer(text)}


def spread(source, target):
    """The text `target`, its blocks that `source` has, too, as they are there."""
    ours = blocks(source)
    return BLOCK.sub(lambda match: ours.get(match[1], match[0]), target)


def test_copies_are_the_same():
    seen = {}
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        assert text.count(MARKER) == len(blocks(text)), f"{path.name}: a marker that is misspelt, or twice there"
        for name, block in blocks(text).items():
            assert seen.setdefault(name, block) == block, f"block '{name}' of {path.name} differs from another"
    assert {"start", "encoding", "trained model"} <= set(seen)


def test_spread_changes_only_blocks_of_that_name():
    def script(x, y):
        return f"1\n# --- x, {MARKER} ---\n{x}\n\n\n# --- rest ---\n2\n\n\n# --- y, {MARKER} ---\n{y}\n"

    assert spread(script("new", "z").replace("--- y", "--- w"), script("old", "old")) == script("new", "old")


def test_scripts_take_nothing_but_the_four_packages():
    wanted = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        metadata = re.search(r"^# /// script\n.*?^# dependencies = (\[.*?\])\n# ///$", text, re.M | re.S)
        assert metadata and ast.literal_eval(metadata[1])[:4] == wanted, path.name
        tree = ast.parse(text)
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            more = set() if node in tree.body and path.parent.name != "runs" else MORE
            known = sys.stdlib_module_names | {"torch", "numpy", "tiktoken", "requests", "regex"} | more
            assert {name.split(".")[0] for name in names} <= known, f"{path.name} imports {names}"


if __name__ == "__main__":
    source = (ROOT / sys.argv[sys.argv.index("--from") + 1]).read_text(encoding="utf-8")
    for path in SCRIPTS:
        old = path.read_text(encoding="utf-8")
        if (new := spread(source, old)) != old:
            path.write_text(new, encoding="utf-8")
            print(path.relative_to(ROOT))
