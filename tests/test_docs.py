"""README.md, docs and the scripts' docstrings: links lead somewhere, and every command names a
script, subcommand and flags that are there, with values that its parser takes."""

import argparse
import importlib
import importlib.util
import re
import shlex

import pytest

from conftest import ROOT

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
SCRIPTS = ("embed", "train", "sample", "evaluate", "experiments", "tiny.world", "tiny.train")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELLS = ("", "bash", "sh", "shell", "console")


def relative(page):
    return str(page.relative_to(ROOT))


# ------------------------------------------------------------------------------- links
def links(text):
    """Targets of a page's markdown and HTML links, code left out."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    return re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    found = []
    for heading in re.findall(r"^#+ +(.*)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        same = re.compile(re.escape(anchor) + r"(-\d+)?")
        taken = len([*filter(same.fullmatch, found)])
        found.append(f"{anchor}-{taken}" if taken else anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page):
    for target in links(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue  # another site
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), f"{target}: no such file"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{target}: no such heading"


def test_every_page_is_linked_from_the_readme():
    linked = {target.partition("#")[0] for target in links((ROOT / "README.md").read_text())}
    assert {relative(page) for page in PAGES[1:]} <= linked


# ---------------------------------------------------------------------------- commands
def commands(text):
    """Simple commands of shell text, as lists of words; variables get a value."""
    text = text.replace("\\\n", " ")
    text = re.sub(r"\"?\$\{?@[^}\"\s]*\}?\"?", "", text)  # "${@:2}"
    text = re.sub(r"\$\{?\w+\}?", "1", text)
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command = []
        for word in [*lexer, ";"]:
            if not re.fullmatch(r"[;&|()]+", word):
                command.append(word)
                continue
            while command and re.fullmatch(r"\w+=.*|do|then|time|nohup|\$|\{", command[0]):
                del command[0]
            if command:
                yield command
            command = []


def program(command):
    """A command -> the script or module that Python starts, and its arguments; or None."""
    if command[0] not in ("python", "python3", "torchrun"):
        return None
    rest = command[1:]
    while rest:  # torchrun's own flags come before the script
        word = rest.pop(0)
        if word in ("-m", "--module"):
            return rest[0], rest[1:]
        if word.endswith(".py"):
            assert (ROOT / word).is_file(), f"{word}: no such script"
            return word.removesuffix(".py").removeprefix("tests/").replace("/", "."), rest
    return None


class Parsed(Exception):
    """Stops a script once it has parsed its command line, before it looks for files."""


@pytest.fixture
def parse(monkeypatch):
    """Give a script's own parser a command line: parse(module, words) -> values; SystemExit if it
    knows them not."""
    known = argparse.ArgumentParser.parse_known_args

    def parse_known_args(parser, words=None, namespace=None):
        parser.allow_abbrev = False
        values, unknown = known(parser, words, namespace)
        assert not unknown, f"no such flags: {unknown}"
        raise Parsed(values)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)

    def parse(module, words):
        with pytest.raises(Parsed) as parsed:
            module.parse_args(words)
        return parsed.value.args[0]

    return parse


def check(parse, command):
    """A command's script and its subcommand and flags are there; False if it is no Python."""
    found = program(command)
    if found is None:
        return False
    name, words = found
    for word in words:
        if word.startswith("assets/"):
            assert (ROOT / word.partition(":")[0]).exists(), f"{word}: no such file"
    assert importlib.util.find_spec(name), f"{name}: no such script or module"
    if name in (*SCRIPTS, "bench"):
        try:
            parse(importlib.import_module(name), words)
        except SystemExit:
            pytest.fail(f"{shlex.join(command)}: its parser refuses it, see above")
    return True


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_of_the_pages(page, parse):
    shell = [text for language, text in FENCE.findall(page.read_text()) if language in SHELLS]
    checked = [check(parse, command) for command in commands("\n".join(shell))]
    assert sum(checked) >= (5 if page.name == "README.md" else 0)


@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_of_the_docstrings(name, parse):
    doc = importlib.import_module(name).__doc__
    lines = re.findall(r"^ *((?:python|torchrun) .*)$", doc, re.MULTILINE)
    for line in lines:
        assert all(check(parse, command) for command in commands(line))
        assert len(re.findall(r"\bpython\b", line.partition("#")[0])) <= 1, f"two commands: {line}"
    assert lines


@pytest.mark.parametrize(
    "command, problem",
    [
        ("python nowhere.py", "no such script"),
        ("python sample.py --user assets/ppd/0.pt:0.5 --prompt x", "no such file"),
        ("python -m tiny.nowhere", "no such script or module"),
        ("python train.py --uncond-user off", "no such flags"),
        ("python evaluate.py users --judge-u=x", "no such flags"),  # no abbreviations
        ("python evaluate.py interpolate", "refuses"),
        ("python experiments.py tables", "refuses"),
        ("A=1 torchrun --nproc-per-node 8 train.py --beta much && echo 1", "refuses"),
        ("python -m tiny.train base --out base --lena 1.3", "no such flags"),
    ],
)
def test_the_checks_see_what_is_wrong(command, problem, parse):
    with pytest.raises((AssertionError, pytest.fail.Exception), match=problem):
        for simple in commands(command):
            check(parse, simple)
