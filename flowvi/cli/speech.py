"""How commands say what went wrong, and their exit codes."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import click

DISTRUSTED, INTERRUPTED = 3, 130


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
