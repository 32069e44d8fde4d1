"""Record a bound and its gradient as one graph of plain operations, with noise as an input."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

# Operations that draw noise of a given size and have no other input.
NOISE = (torch.ops.aten.randn.default, torch.ops.aten.rand.default)
# Number of names listed in the message for a rejected graph.
NAMED = 3


class NotOneGraph(ValueError):
    """The step cannot be recorded as a graph of plain operations."""


class Source(NamedTuple):
    """A noise operation and its arguments."""

    operation: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Graph(NamedTuple):
    """A bound and its gradient as a function of flat parameters, rows and noise.

    Attributes:
        module: (parameters (P), *rows, *noise) -> bound (), gradient of minus the bound (P).
        noise: Operations that draw the noise, in the order of the eager step.
        inputs: Shape and type of the parameters and of each index tensor.
    """

    module: fx.GraphModule
    noise: tuple[Source, ...]
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    def draw(self) -> list[Tensor]:
        """Draw the noise of one step from the global generator, as the eager step does."""
        return [source.operation(*source.args, **source.kwargs) for source in self.noise]

    def key(self) -> str:
        """Digest of operations, constants, inputs and compiler settings."""
        digest = hashlib.sha256(self.module.code.encode())
        digest.update(repr(self.inputs).encode())
        for name, value in sorted(_constants(self.module).items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} {value.stride()}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        for source in self.noise:
            digest.update(repr((source.args, source.kwargs)).encode())
        words = (torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability())
        digest.update(" ".join(map(str, words)).encode())
        return digest.hexdigest()


class Bound(nn.Module):
    """A bound as a module, so that other values can replace its parameters.

    Args:
        modules: Modules that own the parameters.
        function: Function from rows of subsampled plates to the bound, a scalar.
    """

    def __init__(self, modules: Sequence[nn.Module], function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.function = function

    def forward(self, *rows: Tensor) -> Tensor:
        return self.function(*rows)

    def trained(self) -> dict[str, Tensor]:
        """Parameters that require a gradient, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def trace(bound: Bound, rows: Sequence[Tensor] = (), dtype: torch.dtype | None = None) -> Graph:
    """Record one evaluation of a bound and its gradient.

    Args:
        bound: The bound. Its parameters become the graph's first input, concatenated
            to one vector.
        rows: Example rows of subsampled plates, each (B).
        dtype: Precision of that vector; the finest of the parameters by default.

    Raises:
        NotOneGraph: The step depends on the value of a tensor, or changes a buffer.
    """
    like = bound.trained()

    def step(flat: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        parts = flat.detach().split([p.numel() for p in like.values()])
        leaves = [
            part.view(p.shape).to(p.dtype).detach().requires_grad_()
            for part, p in zip(parts, like.values(), strict=True)
        ]
        with torch.enable_grad():
            value = functional_call(bound, dict(zip(like, leaves, strict=True)), rows)
            found = torch.autograd.grad(-value, leaves, allow_unused=True)
        gradient = [
            (torch.zeros_like(x) if g is None else g).reshape(-1).to(flat.dtype)
            for x, g in zip(leaves, found, strict=True)
        ]
        return value.detach(), torch.cat(gradient)

    flat = nn.utils.parameters_to_vector(list(like.values())).detach().to(dtype)
    state = torch.get_rng_state()
    try:
        module = make_fx(step)(flat, *rows)
    except Exception as error:  # a recording can fail with many types of errors
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise NotOneGraph(words[0]) from error
    finally:
        torch.set_rng_state(state)
    module.graph.eliminate_dead_code()
    noise = _lift_noise(module)
    _refuse(module)
    module.recompile()
    return Graph(module, noise, tuple((tuple(x.shape), x.dtype) for x in (flat, *rows)))


def _lift_noise(module: fx.GraphModule) -> tuple[Source, ...]:
    """Turn the results of noise operations into inputs of the graph."""
    graph = module.graph
    found: list[Source] = []
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in NOISE and not node.all_input_nodes:
            with graph.inserting_before(first):
                given = graph.placeholder(f"noise_{len(found)}")
            given.meta = dict(node.meta)
            node.replace_all_uses_with(given)
            found.append(Source(node.target, tuple(node.args), dict(node.kwargs)))
            graph.erase_node(node)
    return tuple(found)


def _refuse(module: fx.GraphModule) -> None:
    """Reject other random operations, and changes of tensors that outlive the step."""
    random, changed = set(), set()
    for node in module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        # Attention may apply dropout, which the capture of a model rejects.
        attention = "scaled_dot_product" in str(node.target)
        if torch.Tag.nondeterministic_seeded in node.target.tags and not attention:
            random.add(str(node.target))
        first = node.args[0] if node.args else None
        if node.target._schema.is_mutable and isinstance(first, fx.Node) and first.op == "get_attr":
            changed.add(str(first.target))
    if random:
        raise NotOneGraph(f"it draws random numbers by {', '.join(sorted(random)[:NAMED])}")
    if changed:
        raise NotOneGraph("a step changes a buffer of the guide or the model")


def _constants(module: fx.GraphModule) -> Mapping[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())} | {
        name: value for name, value in vars(module).items() if isinstance(value, Tensor)
    }
