"""Every word of the glossary exists in flowvi, and so does every place that CONTRIBUTING names."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import flowvi
from flowvi import diagnostics

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flowvi"
ROWS = re.findall(
    r"^\| (?!in flowvi|---)(.+?) \| (.+?) \| ", (ROOT / "docs/glossary.md").read_text(), re.M
)
TYPED = [term for first, _ in ROWS for term in re.findall(r"`([^`]+)`", first)]
SHOWN = [term for first, _ in ROWS for term in re.findall(r"\*\*([^*]+)\*\*", first)]
SOURCE = "\n".join(path.read_text() for path in sorted(PACKAGE.rglob("*.py"))).lower()


def exists(term: str) -> bool:
    """Whether a name can be typed: a public one, a member of a public class, or an argument."""
    if term.endswith("="):
        return term[:-1] in inspect.signature(flowvi.fit).parameters
    name, _, member = term.partition(".")
    home = flowvi if name in flowvi.__all__ else diagnostics
    if name not in home.__all__:
        return False
    owner = getattr(home, name)
    fields = (
        {f.name for f in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else set()
    )
    fields |= set(getattr(owner, "__annotations__", ()))
    return not member or hasattr(owner, member) or member in fields or attribute(owner, member)


def attribute(owner: Any, member: str) -> bool:
    """Whether a class sets an attribute when it is made."""
    return re.search(rf"\bself\.{member}\b", inspect.getsource(owner)) is not None


def test_the_glossary_has_words():
    assert len(TYPED) > 20 and len(SHOWN) > 10
    assert len({first for first, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize("term", TYPED)
def test_a_name_of_the_glossary_exists(term):
    assert exists(term)


@pytest.mark.parametrize("term", SHOWN)
def test_a_word_of_the_glossary_is_used(term):
    assert term.lower() in SOURCE


@pytest.mark.parametrize("term", ["Shelf", "Target.nothing", "nothing=", "fit.nothing"])
def test_a_name_that_is_gone_would_be_found(term):
    assert not exists(term)


def places() -> list[str]:
    """Paths and names of the table in CONTRIBUTING that says where a new part belongs."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Where a new part belongs")[1]
    return re.findall(r"`([^`]+)`", text.split("\n## ")[0])


def test_every_part_has_a_place_that_exists():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Where a new part belongs")[1]
    kinds = re.findall(r"^\| ([a-z ]+) \|", table.split("\n## ")[0], re.M)
    paths = [p for p in places() if "/" in p]

    assert {"flow", "guide", "bound", "start", "sampler", "schedule"} <= set(kinds)
    assert {"escalation step", "diagnostic", "bridge to another library"} <= set(kinds)
    assert len(paths) >= len(kinds) - 2
    assert not [p for p in paths if not (ROOT / p).exists()]


def test_every_list_that_a_part_is_in_exists():
    """A name in backticks before `in FILE` is one of that file."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Where a new part belongs")[1]
    pairs = re.findall(r"`(\w+)` in `([\w/.]+)`", text.split("\n## ")[0])

    assert len(pairs) >= 5
    for name, path in pairs:
        assert re.search(rf"^(def |class )?{name}\b", (ROOT / path).read_text(), re.M), (name, path)
