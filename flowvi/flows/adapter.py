"""Transforms of torch and Pyro as layers, without their caches."""

from collections.abc import Iterator
from typing import Any, cast

from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from flowvi.flows.layer import Layer


class FromTransform(Layer):
    r"""Any bijective transform of R^D from torch or Pyro, conditional ones included.

    Such transforms remember their last input and output, and some their last
    log determinant: the value that comes back is right, the graph behind it may
    belong to another call, and with it a wrong gradient. Here everything is
    forgotten before and after each use. Scoring costs an evaluation in each
    direction.

    A transform that cannot be inverted gives a flow that can be sampled, with
    ``gradient="total"``, but cannot score points from elsewhere. How fresh
    transforms start is up to their authors; Pyro's are not the identity.

    Args:
        transform: The transform. Its parameters are trained if it is a
            module; a plain transform with tensors inside keeps its dtype.
    """

    def __init__(self, transform: Transform | ConditionalTransform) -> None:
        super().__init__()
        self.transform = transform
        if isinstance(transform, Transform):
            _check(transform)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _evaluate(self._conditioned(context), x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        transform = self._conditioned(context)
        try:
            x = transform.inv(y)
        except (KeyError, NotImplementedError) as error:
            name = type(transform).__name__
            raise NotImplementedError(f"{name} has no inverse; use gradient='total'.") from error
        return x, -_evaluate(transform, x)[1]

    def _conditioned(self, context: Tensor | None) -> Transform:
        transform: Any = self.transform
        if isinstance(transform, ConditionalTransform):
            if context is None:
                raise ValueError("This flow is conditional: pass context=, a tensor (*B, C).")
            transform = transform.condition(context)
        _forget(transform)
        return cast(Transform, transform)


def _evaluate(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log determinant, without the cache of the transform."""
    _forget(transform)
    y = transform(x)
    # Some transforms compute their log determinant from values cached by the last call.
    ladj = transform.log_abs_det_jacobian(x, y)
    # A cached tensor with an autograd graph would prevent copies of the module.
    _forget(transform)
    return y, ladj if transform.domain.event_dim else ladj.sum(-1)


def _check(transform: Transform) -> None:
    name = type(transform).__name__
    if not transform.bijective:
        raise ValueError(f"{name} is not a bijection; a flow maps R^D to R^D, one to one.")
    for side, space in (("from", transform.domain), ("to", transform.codomain)):
        line = getattr(space, "base_constraint", space)
        if line is not constraints.real or space.event_dim > 1:
            raise ValueError(
                f"{name} maps {side} {space}; a flow maps vectors of R^D to vectors of R^D."
            )


def _forget(transform: Transform) -> None:
    """Empty the caches of a transform and of every transform inside it."""
    for part in _inside(transform, set()):
        for key in vars(part):
            if key == "_cached_x_y":
                part._cached_x_y = None, None
            elif key.startswith("_cache") and key != "_cache_size":
                setattr(part, key, None)


def _inside(transform: Transform, seen: set[int]) -> Iterator[Transform]:
    seen.add(id(transform))
    yield transform
    values = [*vars(transform).values()]
    if isinstance(transform, nn.Module):
        values += transform.children()
    for value in values:
        for part in value if isinstance(value, list | tuple) else [value]:
            # A transform and its inverse refer to each other.
            if isinstance(part, Transform) and id(part) not in seen:
                yield from _inside(part, seen)
