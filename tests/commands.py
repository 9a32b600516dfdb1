"""Would a command of the documentation be understood? It is not run: files that it reads need not exist, flags must."""

import argparse
import importlib.util
import os
import re
import shlex
import sys
from unittest import mock

from conftest import ROOT, call
from torch.distributed.run import get_args_parser

PROGRAM = re.compile(r"(\w+=\S* )*(\.venv/bin/)?(python[\d.]*|torchrun|bash|pip) ")  # how a command is told from words
BLOCK = re.compile(r"^ *```(\w*)( quick)?\n(.*?)^ *```$", re.M | re.S)


def blocks(markdown, quick=False):
    """The commands of each block of shell, or of those marked quick; one a line, or on several that end in \\."""
    texts = [text for kind, marked, text in BLOCK.findall(markdown) if kind == "sh" and (marked or not quick)]
    lines = [re.findall(r"^ *([^#\s].*)", re.sub(r"\\\n *", "", text), re.M) for text in texts]
    return [[command for line in block for command in line.split(" && ")] for block in lines]


def spans(markdown):
    """What stands between backticks in the sentences of a text."""
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", BLOCK.sub("", markdown))]


def documented(docstring):
    """The commands in a script's docstring: indented lines, the explanation behind two spaces cut off."""
    lines = re.findall(r"^    (\S.*)", docstring, re.M)
    return [re.split(r"  +", line)[0] for line in lines if PROGRAM.match(line)]


def parse(command):
    """Raise an AssertionError, with what is wrong in it, when a command would not be understood."""
    program, *arguments = shlex.split(re.sub(r"^(\w+=\S* )*(\.venv/bin/)?", "", command), comments=True)
    if program.startswith("python") and arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
    elif program.startswith("python") and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), f"there is no {arguments[1]}"
    elif program.startswith("python"):
        parse_script(*arguments)
    elif program == "torchrun":
        flags = get_args_parser().parse_args(arguments)
        parse_script(flags.training_script, *flags.training_script_args)
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file(), f"there is no {arguments[0]}"
    else:
        assert program in ("pip", "git", "cd", "source"), f"tests/commands.py does not know {program}"


def parse_script(script, *arguments):
    assert (ROOT / script).is_file(), f"there is no {script}"
    if "argparse" not in (ROOT / script).read_text(encoding="utf-8"):
        return  # it would begin its work
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *given):
        parse_args(self, *given)
        raise SystemExit  # before its work begins

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop):
        with mock.patch.object(sys, "path", [os.path.dirname(ROOT / script), *sys.path]):  # as when it is run
            call(script, *arguments)
