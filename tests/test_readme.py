"""The commands of the documentation are understood by what they call, and README's quick blocks run as they stand."""

import ast
import os
import re
import shutil
import subprocess
import sys

import commands
import pytest
from conftest import ROOT, call

SCRIPTS = sorted(path for folder in (".", "data", "runs", "bench") for path in (ROOT / folder).glob("*.py"))
TEXTS = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "bench/README.md") if path.exists()]
SPANS = [span for text in TEXTS for span in commands.spans(text)]
DOCSTRINGS = [ast.get_docstring(ast.parse(path.read_bytes())) or "" for path in [*SCRIPTS, *ROOT.glob("tests/*.py")]]
COMMANDS = [command for text in TEXTS for block in commands.blocks(text) for command in block]
COMMANDS += [span for span in SPANS if commands.PROGRAM.match(span)]
COMMANDS += [command for docstring in DOCSTRINGS for command in commands.documented(docstring)]


def listed():
    """The files of the repository, and those that are new and not ignored."""
    git = "git -c safe.directory=* ls-files -z --cached --others --exclude-standard".split()  # whoever owns the folder
    names = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if (ROOT / name).is_file()]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_a_command_is_understood(command):
    commands.parse(command)


def test_commands_are_found():
    assert len(COMMANDS) > 50 and commands.blocks(TEXTS[0], quick=True)
    text = "`python a.py\n--b`\n\n```text\npython c.py\n```\n- d\n\n  ```sh quick\n  # e\n  pip f \\\n      g\n  ```\n"
    assert commands.spans(text) == ["python a.py --b"] and commands.blocks(text, quick=True) == [["pip f g"]]


@pytest.mark.parametrize(
    "command, reason",
    [
        ("python sample.py x.pt --temprature 1", "unrecognized arguments: --temprature"),
        ("A=1 .venv/bin/python train_gpt.py --max_iters ten", "invalid int value: 'ten'"),
        ("torchrun --standalone train_gpt.py --preset demo", "--preset"),
        ("bash runs/dmeo.sh", "there is no runs/dmeo.sh"),
        ("frobnicate --all", "does not know frobnicate"),
    ],
)
def test_a_wrong_command_is_found(command, reason):
    with pytest.raises(AssertionError, match=re.escape(reason)):
        commands.parse(command)


def test_flags_and_scripts_in_sentences_exist():
    from torch.distributed.run import get_args_parser

    sources = [
        path.read_text(encoding="utf-8") for path in [*SCRIPTS, *ROOT.glob("runs/*.sh"), *ROOT.glob("tests/*.py")]
    ]
    known = "\n".join([*sources, get_args_parser().format_help()])
    for span in SPANS:
        for flag in re.findall(r"(?:^| )(--[\w-]+)", span):
            assert re.search(rf"{flag.replace('--no-', '--')}\b", known), f"no script has {flag}"
        if re.fullmatch(r"[\w./-]+(\.py|\.sh|\.md|/)", span) and not re.match("out/|data/.*/", span):
            assert (ROOT / span).exists() or [*ROOT.glob(f"*/{span}")], f"there is no {span}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_how_it_is_used(path):
    source = path.read_text(encoding="utf-8")
    if "__main__" in source and (path.parent.name in ("bench", "runs") or "argparse" in source):
        assert "argparse" in source, "--help would start its work"
        assert "--help" in call(path, "--help")[0]


def test_quick_blocks_run_as_they_stand(tmp_path):
    """In a copy of the repository, one after the other."""
    for name in listed():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    for block in commands.blocks(TEXTS[0], quick=True):
        subprocess.run(["bash", "-e", "-c", "\n".join(block)], cwd=tmp_path, env=environment, check=True)
