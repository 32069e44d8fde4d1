"""A model of its data and of further data from the same parameters, for posterior calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor


class WithReplicate:
    """A model whose observed sites score a second data set too; it can be pickled.

    Args:
        model: The Pyro model.
        replicate: Further data by observed site, of the shape that the site has.
    """

    def __init__(self, model: Callable[..., Any], replicate: Mapping[str, Tensor]) -> None:
        self.model, self.replicate = model, dict(replicate)
        self.__name__ = str(getattr(model, "__name__", type(model).__name__))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Replicating(self.replicate):
            return self.model(*args, **kwargs)


class _Replicating(Messenger):
    """Adds the density of the second data set to that of the first, site by site."""

    def __init__(self, replicate: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.replicate = replicate

    def _pyro_sample(self, msg: Any) -> None:
        value = self.replicate.get(msg["name"])
        if msg["is_observed"] and value is not None and not isinstance(msg["fn"], _Twice):
            msg["fn"] = _Twice(msg["fn"], value)


class _Twice(dist.TorchDistribution):
    """The distribution of an observed value, whose density counts a second value as well."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: Any, other: Tensor) -> None:
        self.base, self.other = base, other
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.base.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Twice:
        return _Twice(self.base.expand(batch_shape), self.other)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        found: Tensor = self.base.sample(torch.Size(sample_shape))
        return found

    def log_prob(self, value: Tensor) -> Tensor:
        total: Tensor = self.base.log_prob(value) + self.base.log_prob(self.other.to(value))
        return total
