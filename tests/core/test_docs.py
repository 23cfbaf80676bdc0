"""The documents: their Python runs, their links and paths lead somewhere, their commands exist, their formulas reach the reader."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch

from miras_kernels.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "bench/README.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
FENCE = re.compile(r"^(?P<mark><!-- fragment -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
FOLDERS = ("python", "kernels", "csrc", "tests", "bench", "examples", "docs")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """A document less its blocks of code and display formulas."""
    return FENCE.sub("", path.read_text())


def blocks() -> list:
    """Every block of Python that is not marked as a fragment."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        for block in FENCE.finditer(text):
            if block["language"] == "python" and not block["mark"]:
                line = text.count("\n", 0, block.start("text")) + 1
                found.append(pytest.param(path, line, block["text"], id=f"{named(path)}:{line}"))
    return found


@pytest.mark.parametrize("path, line, text", blocks())
def test_python_runs(path, line, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile("\n" * (line - 1) + text, named(path), "exec", dont_inherit=True), {"__name__": "document"})


def test_no_block_is_missed():
    for path in DOCUMENTS:
        text = path.read_text()
        assert text.count("```") == 2 * len(FENCE.findall(text)), named(path)
        assert text.count("<!-- fragment -->\n```") == sum(bool(block["mark"]) for block in FENCE.finditer(text)), named(path)
    assert any(block.values[0].name == "README.md" for block in blocks())


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> list[str]:
    """The targets in a document that are not elsewhere on the web."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)) if not target.startswith("http")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_lead_somewhere(path):
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@functools.cache
def files() -> tuple[str, ...]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return tuple("/" + named(path) for path in [*found, *ROOT.glob("*")])


#: a name with an ending that our files have; a folder in front need not be the whole way: `testing/cases.py`
PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)*\.(?:py|md|h|cpp|cu))`")


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_paths_exist(path):
    missing = [name for name in PATH.findall(prose(path)) if not any(file.endswith("/" + name) for file in files())]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_commands_exist(path):
    text = path.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    assert set(re.findall(r"python -m miras_kernels ([a-z]+)", text)) <= COMMANDS.keys()


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_formulas_in_a_line_survive_markdown(path):
    """Markdown takes the backslash from an escaped sign, and ends a cell of a table at a bar."""
    text = re.sub(r"`[^`]*`", "", prose(path))
    for line in text.splitlines():
        assert line.count("$") % 2 == 0, line
        broken = [formula for formula in re.findall(r"\$[^$]+\$", line) if re.search(r"\\[^a-zA-Z]|[|<*]", formula)]
        assert not broken, line
