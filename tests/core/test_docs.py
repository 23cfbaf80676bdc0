"""The documentation: its Python runs, links and paths exist, commands exist, formulas survive Markdown; and so do citations in sources."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch

from miras_kernels.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "kernels/README.md", "bench/README.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
FENCE = re.compile(r"^(?P<mark><!-- fragment -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
FOLDERS = ("python", "kernels", "csrc", "tests", "bench", "examples", "docs")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """A document without its code blocks and display formulas."""
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


def test_every_block_is_found():
    for path in DOCUMENTS:
        text = path.read_text()
        assert text.count("```") == 2 * len(FENCE.findall(text)), named(path)
        assert text.count("<!-- fragment -->\n```") == sum(bool(block["mark"]) for block in FENCE.finditer(text)), named(path)
    assert any(block.values[0].name == "README.md" for block in blocks())


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> list[str]:
    """The targets of links that are not URLs."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)) if not target.startswith("http")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_link_targets_exist(path):
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@functools.cache
def files() -> tuple[str, ...]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return tuple("/" + named(path) for path in [*found, *ROOT.glob("*")])


#: a file name, possibly with the end of its path in front: `testing/cases.py`
PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)*\.(?:py|md|h|cpp|cu))`")


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_paths_exist(path):
    missing = [name for name in PATH.findall(prose(path)) if not any(file.endswith("/" + name) for file in files())]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_commands_exist(path):
    text = path.read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, re.MULTILINE)) <= targets
    assert set(re.findall(r"python -m miras_kernels ([a-z]+)", text)) <= COMMANDS.keys()


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_formulas_in_a_line_survive_markdown(path):
    """Markdown drops the backslash of an escaped character, and `|` ends a table cell."""
    text = re.sub(r"`[^`]*`", "", prose(path))
    for line in text.splitlines():
        assert line.count("$") % 2 == 0, line
        broken = [formula for formula in re.findall(r"\$[^$]+\$", line) if re.search(r"\\[^a-zA-Z]|[|<*]", formula)]
        assert not broken, line


#: the sources whose comments and docstrings cite the documentation
SOURCES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".h", ".cpp", ".cu") and not {"__pycache__", "kernels"} & set(path.parts[len(ROOT.parts) + 1 :])
]
CITATION = re.compile(r"docs/([\w-]+\.md)(?:[,:]? sections? (\d+(?:(?:, | and | to )\d+)*))?")


def sections(name: str) -> set[str]:
    return set(re.findall(r"^## (\d+)\. ", (ROOT / "docs" / name).read_text(), re.MULTILINE))


def test_citations_in_sources_exist():
    cited = []
    for path in SOURCES:
        text = re.sub(r"\n\s*(?://|#|\*)?:?\s*", " ", path.read_text())  # a citation may run over the end of a comment line
        for name, numbers in CITATION.findall(text):
            assert (ROOT / "docs" / name).exists(), f"{named(path)} cites docs/{name}"
            missing = set(re.findall(r"\d+", numbers)) - (sections(name) if numbers else set())
            assert not missing, f"{named(path)} cites section {missing} of docs/{name}"
            cited += re.findall(r"\d+", numbers)
        assert not re.search(r"\bSPEC\b", text), f"{named(path)} cites a page that the repository does not have"
    assert len(cited) > 10
