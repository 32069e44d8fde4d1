"""The report of an autoencoder: its table and its pictures in one HTML file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from flowvi._version import __version__
from flowvi.reporting.fragments import cells
from flowvi.reporting.pictures import data_uri


def vae_page(
    title: str,
    facts: Mapping[str, str],
    numbers: Sequence[tuple[str, str, str]],
    pictures: Mapping[str, tuple[Path, str]],
    log: Sequence[str] = (),
    unit: str = "image",
    columns: Sequence[Sequence[str]] = (),
) -> str:
    """HTML of the page; it loads nothing from anywhere.

    Args:
        title: Name of the model.
        facts: What was fitted, by name.
        numbers: Measure, value and standard error.
        pictures: File of each picture and what it shows, by heading; files that are missing are
            left out.
        log: Decisions of the fit.
        unit: What a row of the data is called.
        columns: Lines on the columns of a table: name, nats by itself and given the code, and
            likelihood.
    """
    css = files("flowvi.reporting").joinpath("templates", "report.css").read_text()
    table = _table(("measure", "value", "standard error"), numbers)
    parts = [
        f"<section><h2>What was fitted</h2>{_facts(facts)}</section>",
        f"<section><h2>Test {unit}s</h2>{table}</section>",
    ]
    if columns:
        heads = ("column", "by itself", "given code", "likelihood")
        words = (
            "Nats of each column of test rows: by its own distribution, and given a draw of the "
            "code of its row. What the code tells of a column is the difference."
        )
        table = f"<p>{words}</p>{_table(heads, columns)}"
        parts.append(f"<section><h2>What the code tells</h2>{table}</section>")
    for heading, (file, words) in pictures.items():
        if not file.is_file():
            continue
        image = f'<img src="{data_uri(file.read_bytes())}" alt="{escape(words)}">'
        caption = f"<figcaption>{escape(words[:1].upper() + words[1:])}.</figcaption>"
        figure = f"<figure>{image}{caption}</figure>"
        parts.append(f"<section><h2>{escape(heading)}</h2>{figure}</section>")
    if log:
        lines = "".join(f"<li>{escape(line)}</li>" for line in log)
        parts.append(
            f'<section><h2>What the fit decided</h2><ol class="log">{lines}</ol></section>'
        )
    csp = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    body = re.sub(r"(?<=>)\s+(?=<)", "", "".join(parts))
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{csp}">'
        f"<title>{escape(title)}</title><style>{css} img {{ --width: 34rem; }}</style></head><body>"
        f'<header><p class="kind">Report of an autoencoder</p><h1>{escape(title)}</h1></header>'
        f"<main>{body}</main><footer><p>Made by flowvi {__version__}. This file is complete: it "
        "loads nothing from anywhere.</p></footer></body></html>\n"
    )


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td>{escape(value)}</td></tr>'
        for name, value in facts.items()
    )
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f'<div class="scroll" tabindex="0">{cells(heads, rows, of_page=True)}</div>'
