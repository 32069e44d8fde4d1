from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A model with its arguments.

    Args:
        model: A Pyro model.
        args: Positional arguments.
        kwargs: Keyword arguments.
        twin: A model with the same density that Pyro itself can score, where it cannot score
            this one (NaN behind a mask, say).
        enumerated: Whether discrete latents are summed out.
        simulates: Whether Pyro can draw from it.
        params: Whether it has parameters of its own.
        rows: Whether each row of the data has a log likelihood of its own.
        twice: Whether its gradient is the slope of its value, and torch can differentiate that.
        holds: Whether it holds tensors of the default precision, such as the weights of a network,
            from before it runs; it cannot run in another one then.
        how: The way in which its density is expected to be evaluated.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    twin: Callable[..., Any] | None = None
    enumerated: bool = False
    simulates: bool = True
    params: bool = False
    rows: bool = True
    twice: bool = True
    holds: bool = False
    how: str = "tape"


class Family(dict[str, Callable[[], Case]]):
    """Registry of models: name -> function that builds the case."""

    def __call__(self, build: Callable[[], Case]) -> Callable[[], Case]:
        self[build.__name__] = build
        return build
