"""Put every public name on the page of the reference."""

import inspect
from typing import Any

import flowvi
from flowvi import plots

MARK = "<!-- every public name -->"
# What is no function or class knows no module of its own.
HOMES = {
    "FLOWS": "flowvi.flows",
    "GUIDES": "flowvi.guides",
    "LIKELIHOODS": "flowvi.bnn",
    "OBJECTIVES": "flowvi.objectives",
    "PRIORS": "flowvi.bnn",
}


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by mkdocs for every page."""
    return markdown.replace(MARK, names()) if MARK in markdown else markdown


def names() -> str:
    """One entry for each name, where it is defined."""
    lines = []
    for package in (flowvi, plots):
        lines += [f"## {package.__name__}", ""]
        public = [name for name in package.__all__ if not name.startswith("__")]
        for name in sorted(public, key=str.lower):
            value = getattr(package, name)
            named = inspect.isfunction(value) or inspect.isclass(value)
            home = value.__module__ if named else HOMES[name]
            lines += [f"::: {home}.{name}", ""]
    return "\n".join(lines)
