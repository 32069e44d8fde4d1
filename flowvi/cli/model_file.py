"""A model file: the user's own code, run only because it was named."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from flowvi.targets import Target


class ModelFileError(click.ClickException):
    """Something is wrong in the model file or its data; the exit code is 1."""


def load_target(path: Path, data: Path | None) -> Target:
    """Run a model file and capture its model on its data.

    Args:
        path: A file with `model`, `data` and optionally `dims` and `coords`.
        data: What its `data` reads, if it reads a file.
    """
    from flowvi.targets import from_pyro

    run, arguments, dims, coords = _parts(path, data)
    with _errors_at_model_line(path):
        target = from_pyro(run, *arguments)
        target.name_axes(dims)
        target.name = path.stem
        target.made = partial(load_target, path, data)
        return target.label(coords)


def load_arguments(
    path: Path, data: Path | None, option: str = "--data"
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Run a model file, and return its model and the arguments of the model.

    Args:
        path: The file.
        data: File that its `data` reads, if it reads one.
        option: Option of the command line that named the file.
    """
    run, arguments, *_ = _parts(path, data, option)
    return run, arguments


def load_named_arguments(
    path: Path, data: Path | None
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """As `load_arguments`, with the names of axes and the labels along them."""
    return _parts(path, data)


def reads_a_file(path: Path) -> bool:
    """Run a model file, and return whether its data() takes the path of a file."""
    found = getattr(_run(path), "data", None)
    return callable(found) and bool(inspect.signature(found).parameters)


def _parts(
    path: Path, data: Path | None, option: str = "--data"
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Model, arguments, names of axes and labels of a model file."""
    module = _run(path)
    for name in ("model", "data"):
        if not callable(getattr(module, name, None)):
            raise ModelFileError(
                f"{path} defines no function '{name}'. A model file has a Pyro model named "
                "model, and data(), which returns its arguments."
            )
    if isinstance(getattr(module, "local", None), str):
        raise ModelFileError(
            f"{path} has a latent vector for each row of plate '{module.local}', which "
            f"`flowvi fit` does not fit: run it, python {path}, or call its fit()."
        )
    arguments = _arguments(module, path, data, option)
    _check_call(module, path, arguments)
    labels = getattr(module, "coords", {})
    return module.model, arguments, getattr(module, "dims", {}), labels


def check_path(path: Path) -> None:
    """Refuse a path that is no Python file, and name one that may be meant."""
    if path.is_file() and path.suffix == ".py":
        return
    if path.is_dir() or (path.exists() and path.suffix != ".py"):
        raise click.UsageError(f"{path} is no Python file; give a model file such as models/m.py.")
    nearby = [*Path("models").glob("*.py"), *path.parent.glob("*.py")]
    close = difflib.get_close_matches(path.stem, [file.stem for file in nearby], n=1)
    meant = next((f" Did you mean {f}?" for f in nearby if f.stem in close), "")
    raise click.UsageError(f"There is no file {path}.{meant}")


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"flowvi_model_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _errors_at_model_line(path):
        spec.loader.exec_module(module)
    return module


def _arguments(module: ModuleType, path: Path, data: Path | None, option: str) -> tuple[Any, ...]:
    """Arguments of the model."""
    parameters = inspect.signature(module.data).parameters.values()
    if data is None and any(p.default is p.empty for p in parameters):
        raise click.UsageError(f"{path} reads its data from a file: name it with --data FILE.")
    if data is not None and not parameters:
        if option == "--data":
            raise click.UsageError(f"{path} brings its own data: leave out --data.")
        raise click.UsageError(
            f"{path} cannot read {data}, the file of {option}: its data() takes no path. Write "
            "data(path=None), which reads the file where it is given a path."
        )
    with _errors_at_model_line(path, f" (reading {data})" if data else ""):
        arguments = module.data(str(data)) if data else module.data()
    if not isinstance(arguments, tuple):
        raise ModelFileError(
            f"{path}: data() must return the tuple of the model's arguments; got "
            f"{type(arguments).__name__}. For one argument write `return (y,)`."
        )
    return arguments


def _check_call(module: ModuleType, path: Path, arguments: tuple[Any, ...]) -> None:
    signature = inspect.signature(module.model)
    try:
        signature.bind(*arguments)
    except TypeError:
        raise ModelFileError(
            f"{path}: data() returns {len(arguments)} values, but model is model{signature}."
        ) from None


@contextmanager
def _errors_at_model_line(path: Path, doing: str = "") -> Iterator[None]:
    """Show an error of the model file with the line of that file."""
    try:
        yield
    except (Exception, SystemExit) as error:
        from flowvi.targets import ModelError

        where = _where(path, error)
        # An error without a frame in the model file is an error of flowvi: keep its traceback.
        if not where and not isinstance(error, ModelError | ValueError):
            raise
        what = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
        notes = getattr(error, "__notes__", [])
        raise ModelFileError(
            "\n".join([f"{where or path}{doing}", *_indent([what, *notes])])
        ) from error


def _where(path: Path, error: BaseException) -> str:
    """File, line and code of the innermost place in the model file, if there is one."""
    file = str(path.resolve())
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{path}:{error.lineno}: {(error.text or '').strip()}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f"{path}:{frames[-1].lineno}, in {frames[-1].name}: {frames[-1].line}" if frames else ""


def _indent(lines: list[str]) -> list[str]:
    return [f"  {part.rstrip()}" for line in lines for part in line.splitlines()]
