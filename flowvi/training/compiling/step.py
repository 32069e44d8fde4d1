"""Decide when to compile the step of a fit, and replace the eager step by the compiled one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from flowvi.training.compiling.background import Compilation, Compiled, anything_kept, available
from flowvi.training.compiling.graph import Bound, NotOneGraph, trace
from flowvi.training.flat import flatten_tensors

Compile = bool | Literal["auto"]
# Parameters (P), number of estimates, rows -> bound, gradient of minus the bound (P).
Gradient = Callable[[int, Sequence[Tensor]], tuple[Tensor, Tensor]]
# Least remaining training in seconds to look for a compiled step, and to compile one.
LOOK_SECONDS, MAKE_SECONDS = 20.0, 40.0
# Largest error of a compiled value or gradient, in units of the precision and of its size; the
# root of the precision if that is smaller, as in single precision.
ROUNDING = 1e6
WORDS: dict[str, Compile] = {"on": True, "off": False, "auto": "auto"}


def asked(compile: Compile) -> Compile:
    """Resolve "auto": FLOWVI_COMPILE, if set to on or off, takes precedence.

    Raises:
        ValueError: The argument or the variable has an unknown value.
    """
    if compile not in (True, False, "auto"):
        raise ValueError(f'compile must be True, False or "auto"; got {compile!r}.')
    word = os.environ.get("FLOWVI_COMPILE") or "auto"
    if word not in WORDS:
        raise ValueError(f"The variable FLOWVI_COMPILE must be on, off or auto; got {word!r}.")
    return WORDS[word] if compile == "auto" else compile


def processors() -> int:
    """Number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Accelerator:
    """Replaces the eager gradient of an objective by a compiled one when it is ready.

    Args:
        modules: Modules that own the parameters: guide and target.
        trained: The parameters to train, in the order of the modules. They may be copies in a
            finer precision; the modules' own parameters are then set to the rounded copies.
        bound: Function (estimates, rows of subsampled plates) -> mean of the estimates.
        repeats: Estimates in one call of the compiled step. A multiple of this number takes
            several calls, so that more draws need no new compilation.
        compile: Value returned by `asked`: wait for the compilation, do not compile, or
            "auto", which trains with the eager step meanwhile.
        say: Function that takes a line of the log.

    Attributes:
        whole: The memory of the parameters, (P), while it is one vector.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        trained: Sequence[Tensor],
        bound: Callable[[int, Sequence[Tensor]], Tensor],
        repeats: int,
        compile: Compile,
        say: Callable[[str], None],
    ) -> None:
        self.bound, self.repeats, self.say = bound, repeats, say
        self.module = Bound(modules, lambda *rows: bound(repeats, rows))
        self.trained = trained
        self._own = list(self.module.trained().values())
        pairs = zip(self._own, trained, strict=True)
        self._apart = [(own, other) for own, other in pairs if own is not other]
        self.compile = compile
        self.compiled: Compiled | None = None
        self.whole: Tensor | None = None
        self._compilation: Compilation | None = None
        self._began = 0.0

    @property
    def pending(self) -> bool:
        """Whether the compilation is undecided or still running."""
        return self.compile is not False and self.compiled is None

    def consider(
        self,
        seconds: float,
        rows: Sequence[Tensor],
        over: Callable[[], bool] = lambda: False,
    ) -> None:
        """Start a compilation if it pays, and switch to the compiled step if it is ready.

        Args:
            seconds: Remaining training time at the speed of the eager step.
            rows: Example rows of subsampled plates.
            over: Function called during the compilation; true stops waiting.
        """
        if self.pending and self._compilation is None:
            self._begin(seconds, rows)
        made = self._compilation
        if made is None or not self.pending or not made.done(self.compile is True, over):
            return
        self.compiled = made.load()
        wrong = made.failed or self._check(rows)
        if wrong:
            self._refuse(wrong)

    def _begin(self, seconds: float, rows: Sequence[Tensor]) -> None:
        """Record the step and start to compile it, if enough training remains."""
        alone = processors() < 2
        make = self.compile is True or (seconds >= MAKE_SECONDS and not alone)
        if not (make or (seconds >= LOOK_SECONDS and anything_kept())):
            return
        elsewhere = self.trained[0].device.type != "cpu"
        if why := "only steps on a CPU can be" if elsewhere else available():
            self._refuse(why)
            return
        try:
            graph = trace(self.module, rows, self.trained[0].dtype)
        except NotOneGraph as error:
            self._refuse(str(error))
            return
        flat = flatten_tensors(self.trained)
        self._compilation = Compilation(graph, flat, rows)
        self._began = time.perf_counter()
        if make:
            self._compilation.start()
        elif not self._compilation.kept:
            self.compile = False

    def _refuse(self, why: str) -> None:
        self.say(f"the step is not compiled: {why}")
        self.compile, self.compiled = False, None

    def takes(self, repeats: int) -> bool:
        """Whether a compiled step is ready for this number of estimates."""
        return self.compiled is not None and repeats % self.repeats == 0

    def gradient(self, repeats: int, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Bound and gradient of minus the bound, (P), by the compiled step."""
        assert self.compiled is not None and self._compilation is not None
        flat = flatten_tensors(self.trained) if self.whole is None else self.whole
        calls = repeats // self.repeats
        with torch.no_grad():
            value, gradient = self.compiled(flat, *rows, *self._compilation.graph.draw())
            for _ in range(calls - 1):
                v, g = self.compiled(flat, *rows, *self._compilation.graph.draw())
                value, gradient = value + v, gradient + g
        return (value / calls, gradient / calls) if calls > 1 else (value, gradient)

    def eager(self, repeats: int, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Bound and gradient of minus the bound, (P), by autograd."""
        self._follow()
        value = self.bound(repeats, rows)
        found = torch.autograd.grad(-value, self._own, allow_unused=True)
        parts = [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for p, g in zip(self._own, found, strict=True)
        ]
        # The concatenation has the finest precision of its parts, which `trained` may exceed.
        return value.detach(), torch.cat(parts).to(self.trained[0].dtype)

    @torch.no_grad()
    def _follow(self) -> None:
        """Set the modules' parameters to the trained values."""
        if self._apart:
            own, trained = zip(*self._apart, strict=True)
            torch._foreach_copy_(list(own), list(trained))

    def stop(self) -> None:
        """Stop a running compilation."""
        if self._compilation is not None:
            self._compilation.stop()

    def _check(self, rows: Sequence[Tensor]) -> str:
        """Compare compiled and eager gradients on the same noise; return any error as text."""
        state, waited = torch.get_rng_state(), time.perf_counter() - self._began
        timed = []
        for function in (self.eager, self.gradient):
            torch.set_rng_state(state)
            began = time.perf_counter()
            timed.append((function(self.repeats, rows), time.perf_counter() - began))
        torch.set_rng_state(state)
        (expected, slow), (found, fast) = timed
        for name, a, b in zip(("bound", "gradient"), expected, found, strict=True):
            size = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0
            eps = max(torch.finfo(p.dtype).eps for p in (a, *self._own))
            allowed = min(ROUNDING * eps, eps**0.5) * max(size, 1.0)
            if not torch.isclose(a, b, rtol=0.0, atol=allowed, equal_nan=True).all():
                off = float((a - b).abs().max())
                return f"the error of its {name} is {off:.1g}, where rounding allows {allowed:.1g}"
        made = self._compilation
        how = "found" if made is not None and made.kept else "compiled in the background"
        self.say(
            f"compiled step ({how}, {waited:.1f} s): a gradient takes {1e3 * fast:.2g} ms "
            f"instead of {1e3 * slow:.2g}"
        )
        return ""
