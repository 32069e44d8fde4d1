"""Compile in a separate process, and cache compiled steps on disk."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowvi.training.compiling import worker
from flowvi.training.compiling.graph import Graph

Compiled = Callable[..., tuple[Tensor, Tensor]]
# Size of the cache; the least recently used packages are deleted.
KEPT = 50
SUFFIX = ".pt2"
# Seconds between two calls of `over` while waiting.
PATIENCE = 0.2


def folder() -> Path:
    """Cache folder of compiled steps: FLOWVI_CACHE, or flowvi in the user's cache folder."""
    if own := os.environ.get("FLOWVI_CACHE"):
        return Path(own)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "flowvi"


def available() -> str:
    """Return the reason why compilation is not possible here; empty if it is possible."""
    compiler = os.environ.get("CXX") or "g++"
    if not any(shutil.which(name) for name in (compiler.split()[0], "clang++")):
        return f"there is no C++ compiler ({compiler}) on the path"
    return ""


def anything_kept() -> bool:
    """Whether the cache holds compiled steps of earlier fits."""
    return folder().is_dir() and any(folder().glob(f"*{SUFFIX}"))


class Compilation:
    """A compilation of a graph, running or cached by an earlier fit.

    Args:
        graph: The recorded graph.
        flat: Example parameters, (P).
        rows: Example rows of subsampled plates.
    """

    def __init__(self, graph: Graph, flat: Tensor, rows: Sequence[Tensor] = ()) -> None:
        self.graph = graph
        self.package = folder() / f"{graph.key()}{SUFFIX}"
        self.kept = self.package.exists()
        self.failed = ""
        self._inputs = (flat.detach().clone(), *rows)
        self._process: subprocess.Popen[bytes] | None = None
        self._work: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Start to compile in the background, unless the package is cached.

        A failure, such as a read-only folder, is stored in `failed`.
        """
        if self.kept or self._process is not None:
            return
        try:
            self._start()
        except (OSError, pickle.PicklingError, TypeError, AttributeError) as error:
            self.failed = str(error)
            self._clean()

    def _start(self) -> None:
        self.package.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._work = tempfile.TemporaryDirectory(prefix="flowvi-")
        source = Path(self._work.name) / "graph"
        state = torch.get_rng_state()
        noise = self.graph.draw()
        torch.set_rng_state(state)
        with source.open("wb") as file:
            pickle.dump((self.graph.module, (*self._inputs, *noise)), file)
        command = [sys.executable, worker.__file__, str(source), str(self.package)]
        with (Path(self._work.name) / "errors").open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # an interrupt is for the fit, which ends this one
            )

    def done(self, wait: bool = False, over: Callable[[], bool] = lambda: False) -> bool:
        """Whether the compilation has ended.

        Args:
            wait: Whether to wait until it ends.
            over: Function called while waiting; true stops the wait.
        """
        if self._process is None:
            return True
        while wait and not over():
            try:
                self._process.wait(PATIENCE)
                break
            except subprocess.TimeoutExpired:
                continue
        if self._process.poll() is None:
            return False
        if self._process.returncode and not self.package.exists():
            assert self._work is not None
            text = (Path(self._work.name) / "errors").read_text(errors="replace")
            lines = [line for line in text.splitlines() if line.strip()]
            self.failed = lines[-1] if lines else f"exit status {self._process.returncode}"
        self._clean()
        return True

    def load(self) -> Compiled | None:
        """Return the compiled function; on failure return None and set `failed`."""
        if self.failed:
            return None
        try:
            package = torch._inductor.aoti_load_package(str(self.package))
            os.utime(self.package)
        except (RuntimeError, OSError) as error:
            self.failed = str(error).strip().splitlines()[0]
            # A retry would fail in the same way.
            self.package.unlink(missing_ok=True)
            return None
        _forget()
        run = package.loader.boxed_run

        def compiled(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            # The package's own call flattens nested arguments, which takes 0.1 ms.
            bound, gradient = run(list(inputs))
            return bound, gradient

        return compiled

    def stop(self) -> None:
        """Stop a running compilation."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._clean()

    def _clean(self) -> None:
        self._process = None
        if self._work is not None:
            self._work.cleanup()
            self._work = None


def _forget() -> None:
    """Delete the least recently used packages."""
    found = sorted(folder().glob(f"*{SUFFIX}"), key=lambda p: p.stat().st_mtime)
    for package in found[:-KEPT]:
        package.unlink(missing_ok=True)
