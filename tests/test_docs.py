"""Names in the documentation: every path and every dotted name of the library that it writes in backticks exists."""

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOP = r"(?:decaf|nodes|tests|training|benchmarks|web|workflows|subgraphs|docs|assets|\.ci)"


def quoted(page: Path) -> list[str]:
    """Texts in single backticks, code blocks left out."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return re.findall(r"`([^`\n]+)`", text)


def paths(page: Path) -> list[str]:
    """Paths into the repository, also those among the arguments of a command."""
    return [word for text in quoted(page) for word in text.split() if re.fullmatch(TOP + r"(/[\w./-]+)?", word)]


def names(page: Path) -> list[str]:
    return [text for text in quoted(page) if re.fullmatch(r"decaf(\.\w+)+", text) and not text.endswith(".webp")]


def test_the_pages_name_things():
    """Or the tests below would pass on an empty list."""
    assert sum(len(paths(page)) for page in PAGES) > 30
    assert sum(len(names(page)) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    assert [path for path in paths(page) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page):
    missing = []
    for name in names(page):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            missing.append(f"{name}: {error}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).is_file()] == []
