"""Options of several commands; errors about names suggest the nearest one."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowvi.cli.catalog import bound_names, guide_names
from flowvi.runtime.arguments import check_choice, unknown_choice
from flowvi.runtime.memory_limit import memory_limit

if TYPE_CHECKING:
    from flowvi.objectives.renyi_bound import Renyi

AUTO = "auto"
MAX_SEED = 2**32 - 1
CALL = re.compile(r"(?P<name>\w+)\s*(?:\((?P<arguments>[^()]*)\))?")
WHOLE = re.compile(r"[+-]?\d+")


def limit_memory(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Keep evaluations of the whole command within a limit."""
    try:
        ctx.with_resource(memory_limit(value))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


memory_option = click.option(
    "--max-memory",
    callback=limit_memory,
    expose_value=False,
    metavar="SIZE",
    help="Memory for the evaluation of draws, such as 2GB.  [default: FLOWVI_MAX_MEMORY, or 1GB]",
)


EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
folder_argument = click.argument("folder", type=EXISTING_FOLDER, metavar="DIR")
seed_option = click.option(
    "--seed",
    type=click.IntRange(0, MAX_SEED),
    default=0,
    show_default=True,
    help="Seed of all random numbers.",
)
out_option = click.option(
    "--out", type=Path, metavar="DIR", help="Folder of the results; made if needed."
)


def one_of(kind: str, choices: Collection[str]) -> Callable[..., str]:
    """Checks that a value is one of these names."""

    def checked(ctx: click.Context, param: click.Parameter, value: str) -> str:
        if value not in choices:
            raise click.BadParameter(unknown_choice(kind, value, sorted(choices)))
        return value

    return checked


def guide_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """A guide, a flow, "structured", or "auto"."""
    choices = [AUTO, *guide_names()]
    if value not in choices:
        raise click.BadParameter(unknown_choice("guide", value, choices))
    return value


def objective_call(ctx: click.Context, param: click.Parameter, value: str | None) -> Renyi | None:
    """An objective, written as a name or as a call with plain arguments: "iwelbo(16)"."""
    try:
        return None if value is None else objective(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def objective(text: str) -> Renyi:
    """Read an objective such as "elbo", "iwelbo(16)" or "renyi(0.5, 16)"; nothing is evaluated.

    Raises:
        ValueError: The text names no bound, or its arguments do not suit it.
    """
    call = CALL.fullmatch(text.strip())
    if call is None:
        raise ValueError(
            f"'{text}' is no objective; write a name such as elbo, or a call such as iwelbo(16)."
        )
    name = call["name"]
    check_choice("objective", name, bound_names())
    given = (call["arguments"] or "").strip()
    arguments = [_plain(word.strip()) for word in given.split(",")] if given else []
    from flowvi.objectives.registry import OBJECTIVES
    from flowvi.objectives.renyi_bound import Renyi

    try:
        made = OBJECTIVES[name](*arguments)
    except TypeError:
        raise ValueError(
            f"'{text}': {name} takes other arguments; see `flowvi list objectives`."
        ) from None
    if not isinstance(made, Renyi):
        raise ValueError(f"'{text}' is for latents of rows (local=), which a model file has not.")
    return made


def _plain(word: str) -> int | float | str:
    if WHOLE.fullmatch(word):
        return int(word)
    try:
        return float(word)
    except ValueError:
        return word
