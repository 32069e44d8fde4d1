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
) -> str:
    """HTML of the page; it loads nothing from anywhere.

    Args:
        title: Name of the model.
        facts: What was fitted, by name.
        numbers: Measure, value and standard error.
        pictures: File of each picture and what it shows, by heading; files that are missing are
            left out.
        log: Decisions of the fit.
    """
    css = files("flowvi.reporting").joinpath("templates", "report.css").read_text()
    parts = [
        f"<section><h2>What was fitted</h2>{cells(('', ''), list(facts.items()))}</section>",
        f"<section><h2>Test images</h2>{cells(('', 'value', 'standard error'), numbers)}</section>",
    ]
    for heading, (file, words) in pictures.items():
        if not file.is_file():
            continue
        image = f'<img src="{data_uri(file.read_bytes())}" alt="{escape(words)}">'
        caption = f"<figcaption>{escape(words)}</figcaption>"
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
