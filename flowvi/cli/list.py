"""`flowvi list`: names of guides, flows, objectives and models."""

import ast
from collections.abc import Iterator
from pathlib import Path

import click

from flowvi.cli.catalog import FLOWS, GUIDES, OBJECTIVES, bound_names, entries
from flowvi.cli.output import json_option, print_answer

REGISTRIES = {"flows": FLOWS, "guides": GUIDES, "objectives": OBJECTIVES}
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
    for name, call, line in entries(*REGISTRIES[kind]):
        if kind != "objectives":
            yield name, line
        elif name in bound_names():
            yield name + call, line


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
