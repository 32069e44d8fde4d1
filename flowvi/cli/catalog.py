"""Names of registries and what they say of themselves, read from their source.

The command line checks and lists names without running the modules that define
them, whose imports take seconds.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT.name
# Module and name of each registry: a dictionary that is written out, or filled by its items.
FLOWS = (("flows", "FLOWS"),)
GUIDES = (
    ("guides.registry", "GUIDES"),
    ("guides.registry", "JOINT_GUIDES"),
    ("guides.registry", "MANY_GUIDES"),
    ("guides.structured", "STRUCTURED_GUIDES"),
)
OBJECTIVES = (("objectives.registry", "OBJECTIVES"),)
# The forward KL needs draws of the posterior, which the command line does not have.
NO_BOUND = "forward_kl"


class Entry(NamedTuple):
    """A row of a registry.

    Attributes:
        name: Its name.
        call: Arguments of its builder with their defaults, as in a call.
        line: First line of the builder's docstring.
    """

    name: str
    call: str
    line: str


def names(*registries: tuple[str, str]) -> list[str]:
    """Sorted names of registries, each a module of this package and a variable."""
    return sorted({name for module, variable in registries for name in _rows(module, variable)})


def entries(*registries: tuple[str, str]) -> list[Entry]:
    """Rows of registries whose values are functions or classes, sorted by name."""
    found = []
    for module, variable in registries:
        for name, value in _rows(module, variable).items():
            assert isinstance(value, ast.Name), f"{variable}[{name!r}] is no plain name"
            node = _definition(module, value.id)
            call = _call(node) if isinstance(node, ast.FunctionDef) else ""
            line = (ast.get_docstring(node) or "").partition("\n")[0]
            found.append(Entry(name, call, line))
    return sorted(found)


def guide_names() -> list[str]:
    """Sorted names of all guides and flows."""
    return names(*GUIDES, *FLOWS)


def bound_names() -> list[str]:
    """Sorted names of the objectives that a command takes."""
    return [name for name in names(*OBJECTIVES) if name != NO_BOUND]


@cache
def _tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _rows(module: str, variable: str) -> dict[str, ast.expr]:
    """Names and values of a dictionary that a module defines."""
    rows: dict[str, ast.expr] = {}
    for node in _tree(module).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        value = node.value
        if isinstance(target, ast.Subscript) and value is not None:
            if isinstance(target.value, ast.Name) and target.value.id == variable:
                rows[ast.literal_eval(target.slice)] = value
        elif isinstance(target, ast.Name) and target.id == variable:
            assert isinstance(value, ast.Dict), f"{module}.{variable} is not written out"
            keys = [ast.literal_eval(key) for key in value.keys if key is not None]
            rows.update(zip(keys, value.values, strict=True))
    return rows


def _definition(module: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    """Where a module, or the one that it imports it from, defines a function or class."""
    for node in _tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(node.module.removeprefix(f"{PACKAGE}."), alias.name)
    raise LookupError(f"{PACKAGE}.{module} has no {name}")


def _call(function: ast.FunctionDef) -> str:
    """The arguments of a function and their defaults, without types."""
    arguments = function.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        argument.annotation = None
    return f"({ast.unparse(arguments)})"
