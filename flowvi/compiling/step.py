"""When the step of a fit is compiled, and the switch from the eager step to the compiled one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from flowvi.compiling.background import Compilation, Compiled, anything_kept, available
from flowvi.compiling.graph import Bound, NotOneGraph, trace

Compile = bool | Literal["auto"]
# Parameters (P), number of estimates, rows -> bound, gradient of minus the bound (P).
Gradient = Callable[[int, Sequence[Tensor]], tuple[Tensor, Tensor]]
# Seconds of training ahead that make it worth to look for a compiled step, and to make one.
LOOK_SECONDS, MAKE_SECONDS = 10.0, 40.0
# Largest error of a compiled value or gradient, in units of the precision and of its size.
ROUNDING = 1e6


def asked(compile: Compile) -> Compile:
    """What "auto" means here: FLOWVI_COMPILE, if it is set to on or off, has the last word."""
    word = os.environ.get("FLOWVI_COMPILE", "")
    return {"on": True, "off": False}.get(word, compile) if compile == "auto" else compile


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Accelerator:
    """Replaces the eager gradient of one guide's objective by a compiled one, once there is one.

    Args:
        modules: What has the parameters: guide and target.
        bound: (estimates, rows of subsampled plates) -> mean of so many estimates.
        repeats: Estimates in one call of the compiled step. A multiple of it takes more calls,
            so that a change of the number of draws compiles nothing anew.
        compile: Whether to wait for it, to do without, or "auto": to train on meanwhile.
        say: Takes a line of the log.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        bound: Callable[[int, Sequence[Tensor]], Tensor],
        repeats: int,
        compile: Compile,
        say: Callable[[str], None],
    ) -> None:
        self.bound, self.repeats, self.say = bound, repeats, say
        self.module = Bound(modules, lambda *rows: bound(repeats, rows))
        self.trained = list(self.module.trained().values())
        self.compile = asked(compile)
        self.compiled: Compiled | None = None
        self._compilation: Compilation | None = None
        self._began = 0.0

    @property
    def pending(self) -> bool:
        """Whether it is still to be decided, or waited for."""
        return self.compile is not False and self.compiled is None

    def consider(self, seconds: float, rows: Sequence[Tensor]) -> None:
        """Begin to compile if that is worth it, and wait for it if asked to.

        Args:
            seconds: Training ahead, at the pace of the eager step.
            rows: Rows of subsampled plates, as an example.
        """
        if self._compilation is not None or not self.pending:
            return
        alone = processors() < 2
        make = self.compile is True or (seconds >= MAKE_SECONDS and not alone)
        if not (make or (seconds >= LOOK_SECONDS and anything_kept())):
            return
        why = "" if self.trained[0].device.type == "cpu" else "only steps on the CPU are"
        why = why or available()
        try:
            if why:
                raise NotOneGraph(why)
            graph = trace(self.module, rows)
        except NotOneGraph as error:
            self.say(f"the step is not compiled: {error}")
            self.compile = False
            return
        flat = nn.utils.parameters_to_vector(self.trained)
        self._compilation = Compilation(graph, flat, rows)
        self._began = time.perf_counter()
        if make:
            self._compilation.start()
        elif not self._compilation.kept:
            self.compile = False
            return
        self.poll(rows, wait=self.compile is True)

    def poll(self, rows: Sequence[Tensor], wait: bool = False) -> None:
        """Switch over if the compiled step is there."""
        made = self._compilation
        if made is None or not self.pending or not made.done(wait):
            return
        compiled = made.load()
        if compiled is not None:
            self.compiled = compiled
            made.failed = self._check(rows)
        if made.failed:
            self.say(f"the step is not compiled: {made.failed}")
            self.compile, self.compiled = False, None

    def takes(self, repeats: int) -> bool:
        """Whether a compiled step is there for so many estimates."""
        return self.compiled is not None and repeats % self.repeats == 0

    def gradient(self, repeats: int, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Bound, and the gradient of minus it, (P), by the compiled step."""
        assert self.compiled is not None and self._compilation is not None
        flat, calls = nn.utils.parameters_to_vector(self.trained).detach(), repeats // self.repeats
        with torch.no_grad():
            value, gradient = self.compiled(flat, *rows, *self._compilation.graph.draw())
            for _ in range(calls - 1):
                v, g = self.compiled(flat, *rows, *self._compilation.graph.draw())
                value, gradient = value + v, gradient + g
        return (value / calls, gradient / calls) if calls > 1 else (value, gradient)

    def eager(self, repeats: int, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The same by autograd."""
        value = self.bound(repeats, rows)
        found = torch.autograd.grad(-value, self.trained, allow_unused=True)
        parts = [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for p, g in zip(self.trained, found, strict=True)
        ]
        return value.detach(), torch.cat(parts)

    def stop(self) -> None:
        """End a compilation that is still going on."""
        if self._compilation is not None:
            self._compilation.stop()

    def _check(self, rows: Sequence[Tensor]) -> str:
        """Compare both on the same noise; what is wrong, or nothing."""
        state, waited = torch.get_rng_state(), time.perf_counter() - self._began
        timed = []
        for function in (self.eager, self.gradient):
            torch.set_rng_state(state)
            began = time.perf_counter()
            timed.append((function(self.repeats, rows), time.perf_counter() - began))
        torch.set_rng_state(state)
        (expected, slow), (found, fast) = timed
        for name, a, b in zip(("bound", "gradient"), expected, found, strict=True):
            error = float((a - b).abs().max()) / float(a.abs().max().clamp(min=1.0))
            if bool(a.isfinite().all()) and not error <= ROUNDING * torch.finfo(a.dtype).eps:
                return f"its {name} would be off by {error:.1g} of its size"
        made = self._compilation
        how = "found" if made is not None and made.kept else "compiled meanwhile"
        self.say(
            f"compiled step ({how}, {waited:.1f} s): a gradient takes {1e3 * fast:.2g} ms "
            f"instead of {1e3 * slow:.2g}"
        )
        return ""
