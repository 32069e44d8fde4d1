"""`flowvi list`: names of guides, flows, objectives and models."""

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from flowvi.cli.options import BOUNDS
from flowvi.cli.output import json_option, print_answer
from flowvi.fitting.request import STRUCTURED
from flowvi.flows import FLOWS
from flowvi.guides.registry import GUIDES, JOINT_GUIDES
from flowvi.guides.structured import StructuredGuide

REGISTRIES: dict[str, dict[str, Callable[..., Any]]] = {
    "flows": {**FLOWS},
    "guides": {**GUIDES, **JOINT_GUIDES, STRUCTURED: StructuredGuide},
    "objectives": {**BOUNDS},
}
NOTES = {
    "guides": "auto (the default) chooses; every flow is a guide too: see `flowvi list flows`.",
    "objectives": 'Write arguments as in a call: --objective "renyi(0.5, 16)".',
}


@click.command(
    "list",
    short_help="List flows, guides, objectives or models.",
    epilog="""\b
Examples:
  flowvi list flows
  flowvi list objectives
  flowvi list models --dir models""",
)
@click.argument("kind", type=click.Choice([*REGISTRIES, "models"]))
@click.option(
    "--dir",
    "folder",
    type=Path,
    default="models",
    show_default=True,
    help="Where `flowvi list models` looks.",
)
@json_option
def list_command(kind: str, folder: Path, as_json: bool) -> None:
    """List what there is to choose from. Model files are read, not run."""
    rows = list(_models(folder) if kind == "models" else _registry(kind))
    if as_json:
        print_answer(True, [{"name": name, "what": line} for name, line in rows], "")
        return
    width = max((len(name) for name, _ in rows), default=0)
    for name, line in rows:
        click.echo(f"{name:<{width}}  {line}")
    if kind in NOTES:
        click.echo(NOTES[kind])


def _registry(kind: str) -> Iterator[tuple[str, str]]:
    for name, build in sorted(REGISTRIES[kind].items()):
        call = _call(build) if kind == "objectives" else ""
        yield name + call, _first_line(inspect.getdoc(build))


def _call(build: Callable[..., Any]) -> str:
    """The arguments and their defaults, without types."""
    signature = inspect.signature(build)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


def _models(folder: Path) -> Iterator[tuple[str, str]]:
    if not folder.is_dir():
        raise click.UsageError(f"There is no folder {folder}; name one with --dir.")
    for file in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(file.read_text())
        except (SyntaxError, UnicodeDecodeError) as error:
            yield file.stem, f"(cannot be read: {error})"
            continue
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        if "model" in functions:
            needs = "  [--data FILE]" if _takes_a_path(functions.get("data")) else ""
            yield file.stem, _first_line(ast.get_docstring(tree)) + needs


def _takes_a_path(data: ast.FunctionDef | None) -> bool:
    return data is not None and bool(data.args.args)


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]
