"""Any network as a Pyro model whose weights are latent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from flowvi.bnn.likelihoods import LIKELIHOODS, Likelihood
from flowvi.bnn.priors import PRIORS, Prior, weight_of
from flowvi.runtime.arguments import check_choice, check_integer, check_type, suggest_spelling
from flowvi.targets import ModelError

Inputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Bayesian:
    """A Pyro model: weights from their priors, then the data given the network's output.

    Called with inputs x, a tensor or a tuple of tensors whose first axis is the
    rows, and data y. The sites are the weights, by their names in the module, those of the
    likelihood, and "y" in the plate "row". Without y, data are drawn.
    `predict` reports "output" as well: the network's output, (rows, *outputs). A single
    output is a number a row, and so is a single column of y.

    Args:
        module: The network.
        priors: Name of a parameter -> its prior. Other parameters are trained with the
            guide, unless they require no gradient.
        likelihood: Of the output.
        batch: Rows of a minibatch; all of them without.
    """

    module: nn.Module
    priors: Mapping[str, Prior]
    likelihood: Likelihood
    batch: int | None = None

    @property
    def __name__(self) -> str:
        return f"bayesian {type(self.module).__name__}"

    def __call__(self, x: Inputs, y: Tensor | None = None) -> Tensor:
        inputs = x if isinstance(x, tuple) else (x,)
        rows = self._rows(inputs, y)
        values, dtype = self._values(inputs)
        plate, chosen = self._plate(rows, y)
        # Integer inputs, such as indices of an embedding, keep their type.
        taken = tuple(_cast(t if chosen is None else t[chosen], dtype) for t in inputs)
        output: Tensor = functional_call(self.module, values, taken)
        if output.dim() == 2 and output.shape[1] == 1:
            output = output.squeeze(1)
        fn = self._given(output)
        with plate:
            # Not reported for the data of a fit: each draw would store one value per row.
            reported = poutine.infer_config(config_fn=lambda _: {"reported": y is None})
            with reported:
                pyro.deterministic("output", output, event_dim=output.dim() - 1)
            if y is None:
                seen = None
            else:
                seen = _fitting(y, fn, rows)
                seen = seen if chosen is None else seen[chosen]
            pyro.sample("y", fn, obs=seen)
        return output

    def _rows(self, inputs: tuple[Tensor, ...], y: Tensor | None) -> int:
        lengths = {len(t) for t in (*inputs, *(() if y is None else (y,)))}
        if len(lengths) != 1:
            raise ModelError(
                f"x and y need the same number of rows; got {', '.join(map(str, lengths))}."
            )
        return lengths.pop()

    def _plate(self, rows: int, y: Tensor | None) -> tuple[pyro.plate, Tensor | None]:
        if self.batch is None or y is None or self.batch >= rows:
            return pyro.plate("row", rows), None
        plate = pyro.plate("row", rows, subsample_size=self.batch)
        return plate, plate.indices

    def _values(self, inputs: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], torch.dtype]:
        """Parameters and buffers of the module, in the highest precision of it and its inputs."""
        named = dict(self.module.named_parameters())
        floats = [t.dtype for t in (*named.values(), *inputs) if t.is_floating_point()]
        dtype = reduce(torch.promote_types, floats)
        values = {n: _cast(t, dtype) for n, t in self.module.named_buffers()}
        for name, p in named.items():
            if name in self.priors:
                values[name] = self.priors[name](weight_of(self.module, name, dtype))
            else:
                values[name] = _cast(pyro.param(name, p), dtype)
        return values, dtype

    def _given(self, output: Tensor) -> dist.TorchDistribution:
        fn = self.likelihood(output)
        if fn.batch_shape[:1] != output.shape[:1]:
            raise ModelError(
                f"likelihood must return a distribution of {len(output)} rows for an output of "
                f"shape {tuple(output.shape)}; got one of batch shape {tuple(fn.batch_shape)}."
            )
        return fn.to_event(len(fn.batch_shape) - 1)


@suggest_spelling
def bayesian(
    module: nn.Module,
    prior: str | Prior | Mapping[str, str | Prior] = "normal",
    likelihood: str | Likelihood = "gaussian",
    *,
    batch: int | None = None,
) -> Bayesian:
    """Make the weights of a network latent: a Pyro model of inputs x and data y.

    ``flowvi.fit(flowvi.from_pyro(flowvi.bayesian(net), x, y))`` fits a guide to the
    posterior of the weights.

    Args:
        module: The network. Layers of any kind, other than batch normalisation while
            it trains. Dropout must be switched off (`module.eval()`).
        prior: Name of a row of `PRIORS`, or a function of a `Weight`; for all parameters, or
            by glob patterns of their names, such as ``{"head.*": "horseshoe"}``. Of several
            patterns the first that fits counts. Parameters that none fits are not latent: they
            are trained with the guide, or kept where they require no gradient.
        likelihood: Name of a row of `LIKELIHOODS`, or a function from the network's output,
            (rows, *outputs), to a distribution of the rows; it may sample sites of its own.
        batch: Rows of a minibatch, for unbiased estimates of the log density; all rows of the
            data without.

    Raises:
        ModelError: A layer couples the rows, or a pattern fits no parameter.
    """
    check_type("module", module, nn.Module, "a network")
    _check_rows_apart(module)
    patterns = prior if isinstance(prior, Mapping) else {"*": prior}
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ModelError(
                f"No parameter of {type(module).__name__} is named '{pattern}'; "
                f"it has {', '.join(names) or 'none'}."
            )
    found = {
        name: _named(next(p for pattern, p in patterns.items() if fnmatchcase(name, pattern)))
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    if isinstance(likelihood, str):
        likelihood = LIKELIHOODS[check_choice("likelihood", likelihood, LIKELIHOODS)]
    if batch is not None:
        batch = check_integer("batch", batch)
    return Bayesian(module, found, likelihood, batch)


def _named(prior: str | Prior) -> Prior:
    if not isinstance(prior, str):
        return prior
    return PRIORS[check_choice("prior", prior, PRIORS)]()


def _check_rows_apart(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
            raise ModelError(
                f"{type(part).__name__} '{name}' couples the rows of the data while it trains: "
                "there is no likelihood of single rows. Use nn.LayerNorm or nn.GroupNorm, or, to "
                "keep the statistics that it has, switch it over by module.eval()."
            )


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() else t


def _fitting(y: Tensor, fn: dist.TorchDistribution, rows: int) -> Tensor:
    """Data as the likelihood has them: a column of numbers is numbers."""
    shape = (rows, *fn.event_shape)
    if y.dim() == 2 and y.shape[1] == 1 and len(shape) == 1:
        y = y.squeeze(1)
    if tuple(y.shape) != shape:
        raise ModelError(
            f"y has shape {tuple(y.shape)}, but the likelihood of this network's output has "
            f"{shape}."
        )
    return y
