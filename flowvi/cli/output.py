"""Output of commands: text for people, or one JSON object for machines."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np

Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """The option --json; the command takes it as `as_json`."""
    option = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object instead of text."
    )
    return option(command)


def print_answer(as_json: bool, record: Any, text: str) -> None:
    """Print a record as JSON, or a text in its place."""
    click.echo(json.dumps(to_json(record)) if as_json else text)


def to_json(value: Any) -> Any:
    """Convert to types of JSON: records to objects, numbers that are not finite to null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return to_json(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): to_json(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
