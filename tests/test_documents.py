"""What README, CONTRIBUTING, docs, recipes and cards point at exists: files, headings, commands, options, modules."""

import argparse
import ast
import importlib
import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from dualstream.cli import COMMANDS, GROUPS, build_parser

ROOT = Path(__file__).resolve().parents[1]
LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
TEMPLATES = {"data_builders/token_maps/card.md", "hub_cards/templates/model_card.md", "hub_cards/space/README.md"}
TEMPLATES |= {"train/distill_card.md", "train/tiny_card.md"}  # filled in elsewhere
PAGES = sorted(set(LISTED.split()) - TEMPLATES)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`]+)`")
OPTION = re.compile(r"(?<!\S)--?[a-zA-Z][\w-]*")
A_FILE = re.compile(r"[\w./-]+/[\w.-]+\.(?:py|md|yaml|yml|json|html|png|txt|toml|ipynb)")


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def headings(text):
    """The anchors that the Hub and GitHub make of headings."""
    found = []
    for title in re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return found


def broken_links(page, text):
    """Links of a page to files or headings of this repository that are not there."""
    broken = []
    for target in LINK.findall(FENCED.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        path = (ROOT / page).parent / unquote(place) if place else ROOT / page
        found = path.exists() and path.resolve().is_relative_to(ROOT)
        if found and anchor and path.suffix == ".md":
            own = text if path == ROOT / page else path.read_text(encoding="utf-8")
            found = anchor in headings(own)
        broken += [] if found else [target]
    return broken


def code_of(text):
    """Lines of shell blocks (continued lines joined, comments dropped) and code in running text."""
    blocks = [body for language, body in FENCED.findall(text) if language in ("", "bash", "sh", "console")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    spans = [" ".join(span.split()) for span in SPAN.findall(FENCED.sub("", text))]
    return [re.split(r"\s#\s|\s#$", line)[0].strip() for line in lines] + spans


def commands_of(text):
    """(name, rest) of every command of this package; ``a|b`` is two commands, and a group's name alone is none."""
    for line in code_of(text):
        if not line.startswith("dualstream "):
            continue
        words = line.split()[1:]
        choices = words[1].split("|") if len(words) > 1 and words[0] in GROUPS else [""]
        for choice in choices:
            name = f"{words[0]} {choice}" if words[0] in GROUPS else words[0]
            if words[0] not in GROUPS or choice:
                yield name, " ".join(words[2 if words[0] in GROUPS else 1 :])


@cache
def options_of(name):
    """Every option of a command, the settings of a training run included."""
    module = importlib.import_module(COMMANDS[name][0])
    parser = build_parser(name)
    for word in name.split():
        (choices,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = choices[word]
    known = set(parser._option_string_actions)
    if getattr(module, "PASSES_OPTIONS_ON", False):
        from dualstream.train.distillation_config import DistillationConfig
        from dualstream.train.sft_config import VisionSFTConfig

        kind = {"train sft": VisionSFTConfig, "train distill": DistillationConfig}[name]
        known |= {f"--{field}" for field in kind.__dataclass_fields__}
    return known


def unknown_commands(text):
    """Commands and options that a page names and that do not exist."""
    wrong = []
    for name, rest in commands_of(text):
        if name not in COMMANDS:
            wrong.append(name)
            continue
        quoted = re.sub(r"\"[^\"]*\"|'[^']*'", "QUOTED", rest)
        wrong += [f"{name} {option}" for option in OPTION.findall(quoted) if option not in options_of(name)]
    return wrong


def missing_names(text):
    """Modules and names of this package that the Python on a page imports and that do not exist."""
    wrong = []
    for code in [body for language, body in FENCED.findall(text) if language in ("python", "py")]:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "dualstream":
                if importlib.util.find_spec(node.module) is None:
                    wrong.append(node.module)
                    continue
                module = importlib.import_module(node.module)
                wrong += [alias.name for alias in node.names if not hasattr(module, alias.name)]
    return wrong


def missing_places(text):
    """Files of this repository, modules and make targets that a page names and that do not exist."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    wrong = []
    for line in code_of(text):
        if A_FILE.fullmatch(line) and line.split("/")[0] in folders and not (ROOT / line).exists():
            wrong.append(line)
        for module in re.findall(r"python -m (dualstream[\w.]+)", line):
            if importlib.util.find_spec(module) is None:
                wrong.append(module)
        if (match := re.match(r"make ([\w-]+)", line)) and match[1] not in targets:
            wrong.append(line)
    return wrong


def test_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "docs/benchmarks.md", "recipes/qwen2-vl.md"} <= set(PAGES)
    assert not TEMPLATES - set(LISTED.split())


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    assert broken_links(page, text_of(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_exists(page):
    assert unknown_commands(text_of(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_file_module_and_make_target_exists(page):
    assert missing_places(text_of(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_imported_name_exists(page):
    assert missing_names(text_of(page)) == []


def test_what_is_wrong_is_found():
    text = """# One title
[here](README.md#nowhere) [there](absent.md) [one](#one-title) [two](#two-titles) [web](https://example.org/x)
`dualstream quiz --model NAME -n 5` `dualstream quiz --modle NAME` `dualstream build castles` `tests/absent.py`

```
dualstream ask photo.jpg "what --x is it?" \\
    --compression rle --loud   # --not an option
dualstream analyze lens|dance --out DIR
dualstream train distill --learning_rate 1 --learning_rite 2
make nothing
python -m dualstream.nothing
```
```python
import torch
from dualstream.modeling import load_model, unload_model
from dualstream.models import load_model
```
"""
    assert broken_links("README.md", text) == ["README.md#nowhere", "absent.md", "#two-titles"]
    assert unknown_commands(text) == [
        "ask --loud", "analyze dance", "train distill --learning_rite", "quiz --modle", "build castles",
    ]  # fmt: skip
    assert missing_names(text) == ["unload_model", "dualstream.models"]
    assert missing_places(text) == ["make nothing", "dualstream.nothing", "tests/absent.py"]
