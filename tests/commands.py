"""
Would a command of the documentation be understood? Nothing of it is run: files need not exist, flags must.

blocks(markdown) finds the commands, parse(command) raises a ValueError that says what is wrong with one.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import pathlib
import re
import shlex
import subprocess
import sys
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = re.compile(
    r"(\w+=\S* )*(\.venv/bin/)?(python[\d.]*|torchrun|bash|pip) "
)  # how a line of prose is told from one
# The part of the shell that the documentation uses. What is not in it (pipes, $(...), an open quote) matches nowhere.
TOKEN = re.compile(
    r"""(?:[ \t]|\\\n)+ | \#[^\n]* | (?P<end>\n|;|&&|\|\|)
        | (?P<word>(?:[^\s\\;&|<>()'"`] | \\[^\n] | '[^']*' | "(?:\\.|[^\\"])*")+)""",
    re.X | re.S,
)


def tokens(text):
    """(position, token) of each word and of each end of a command."""
    position = 0
    while position < len(text):
        match = TOKEN.match(text, position)
        if not match:
            raise ValueError(f"an open quote, or a form that tests/commands.py does not know: {text[position:]!r}")
        if match.lastgroup:
            yield position, match[0]
        position = match.end()


def blocks(markdown):
    """The blocks of shell: a list of (line of the fence, marked quick?, [(line, command), ...])."""
    found, lines = [], markdown.split("\n")
    fences = [i for i, line in enumerate(lines) if line.lstrip().startswith("```")]
    for first, last in zip(fences[::2], fences[1::2]):
        kind = lines[first].strip()[3:]
        if kind not in ("", "sh", "sh quick", "python", "text", "json"):
            raise ValueError(f"line {first + 1}: no kind of block is called {kind!r}")
        if kind.startswith("sh"):
            indent = len(lines[first]) - len(lines[first].lstrip())
            text = "\n".join(line[indent:] for line in lines[first + 1 : last])
            found.append((first + 1, kind == "sh quick", [(first + 2 + n, each) for n, each in commands(text)]))
    return found


def commands(text):
    """(line, command) of each command; one that goes over several lines, such as a loop, is one."""
    found, start, depth = [], 0, 0
    with contextlib.suppress(ValueError):  # what cannot be read is part of the last command, of which parse() says so
        for position, token in tokens(text):
            depth += (token == "for") - (token == "done")
            if token == "\n" and depth == 0:
                found.append((start, text[start:position]))
                start = position + 1
    found.append((start, text[start:]))
    found = [(start, command) for start, command in found if re.search(r"^\s*[^#\s]", command, re.M)]
    return [(text.count("\n", 0, start), command) for start, command in found]


def documented(docstring):
    """The commands in a script's docstring: indented lines, the explanation behind two spaces cut off."""
    lines = [line[4:] for line in docstring.split("\n") if line.startswith("    ")]
    return [re.split(r"  +", line)[0] for line in lines if PROGRAM.match(line)]


def parse(command, names=None):
    """Raise a ValueError when a command would not be understood; names, the shell's variables, gets those it sets."""
    names, words = {} if names is None else names, []
    for _, token in [*tokens(command), (0, "\n")]:
        if token not in ("\n", ";", "&&", "||"):
            words.append(token)
            continue
        words = words[1:] if words[:1] == ["do"] else words
        if words[:1] == ["for"]:  # only the first round is looked at
            if len(words) < 4 or words[2] != "in":
                raise ValueError(f"not the loop that tests/commands.py knows: {' '.join(words)}")
            names[words[1]] = expand(words[3], names)[0]
        elif words not in ([], ["done"]):
            parse_words(words, names)
        words = []


def expand(word, names):
    def value(match):
        name = match[1] or match[2]
        if match[0][0] == "$" and name not in names:
            raise ValueError(f"no line before it sets {match[0]}")
        return names[name] if name else match[0]

    return shlex.split(re.sub(r"\$(?:(\w+)|\{(\w+)\})?|'[^']*'", value, word))


def parse_words(words, names):
    assigned = {}
    while words and re.match(r"\w+=", words[0]):
        name, value = words[0].split("=", 1)
        assigned[name] = " ".join(expand(value, names))
        words = words[1:]
    if not words:
        return names.update(assigned)
    program, *arguments = [part for word in words for part in expand(word, names)]
    program = program.removeprefix(".venv/bin/")
    if re.fullmatch(r"python[\d.]*", program) and arguments:
        if arguments[0] == "-c" and len(arguments) > 1:
            compile_text(arguments[1])
        elif arguments[0] == "-m" and len(arguments) > 1:
            if importlib.util.find_spec(arguments[1]) is None:
                raise ValueError(f"there is no module {arguments[1]}")
        else:
            parse_script(*arguments)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        flags = attempt(lambda: get_args_parser().parse_args(arguments))
        parse_script(flags.training_script, *flags.training_script_args)
    elif program == "bash" and arguments:
        done = subprocess.run(["bash", "-n", existing(arguments[0])], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stderr.strip())
    elif program == "pip" and arguments[:1] == ["install"]:
        for flag, path in zip(arguments, arguments[1:]):
            if flag == "-r":
                existing(path)
    elif (program, *arguments[:1]) != ("git", "clone") and program not in ("cd", "source"):
        raise ValueError(f"a form that tests/commands.py does not know: {' '.join(words)}")


def compile_text(code):
    try:
        compile(code, "-c", "exec")
    except SyntaxError as error:
        raise ValueError(f"{error}: {code}") from None


def existing(path):
    if not (ROOT / path).is_file():
        raise ValueError(f"there is no {path}")
    return ROOT / path


def attempt(call):
    """What call() returns; a ValueError with its last line on stderr when it exits with another code than 0."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return call()
    except SystemExit as error:
        if error.code:
            raise ValueError(said.getvalue().strip().split("\n")[-1]) from None


class ParsedError(Exception):
    """Raised where a script has its flags and would begin its work."""


@functools.cache
def load(path):
    spec = importlib.util.spec_from_file_location(f"parsed_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):  # as when it is run; the benches add to it
        spec.loader.exec_module(module)
    return module


def parse_script(path, *arguments):
    file = existing(path)
    source = file.read_text(encoding="utf-8")
    if "argparse" not in source:  # one that reads sys.argv itself, or nothing
        strange = [each for each in arguments if f'"{each.split("=")[0]}"' not in source and each.startswith("-")]
        if strange or (arguments and "sys.argv" not in source):
            raise ValueError(f"{path} does not know {' '.join(strange or arguments)}")
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *given):
        parse_args(self, *given)
        raise ParsedError

    module = load(file)
    with mock.patch.object(sys, "argv", [path, *arguments]):
        if hasattr(module, "get_flags"):
            attempt(module.get_flags)
        else:  # a bench, whose main() begins with its flags
            with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop):
                with contextlib.suppress(ParsedError):
                    attempt(module.main)
