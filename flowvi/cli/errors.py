"""Error messages of commands, and their exit codes."""

import shlex
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click
from click.core import ParameterSource

DISTRUSTED, INTERRUPTED, TERMINATED = 3, 130, 143


def command_line(ctx: click.Context) -> str:
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
def errors_without_traceback() -> Iterator[None]:
    """Show errors that flowvi raises as their message, without a traceback."""
    try:
        yield
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    except ImportError as error:
        # Packages of flowvi's extras: their purpose, and the command that installs them.
        if "pip install" not in str(error):
            raise
        raise click.ClickException(str(error)) from error


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Show a warning as one line, without the place in flowvi that raised it."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: click.echo(f"Warning: {message}", err=True)
        yield


class Stop:
    """Whether, and how, the command was asked to stop."""

    def __init__(self) -> None:
        self.code = INTERRUPTED

    def terminate(self, number: int, frame: FrameType | None) -> None:
        """Treat SIGTERM as Ctrl-C, with an exit code of its own."""
        self.code = TERMINATED
        signal.raise_signal(signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Stop with the exit code of Ctrl-C, where it is pressed outside of a fit's steps."""
    stop = Stop()
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop.terminate) if main else None
    # Shells start background processes with SIGINT ignored; SIGTERM is raised as SIGINT.
    deaf = main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if deaf:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield stop
    except KeyboardInterrupt:
        click.echo("Interrupted before all results were written.", err=True)
        click.get_current_context().exit(stop.code)
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
        if deaf:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
