"""
Every command of the documentation is understood by what it calls, and README's blocks marked quick run as they stand.

A block opened by ```sh quick is run in a copy of the repository, without a network, after the quick blocks above it.
"""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys

import commands
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
GIT = ["git", "-c", "safe.directory=*"]  # also when the folder belongs to another user, as in a container
SCRIPTS = sorted(path for folder in (".", "data", "runs", "bench", "tests") for path in (ROOT / folder).glob("*.py"))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def listed():
    """The files of the repository, and those that are new and not ignored."""
    flags = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run([*GIT, *flags], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in names.split("\0") if (ROOT / name).is_file()]


def mistakes(markdown):
    """What is wrong with the commands of a text: in its blocks, and in its sentences between backticks."""
    found = []
    for line, _, block in commands.blocks(markdown):
        names, text = {}, "\n".join(command for _, command in block)
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        if done.returncode:
            found.append(f"line {line}: {done.stderr.strip()}")
        found += [problem for each in block for problem in mistake(*each, names)]
    for line, span in spans(markdown):
        if commands.PROGRAM.match(span):
            found += mistake(line, span, {})
    return found


def mistake(line, command, names):
    try:
        commands.parse(command, names)
    except ValueError as error:
        return [f"line {line}: {command.strip()}\n    {error}"]
    return []


def spans(markdown):
    """(line, what stands between backticks) in the sentences of a text."""
    prose = re.sub(r"^ *```.*?^ *```$", lambda block: "\n" * block[0].count("\n"), markdown, flags=re.M | re.S)
    found = re.finditer(r"`([^`]+)`", prose)
    return [(prose.count("\n", 0, match.start()) + 1, match[1].replace("\n", " ")) for match in found]


@pytest.mark.parametrize("name", ["README.md", "records/README.md"])
def test_commands_are_understood(name):
    assert sum(len(block) for *_, block in commands.blocks(read(name))) > 0
    found = mistakes(read(name))
    assert not found, "\n".join([name, *found])


def test_commands_in_docstrings_are_understood():
    found, count = [], 0
    for path in SCRIPTS:
        for command in commands.documented(ast.get_docstring(ast.parse(read(path))) or ""):
            found += [f"{path.relative_to(ROOT)}, {problem}" for problem in mistake(1, command, {})]
            count += 1
    assert count > len(SCRIPTS) / 2 and not found, "\n".join(found)


def test_flags_and_files_in_sentences_exist():
    from torch.distributed.run import get_args_parser

    files, sources = listed(), "\n".join(read(path) for path in SCRIPTS if path.parent.name != "tests")
    folders = [f"{parent}/" for name in files for parent in pathlib.PurePath(name).parents]
    names = {pathlib.PurePath(name).name for name in files}
    known, missing = get_args_parser().format_help(), []
    for line, span in spans(read("README.md")):
        for flag in re.findall(r"(?:^| )(--[\w-]+)", span):
            if f'"{flag.replace("--no-", "--")}"' not in sources and not re.search(rf"{flag}\b", known):
                missing.append(f"line {line}: no script has {flag}")
        if re.fullmatch(r"[\w.-]+\.(py|sh)", span) and span not in names:
            missing.append(f"line {line}: there is no {span}")
        if re.fullmatch(r"(\.ci|data|runs|bench|records|tests)/[\w./-]*", span) and span not in files + folders:
            if subprocess.run([*GIT, "check-ignore", "-q", span], cwd=ROOT).returncode:  # ignored: what scripts write
                missing.append(f"line {line}: there is no {span}")
    assert not missing, "\n".join(["README.md", *missing])


def run(blocks, folder):
    """Run blocks of commands as somebody would who has activated the environment, and has no network."""
    nowhere = dict.fromkeys(
        ["http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"], "http://127.0.0.1:9"
    )
    environment = os.environ | nowhere | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    environment.setdefault("OMP_NUM_THREADS", "2")
    for line, block in blocks:
        text = "\n".join(command for _, command in block)
        done = subprocess.run(
            ["bash", "-e", "-c", text],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"line {line}:\n{text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_quick_blocks_run(tmp_path):
    for name in listed():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    blocks = [(line, block) for line, quick, block in commands.blocks(read("README.md")) if quick]
    assert blocks
    run(blocks, tmp_path)


def test_a_quick_block_that_fails_is_found(tmp_path):
    run([(1, [(2, "x=1"), (3, 'test "$x" = 1')])], tmp_path)
    with pytest.raises(AssertionError, match="line 7"):
        run([(7, [(8, "false"), (9, "true")])], tmp_path)


@pytest.mark.parametrize(
    "command, reason",
    [
        ("python sample.py x.pt --temprature 1", "unrecognized arguments: --temprature"),
        ("python sample.py --seed 1", "required: checkpoint"),
        ("python train_gpt.py --tokenizer gpt3", "invalid choice: 'gpt3'"),
        ("python train_gpt.py --compile --max_iters ten", "invalid int value: 'ten'"),
        ("python bench/ranking.py --grops 2", "unrecognized arguments: --grops"),
        ("python bench/throughput.py --steps 2", "does not know --steps"),
        ("python tests/test_copies.py --form train_char.py", "does not know --form"),
        ("python trian_gpt.py", "there is no trian_gpt.py"),
        ("python -m pytset tests", "there is no module pytset"),
        ("python -c 'import ('", "-c, line 1"),
        ("torchrun --standallone train_gpt.py", "--standallone"),
        ("torchrun --standalone train_gpt.py --preset demo", "--preset"),
        ("bash runs/dmeo.sh", "there is no runs/dmeo.sh"),
        ("pip install -r requirement.txt", "there is no requirement.txt"),
        ("python train_char.py --input 'my story.txt", "open quote"),
        ("python train_char.py | tee log", "does not know"),
        ("python train_char.py --seed $(date +%s)", "does not know"),
        ("python train_char.py --seed $seed", "no line before it sets $seed"),
        ("for seed in 1 x; do\n    python train_char.py --sede $seed\ndone", "--sede 1"),
        ("cd runs && python3 ../nope.py", "nope.py"),
        ("A=1 B='2 3' .venv/bin/python sample.py", "required: checkpoint"),
        ("frobnicate --all", "does not know: frobnicate"),
        ("python train_char.py \\\n    --seed 2 \\\n    --sede 3  # it's wrong", "--sede 3"),
    ],
)
def test_a_wrong_command_is_found(command, reason):
    markdown = f"# Words\n\n```\nno command\n```\n\n```sh\n# a comment: it's fine\npip install x\n\n{command}\n```\n"
    (found,) = [each for each in mistakes(markdown) if not re.match("line 7: bash: ", each)]  # not what bash says of it
    assert found.startswith("line 11: ") and reason in found


def test_commands_are_told_apart():
    text = "a\n```sh quick\nx=3  # three\n\nfor i in 1 2; do\n    y $i\ndone\n```\n"
    text += "- b\n\n  ```sh\n  cd 'a\n  b'\n  cd c\n  ```\n"
    first = [(3, "x=3  # three"), (5, "for i in 1 2; do\n    y $i\ndone")]
    assert commands.blocks(text) == [(2, True, first), (11, False, [(12, "cd 'a\nb'"), (14, "cd c")])]
    with pytest.raises(ValueError, match="line 1: no kind of block is called 'sh quik'"):
        commands.blocks("```sh quik\n```")


def test_a_wrong_command_in_a_sentence_is_found():
    assert mistakes("One\nruns `python sample.py x.pt\n--seed 2`.") == []
    (found,) = mistakes("One\nruns `python sample.py\nx.pt --sede 2`.")
    assert found.startswith("line 2: python sample.py x.pt --sede 2") and "--sede" in found
