"""Draw from a Pyro model: its prior, and data given latent values."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from flowvi.runtime.rng import isolated_rng
from flowvi.targets import subsampling
from flowvi.targets.pyro import checks
from flowvi.targets.pyro.handlers import Substitute, Uncondition, without_validation
from flowvi.targets.pyro.layout import Layout
from flowvi.targets.pyro.runner import Runner
from flowvi.targets.pyro.sampler_fixes import FixedSamplers
from flowvi.targets.recording.batched import silence_vmap_fallback
from flowvi.targets.recording.capture import agree
from flowvi.targets.recording.tape import LatentValueRead, Unrecordable, record
from flowvi.targets.schema import ModelError, Simulator

CHUNK = 1000
CHECKED = 2
KEPT = ("placeholder", "output")

Values = dict[str, Tensor]


def simulator(
    runner: Runner, layout: Layout, reported: Sequence[str], observed: Sequence[str]
) -> Simulator:
    """A function that draws from the model: (latent values or None, n, seed) -> draws.

    Without values it returns all sites from the prior, or the latent ones alone; with values,
    each (n, *shape), the data given them.

    Args:
        runner: The model.
        layout: Its sites.
        reported: Latent and deterministic sites.
        observed: Sites with data.
    """

    def simulate(
        given: Mapping[str, np.ndarray] | None, n: int, seed: int, latents_only: bool = False
    ) -> dict[str, np.ndarray]:
        batches = [batch for _, batch in subsampling.cover(runner.drawn)]
        types = layout.dtypes
        latent = {k: torch.as_tensor(v).to(types[k]) for k, v in (given or {}).items()}
        values = layout.all_elements(latent, lead=1)
        out: Values = {}
        with isolated_rng(seed), torch.no_grad():
            if latents_only:
                out = VectorizedRuns(runner, {}, batches[0], only=list(layout.sites))(
                    {}, batches[0], n, list(layout.sites)
                )
            elif given is None:
                out = VectorizedRuns(runner, {}, batches[0])(
                    {}, batches[0], n, [*reported, *observed]
                )
                values = {name: out[name] for name in layout.sites}
            if not latents_only and (given is not None or runner.drawn):
                draw = VectorizedRuns(runner, values, batches[0])
                pieces = [(batch, draw(values, batch, n, observed)) for batch in batches]
                out |= subsampling.assemble(pieces, runner.drawn, layout.dims, lead=1)
        out = layout.latent_elements(out, lead=1)
        return {name: value.cpu().numpy() for name, value in out.items()}

    return simulate


class VectorizedRuns:
    """Many runs of a model at once, where it can be recorded; one by one where it cannot.

    Args:
        runner: The model.
        values: What is given at sites, (n, *shape) each.
        batch: Rows for plates that draw theirs.
        chunk: How many to make at a time.
        only: The sites that are drawn; all of them without.
        arguments: Tensors among the arguments that differ from run to run, (n, *shape) each.
        further: Function from a run to further values that are returned with those of its sites.
    """

    def __init__(
        self,
        runner: Runner,
        values: Values,
        batch: Values,
        chunk: int = CHUNK,
        only: Sequence[str] = (),
        arguments: Mapping[str, Tensor] | None = None,
        further: Callable[[poutine.Trace], Values] = lambda trace: {},
    ) -> None:
        self.runner, self.chunk, self.only, self.further = runner, chunk, only, further
        self.names, self.plates, self.varying = list(values), list(batch), list(arguments or {})
        # A graph has at least one input, whose first axis is the number of draws.
        each = [v[0].clone() for v in (*values.values(), *(arguments or {}).values())]
        inputs = [torch.zeros(()), *each, *batch.values()]
        self.graph, self.reason, self.warned = None, "", False
        try:
            self.graph = record(self._run, inputs, record_random=True)
            if only:
                # Random numbers that nothing needs, such as those of data, are not drawn.
                self.graph.graph.eliminate_dead_code(lambda node: node.op in KEPT)
                self.graph.recompile()
        except (LatentValueRead, Unrecordable) as error:
            self.reason = str(error)

    def __call__(
        self,
        values: Values,
        batch: Values,
        n: int,
        names: Sequence[str],
        arguments: Mapping[str, Tensor] | None = None,
    ) -> Values:
        """Draw some sites, (n, *shape) each."""
        parts = []
        for start in range(0, n, self.chunk):
            piece = slice(start, start + self.chunk)
            some = {name: value[piece] for name, value in values.items()}
            given = {name: value[piece] for name, value in (arguments or {}).items()}
            made = self._some(some, batch, min(self.chunk, n - start), given)
            parts.append({name: made[name] for name in names})
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def _some(self, values: Values, batch: Values, n: int, given: Values) -> Values:
        arguments = [torch.zeros(n), *values.values(), *given.values(), *batch.values()]
        dims = [0] * (1 + len(values) + len(given)) + [None] * len(batch)
        if self.graph is not None:
            try:
                mapped = torch.func.vmap(self.graph, tuple(dims), randomness="different")
                with silence_vmap_fallback():
                    out, log_p = mapped(*arguments)
                checked = range(min(n, CHECKED))
                if all(self._agrees(out, batch, log_p, i, _row(given, i)) for i in checked):
                    return out
                self.reason = "the recorded graph differs from the model"
            except RuntimeError as error:  # what vmap cannot do, a loop can
                self.reason = str(error).split("\n")[0]
            self.graph = None
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"Simulating one draw at a time, which is slow: {self.reason}", stacklevel=6
            )
        each = [self._scored(_row(values, i), batch, _row(given, i))[0] for i in range(n)]
        return {name: torch.stack([one[name] for one in each]) for name in each[0]}

    def _run(self, _: Tensor, *inputs: Tensor) -> tuple[Values, Tensor]:
        """One run: all sites' values, and their log density."""
        first = len(self.names)
        values = dict(zip(self.names, inputs[:first], strict=True))
        given = dict(zip(self.varying, inputs[first:], strict=False))
        batch = dict(zip(self.plates, inputs[first + len(given) :], strict=True))
        return self._scored(values, batch, given)

    def _scored(self, values: Values, batch: Values, given: Values) -> tuple[Values, Tensor]:
        runner = self.runner
        args, kwargs = runner.with_leaves(given)
        model = functools.partial(runner.model, *args, **kwargs)
        free = runner.input_handler(batch)(Substitute(values)(Uncondition()(model)))
        last = checks.LastSite()
        try:
            with without_validation(), runner.running():
                trace = poutine.trace(last(FixedSamplers()(free))).get_trace()
                chosen = {s["name"] for s in checks.sites_with_value(trace)} & set(self.only)
                log_p = trace.log_prob_sum(lambda name, _: not self.only or name in chosen)
        except (NotImplementedError, AssertionError) as error:
            # Pyro's hidden Markov model asserts that its length is given: only failed assertions of
            # the user's own model are raised.
            if isinstance(error, AssertionError) and not checks.of_library(error):
                raise
            raise ModelError(
                f"Site '{last.name}' cannot be simulated: its distribution does not say how."
            ) from error
        made = {
            s["name"]: torch.as_tensor(s["value"])
            for s in checks.sites_with_value(trace)
            if not self.only or s["name"] in chosen
        }
        return made | self.further(trace), torch.as_tensor(log_p)

    def _agrees(self, out: Values, batch: Values, log_p: Tensor, i: int, given: Values) -> bool:
        """Whether one of the draws has the log density that the model itself gives it."""
        _, expected = self._scored(_row(out, i), batch, given)
        return agree((log_p[i],), (expected,))


def _row(values: Values, i: int) -> Values:
    return {name: value[i] for name, value in values.items()}


class JointDraws:
    """Draws latent vectors and data together, for any number of data sets.

    Args:
        runner: The model.
        vector: Function from a run to its latent vector (D).
        observed: Sites with data.
    """

    CHUNK = 8192
    VECTOR = "latent vector"

    def __init__(
        self, runner: Runner, vector: Callable[[poutine.Trace], Tensor], observed: Sequence[str]
    ) -> None:
        self.runner, self.vector, self.observed = runner, vector, list(observed)
        self._runs: dict[tuple[str, ...], VectorizedRuns] = {}

    def __call__(
        self, n: int, seed: int, arguments: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Values]:
        """Latent vectors (n, D), and data by site, (n, *shape) each."""
        given, key = dict(arguments or {}), tuple(arguments or {})
        with isolated_rng(seed), torch.no_grad():
            if key not in self._runs:
                self._runs[key] = VectorizedRuns(
                    self.runner,
                    {},
                    {},
                    self.CHUNK,
                    arguments=given,
                    further=lambda trace: {self.VECTOR: self.vector(trace)},
                )
            out = self._runs[key]({}, {}, n, [self.VECTOR, *self.observed], given)
        return out.pop(self.VECTOR), out
