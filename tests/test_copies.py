"""
Blocks of code below `# --- NAME, the same in every script (tests/test_copies.py) ---` are the same everywhere. They end
at the next `# --- `, or with the file; older ones begin `# --- NAME: the same …` and end with `# --- end of NAME ---`.

    python -m pytest tests/test_copies.py              fails when two copies differ
    python tests/test_copies.py --from train_char.py   copies that script's blocks over the others
"""

import ast
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAME = r" the same in every script \(tests/test_copies\.py\) ---\n.*?"
BLOCK = re.compile(
    rf"^# --- (?P<name>[\w ]+)(?:,{SAME}(?=\n*(?:^# --- |\Z))|:{SAME}^# --- end of (?P=name) ---\n)", re.M | re.S
)
MARKER = re.compile(r"^# --- .*the same in every script|^# --- end of ", re.M)


def scripts():
    return sorted(path for folder in (".", "data", "runs") for path in (ROOT / folder).glob("*.py"))


def blocks(path):
    return {match["name"]: match[0] for match in BLOCK.finditer(path.read_text(encoding="utf-8"))}


def spread(source, targets):
    """Copy the blocks of `source` over those of the same name in `targets`; returns the files that changed."""
    ours, changed = blocks(source), []
    for path in targets:
        old = path.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda match: ours.get(match["name"], match[0]), old)
        if new != old:
            path.write_text(new, encoding="utf-8")
            changed.append(path)
    return changed


def test_copies_are_the_same():
    first = {}
    for path in scripts():
        for name, text in blocks(path).items():
            origin, original = first.setdefault(name, (path, text))
            assert text == original, f"block '{name}' differs in {path.name} and {origin.name}"
    assert {"command line", "model", "start", "encoding"} <= set(first)


def test_every_marker_belongs_to_a_block():
    for path in scripts():
        found = sum(len(MARKER.findall(block)) for block in blocks(path).values())
        wanted = len(MARKER.findall(path.read_text(encoding="utf-8")))
        assert found == wanted, f"{path.name}: a marker that is misspelt, twice there, or without its other half"


def test_spread_changes_only_blocks_of_that_name(tmp_path):
    same = "the same in every script (tests/test_copies.py) ---\n"
    block, old = "# --- {}, " + same + "{}\n\n\n", "# --- {0}: " + same + "{1}\n# --- end of {0} ---\n"
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("1\n" + old.format("x", "new") + block.format("z", "new") + "# --- rest ---\n4\n")
    text = "2\n" + old.format("x", "{0}") + "3\n" + old.format("y", "old") + block.format("w", "old")
    text += block.format("z", "{0}").rstrip("\n") + "\n"
    b.write_text(text.format("old"))
    assert spread(a, [a, b]) == [b]
    assert b.read_text() == text.format("new")


def test_scripts_import_no_other_script():
    names = {path.stem for path in scripts()}
    for path in scripts():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not names & set(imported), f"{path.name} imports {imported}"


def test_inline_metadata_names_the_requirements():
    wanted = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    for path in scripts():
        metadata = re.search(r"^# /// script\n(.*?)^# ///$", path.read_text(encoding="utf-8"), re.M | re.S)
        assert metadata, f"{path.name} has no PEP 723 metadata"
        listed = re.search(r"^# dependencies = (\[.*\])$", metadata[1], re.M)
        found = ast.literal_eval(listed[1])
        more = found[len(wanted) :] if path.parent.name == "runs" else []  # a tool there may need another package
        assert found == wanted + more, path.name


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--from" or not (ROOT / sys.argv[2]).is_file():
        print("usage: python tests/test_copies.py --from SCRIPT", file=sys.stderr)
        raise SystemExit(2)
    for path in spread(ROOT / sys.argv[2], scripts()):
        print(path.relative_to(ROOT))
