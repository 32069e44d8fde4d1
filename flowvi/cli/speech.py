"""How commands say what went wrong, and their exit codes."""

import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import click
from click.core import ParameterSource

DISTRUSTED, INTERRUPTED = 3, 130


def as_typed(ctx: click.Context) -> str:
    """The command with the options that were given, for the record."""
    words = ["flowvi", str(ctx.info_name)]
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[name]
        if isinstance(parameter, click.Argument):
            words.append(str(value))
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            words.append(parameter.opts[0])
        else:
            words += [parameter.opts[0], str(value)]
    return shlex.join(words)


@contextmanager
def said_plainly() -> Iterator[None]:
    """Show what flowvi refuses as its message, without a traceback."""
    try:
        yield
    except ValueError as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show a warning as one line, without the place in flowvi that raised it."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: click.echo(f"Warning: {message}", err=True)
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C outside of the fit's steps, which return what they have: stop with its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("Interrupted before all results were written.", err=True)
        click.get_current_context().exit(INTERRUPTED)
