"""Lines of the pages are short enough to read beside code."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/**/*.md"))]


def long_lines(text: str) -> list[str]:
    """Lines over 100 characters outside of tables, code and lines that are one link or formula."""
    found, code = [], False
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            code = not code
        plain = not code and not line.lstrip().startswith(("|", "#", "![", "$"))
        if plain and len(line) > 100 and " " in line.strip().removeprefix("- "):
            found.append(line)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_lines_of_a_page_are_short(page):
    assert not long_lines(page.read_text())


def test_a_long_line_would_be_found():
    words = "word " * 30

    assert long_lines(words) == [words]
    assert not long_lines(f"| {words}") and not long_lines(f"```\n{words}\n```")
