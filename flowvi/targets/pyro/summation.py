"""How the discrete sites of a model are summed out: along axes of their own, or value by value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from flowvi.runtime.torch_modes import EagerDispatchMode
from flowvi.targets.pyro import enumeration
from flowvi.targets.pyro.discrete import MOST, JointValues, elementary
from flowvi.targets.pyro.enumeration import Unsummable
from flowvi.targets.recording.capture import agree
from flowvi.targets.recording.tape import record
from flowvi.targets.schema import ModelError

# Runs of the model in which each discrete site has one value, to compare with.
COMPARED = 2
# Joint values that are summed in a loop where the model cannot be recorded for all of them.
LOOPED = 64

# Elements of a tensor with axes for values: so many, or this many times those without.
LARGEST, VALUES = 2**24, 64

# A scored run, and the log Jacobian of the latents: (point, inputs, values of discrete sites by
# their places, whether the others have axes for their values).
RunModel = Callable[
    [Tensor, Sequence[Tensor], dict[str, Tensor], bool], tuple[poutine.Trace, Tensor]
]
# Of a point (D,), one joint value (elements,), and further inputs.
OfJointValue = Callable[..., Any]


class TensorSizeLimit(EagerDispatchMode):
    """Watch how large tensors become, and stop before they fill the memory.

    Args:
        limit: How many elements one may have.

    Attributes:
        largest: Elements of the largest one so far.
    """

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self.limit, self.largest = limit, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        if self.largest > self.limit:
            raise Unsummable(
                f"With an axis for the values of each discrete site, a tensor of the model has "
                f"{self.largest:,} elements: it depends on too many of these sites at once."
            )
        return out


class Summation:
    r"""Sums out the discrete sites k of a model, at a point.

    .. math:: \log p(x, \theta) = \log \sum_k p(x, k, \theta)

    Sites whose elements are independent given all else have an axis for
    their values, and the sum is one of products, by message passing (Obermeyer
    et al. 2019, arXiv:1902.03210). Where a factor depends on several elements
    at once, or the model does not broadcast over such axes, the sum runs over
    joint values, up to 4,096 of them.

    Args:
        first: A run of the model in which discrete sites were drawn.
        names: The discrete sites.
        run: Runs the model.
    """

    def __init__(self, first: poutine.Trace, names: Sequence[str], run: RunModel) -> None:
        self.run, self.sites = run, {name: first.nodes[name] for name in names}
        self.places = JointValues.of(first.nodes, names)
        self.jointly, self.values = JointValues({}, {}), torch.zeros(1, 0, dtype=torch.long)
        self._graphs: dict[str, fx.GraphModule | None] = {}

    def plan(self, point: Tensor, inputs: Sequence[Tensor]) -> None:
        """Find out which sites have to be summed value by value.

        Args:
            point: Where to compare the sum's terms with runs of the model, (D,).
            inputs: What the model takes behind a point.

        Raises:
            ModelError: The sum has too many terms, or its terms are not those of the model.
        """
        chosen = {n for n, s in self.sites.items() if elementary(s["fn"]).event_dim < _events(s)}
        reason = "Elements of one event (to_event) have no axes of their own."
        while True:
            self._sum_jointly(chosen, reason)
            try:
                self._compare(point, inputs)
                return
            except Unsummable as error:
                reason, more = str(error), set(error.sites) or set(self.sites)
            if more <= chosen:
                raise ModelError(reason)
            chosen |= more

    def log_density(self, point: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """The log density of R^D at a point, summed over all values."""
        if not self.jointly.shapes:
            trace, ladj = self._run(point, inputs)
            return enumeration.log_joint(trace) + ladj
        return torch.logsumexp(self._at_all_values("log_density", point, inputs), 0)

    def log_likelihood(
        self, point: Tensor, inputs: Sequence[Tensor], shapes: Mapping[str, torch.Size]
    ) -> dict[str, Tensor]:
        """The log likelihood of each row of each observed site, each summed for itself."""
        if not self.jointly.shapes:
            return enumeration.log_likelihood(self._run(point, inputs)[0], shapes)
        log_p, rows = self._at_all_values("rows", point, inputs, shapes)
        return {
            name: torch.logsumexp(log_p.reshape(-1, *(1,) * (r.dim() - 1)) + r, 0)
            for name, r in rows.items()
        }

    def probabilities(self, point: Tensor, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """The probabilities of each site's values given the data and the point, (*elements, K)."""
        if not self.jointly.shapes:
            _, found = enumeration.probabilities(self._run(point, inputs)[0])
        else:
            log_p, each = self._at_all_values("probabilities", point, inputs)
            weights = torch.softmax(log_p, 0)
            found = {n: torch.tensordot(weights, p, 1) for n, p in each.items()}
            for name, places in self._split_all().items():
                hot = torch.nn.functional.one_hot(places, self.jointly.counts[name])
                found[name] = torch.tensordot(weights, hot.to(weights), 1)
        shapes = {n: (*s, self.places.counts[n]) for n, s in self.places.shapes.items()}
        return {name: found[name].reshape(shape) for name, shape in shapes.items()}

    def prepare(
        self, point: Tensor, inputs: Sequence[Tensor], shapes: Mapping[str, torch.Size]
    ) -> None:
        """Record the functions of a joint value, once for all joint values."""
        if self.jointly.shapes:
            for kind in ("log_density", "rows", "probabilities"):
                self._graphs[kind] = self._recorded(self._function(kind, shapes), point, inputs)

    def first(self) -> dict[str, Tensor]:
        """The first of the joint values that are summed one by one."""
        return self.jointly.split(self.values[0])

    def values_that_vary(
        self, point: Tensor, inputs: Sequence[Tensor], names: Sequence[str]
    ) -> set[str]:
        """Which of some values in the model differ between values of discrete sites."""
        runs = [
            self.run(point, inputs, self.places.split(row), False)[0].nodes
            for row in self.places.some(COMPARED, seed=1)
        ]
        return {
            name
            for name in names
            for other in runs[1:]
            if not _equal(runs[0][name]["value"], other[name]["value"])
        }

    def _run(
        self, point: Tensor, inputs: Sequence[Tensor], row: Tensor | None = None
    ) -> tuple[poutine.Trace, Tensor]:
        """A run with axes for the values of discrete sites, at one joint value of the others."""
        places = self.first() if row is None else self.jointly.split(row)
        return self.run(point, inputs, places, True)

    def _sum_jointly(self, names: set[str], reason: str) -> None:
        self.jointly = JointValues(
            {n: s for n, s in self.places.shapes.items() if n in names},
            {n: k for n, k in self.places.counts.items() if n in names},
        )
        if self.jointly.number > MOST:
            digits = len(str(self.jointly.number))
            many = f"{self.jointly.number:,}" if digits < 10 else f"about 10^{digits - 1}"
            sites = " and ".join(self._with_plates(n) for n in self.jointly.shapes)
            raise ModelError(
                f"{reason} Site {sites} would be summed over {many} joint values, and at most "
                f"{MOST:,} are. Put what depends on a discrete site into its plates, loop over a "
                "small plate (for i in pyro.plate(...)), or sum the values within the model and "
                "add the result by pyro.factor."
            )
        self.values = self.jointly.all()

    def _with_plates(self, name: str) -> str:
        plates = [f"'{frame.name}'" for frame in self.sites[name]["cond_indep_stack"]]
        return f"'{name}'" + (f" in plate {' and '.join(plates)}" if plates else "")

    def _compare(self, point: Tensor, inputs: Sequence[Tensor]) -> None:
        """Compare the terms of the sum with runs in which each discrete site has one value."""
        for row in self.places.some(COMPARED, seed=0):
            places = self.places.split(row)
            with TensorSizeLimit() as seen:
                single, _ = self.run(point, inputs, places, False)
            joint = {name: places[name] for name in self.jointly.shapes}
            if len(joint) == len(places):
                continue
            try:
                with TensorSizeLimit(max(LARGEST, VALUES * seen.largest)):
                    trace, _ = self.run(point, inputs, joint, True)
            except ModelError:
                raise
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                first = str(error).partition("\n")[0]
                raise Unsummable(
                    "The model fails where discrete sites have an axis for their values, left of "
                    f"the plates: {first.rstrip('.')}."
                ) from error
            enumeration.compare(trace, single, places)
            enumeration.log_joint(trace)

    def _function(self, kind: str, shapes: Mapping[str, torch.Size]) -> OfJointValue:
        """The function of one joint value that is recorded."""

        def at(point: Tensor, row: Tensor, *inputs: Tensor) -> Any:
            trace, ladj = self._run(point, inputs, row)
            if kind == "log_density":
                self._unscaled_only(trace)
                return enumeration.log_joint(trace) + ladj
            if kind == "probabilities":
                return enumeration.probabilities(trace)
            prior = [trace.nodes[name]["log_prob_sum"] for name in self.jointly.shapes]
            return sum(prior[1:], prior[0]), enumeration.log_likelihood(trace, shapes)

        return at

    def _unscaled_only(self, trace: poutine.Trace) -> None:
        """Refuse a scale, which multiplies the logarithm of the sum."""
        for name, site in trace.nodes.items():
            scale = site.get("scale", 1.0) if site["type"] == "sample" else 1.0
            if isinstance(scale, Tensor) or scale != 1.0:
                sites = " and ".join(f"'{n}'" for n in self.jointly.shapes)
                raise ModelError(
                    f"Site '{name}' is scaled, or lies in a subsampled plate, and {sites} "
                    "has to be summed over joint values of all its elements: the sum has no "
                    "unbiased estimate from a part of the rows. Use the full plate, without scale."
                )

    def _at_all_values(
        self,
        kind: str,
        point: Tensor,
        inputs: Sequence[Tensor],
        shapes: Mapping[str, torch.Size] | None = None,
    ) -> Any:
        """Results of that function at every joint value, stacked along a first axis."""
        graph, values = self._graphs.get(kind), self.values.to(point.device)
        if graph is not None:
            axes = (None, 0, *(None for _ in inputs))
            return torch.func.vmap(graph, axes)(point, values, *inputs)
        at = self._function(kind, shapes or {})
        each = [at(point, row, *inputs) for row in values]
        return tree_map(lambda *leaves: torch.stack(leaves), *each)

    def _recorded(
        self, function: OfJointValue, point: Tensor, inputs: Sequence[Tensor]
    ) -> fx.GraphModule | None:
        """A function of a joint value as a recorded graph; None if a loop is used instead."""
        reason = "the recorded graph differs from the model"
        some = self.jointly.some(COMPARED, seed=2)
        with torch.no_grad():
            expected = [tree_leaves(function(point, row, *inputs)) for row in some]
            try:
                graph = record(function, [point, some[0].clone(), *inputs])
                axes = (None, 0, *(None for _ in inputs))
                found = tree_leaves(torch.func.vmap(graph, axes)(point, some, *inputs))
                columns = [torch.stack(column) for column in zip(*expected, strict=True)]
                if agree(found, columns):
                    return graph
            except Exception as error:  # whatever cannot be recorded, a loop can do
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if self.jointly.number > LOOPED:
            raise ModelError(
                f"The {self.jointly.number:,} joint values of "
                f"{' and '.join(self.jointly.shapes)} cannot be summed: {reason}. Up to {LOOPED} "
                "are summed one run after another; write the model with tensor operations "
                "(torch.where for a choice, no numbers read into Python) for more."
            )
        return None

    def _split_all(self) -> dict[str, Tensor]:
        """All joint values, by site: (number, *elements)."""
        sizes = [shape.numel() for shape in self.jointly.shapes.values()]
        parts = zip(self.jointly.shapes.items(), self.values.split(sizes, 1), strict=True)
        return {name: part.reshape(-1, *shape) for (name, shape), part in parts}


def _events(site: Mapping[str, Any]) -> int:
    events: int = site["fn"].event_dim
    return events


def _equal(a: Any, b: Any) -> bool:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
