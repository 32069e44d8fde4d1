"""A log density as a quadratic function of a field, and terms of single latents."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from flowvi.runtime.rng import isolated_rng
from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.recording.batched import silence_vmap_fallback
from flowvi.targets.structure.probe import FAR, SAME
from flowvi.targets.structure.structure import Structure
from flowvi.targets.structure.terms import Terms

# Points at which the rest is compared with a quadratic function, and the size of the directions.
PLACES, WIDE = 3, (0.5, FAR)
# Largest third difference of a quadratic function, relative to its values.
ROUNDING = 1e-8
# Numbers of the local terms that stay in a processor's cache.
AT_ONCE = 400_000
# Numbers of the precision matrices of one evaluation.
MATRICES = 400_000


class Local(NamedTuple):
    """Sum of the terms of single latents, and derivatives by each latent.

    Attributes:
        value: Their sum, (M).
        first: Derivative by each latent, (M, N).
        second: Second derivative by each latent, (M, N); None if not asked for.
    """

    value: Tensor
    first: Tensor
    second: Tensor | None = None


class Rest(NamedTuple):
    """The quadratic part at values of theta: R(u + v) = value + slope v - v^T precision v / 2.

    Attributes:
        value: At u, (S).
        slope: Its gradient at u, (S, N).
        precision: Its negative Hessian, (S, N, N).
    """

    value: Tensor
    slope: Tensor
    precision: Tensor

    def at(self, v: Tensor) -> Rest:
        """The same function around u + v. (S, N) -> Rest."""
        product = torch.einsum("sij,sj->si", self.precision, v)
        value = self.value + ((self.slope - 0.5 * product) * v).sum(-1)
        return Rest(value, self.slope - product, self.precision)


class LocalTerms:
    r"""log p(theta, u) = R(theta, u) + sum_k l_k(theta, u_k), with R quadratic in u.

    A normal prior with data of single latents. The terms of the log density are told apart by
    moving latents; that the rest is quadratic is tested by third differences.

    Args:
        target: The log density.
        structure: Its structure, a field.

    Raises:
        TypeError: The log density has no such form.
    """

    def __init__(self, target: GlobalTarget, structure: Structure) -> None:
        self.target = target
        self.columns = structure.columns[0].to(target.device)
        generator = torch.Generator(target.device).manual_seed(0)
        with isolated_rng():
            points = target.starts(generator).to(target.dtype)[:PLACES]
        terms = Terms(target.density.batched, (points[0], *target._behind))
        graph = terms.module
        split = _split_inputs(graph, target.dim, set(structure.shared.tolist()))
        vectors = next(n for n in split.graph.nodes if n.op == "output").args[0]
        every = _Graph(split, range(len(vectors)))
        local = self._local_vectors(every, points[:1])
        rest = [i for i in range(len(vectors)) if i not in local]
        if not local or not rest:
            raise TypeError("no terms of single latents beside others")
        self._local, self._rest = _Graph(split, local), _Graph(split, rest)
        self._check_quadratic(points, generator)

    def evaluate(self, theta: Tensor, u: Tensor, second: bool = False) -> Local:
        """Terms of single latents. Points (M, D) or (1, D), (M, N) -> (M), (M, N), (M, N)."""
        size = max(1, AT_ONCE // u.shape[-1])
        if len(u) > size:
            one = len(theta) == 1
            parts = [
                self.evaluate(theta if one else theta[i : i + size], u[i : i + size], second)
                for i in range(0, len(u), size)
            ]
            values, firsts, seconds = zip(*parts, strict=True)
            curvature = torch.cat(seconds) if second else None
            return Local(torch.cat(values), torch.cat(firsts), curvature)
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = self._evaluate(self._local, theta, u)
            (first,) = torch.autograd.grad(value.sum(), u, create_graph=second)
            if not second:
                return Local(value.detach(), first)
            twice = torch.zeros_like(u)
            if first.requires_grad:
                (twice,) = torch.autograd.grad(first.sum(), u)
        return Local(value.detach(), first.detach(), twice)

    def rest(self, theta: Tensor, u: Tensor) -> Rest:
        """The quadratic part around u. Points (S, D), (S, N)."""
        size = max(1, MATRICES // u.shape[-1] ** 2)
        pairs = zip(theta.split(size), u.split(size), strict=True)
        parts = [self._rest_of_some(*pair) for pair in pairs]
        return Rest(*(torch.cat(some) for some in zip(*parts, strict=True)))

    def _rest_of_some(self, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = u.shape[-1]
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = self._evaluate(self._rest, theta, u)
            (slope,) = torch.autograd.grad(value.sum(), u, create_graph=True)
            probes = torch.eye(count, dtype=u.dtype, device=u.device).unsqueeze(1)
            (hessian,) = torch.autograd.grad(
                slope, u, probes.expand(-1, len(u), -1), is_grads_batched=True
            )
        hessian = hessian.movedim(0, 1)
        precision = -0.5 * (hessian + hessian.mT)
        return value.detach(), slope.detach(), precision

    def _evaluate(self, graph: _Graph, theta: Tensor, u: Tensor) -> Tensor:
        """Sum of some terms, (M). Points (M, D) or (1, D), (M, N)."""
        behind = self.target._behind
        index = self.columns.expand(len(u), -1)
        base = theta.detach() if len(theta) == len(u) else theta.detach().expand(len(u), -1)
        z = base.scatter(1, index, u)
        if len(theta) == 1:
            return graph(theta[0].detach(), z, behind, shared=True)
        return graph(theta.detach(), z, behind, shared=False)

    def _local_vectors(self, graph: _Graph, points: Tensor) -> list[int]:
        """Vectors whose elements depend on one latent each; some do, and none on several."""
        count = len(self.columns)
        near, far = points[0].clone(), points[0].clone()
        generator = torch.Generator(points.device).manual_seed(1)
        options: dict[str, Any] = {"generator": generator, "dtype": points.dtype}
        options["device"] = points.device
        near[self.columns] += 0.1 * torch.randn(count, **options)
        far[self.columns] += torch.randn(count, **options)
        with torch.no_grad():
            before = graph.elements(near, self.target._behind)
            sizes = [len(one) for one in before]
            whole = torch.cat(before)
            ever = torch.zeros(len(whole), dtype=torch.bool)
            several = torch.zeros(len(whole), dtype=torch.bool)
            number = torch.arange(count)
            for digit in range(max(1, math.ceil(math.log2(count)))):
                moved = []
                for on in (1, 0):
                    half = self.columns[(number >> digit) % 2 == on]
                    z = near.clone()
                    z[half] = far[half]
                    after = torch.cat(graph.elements(z, self.target._behind))
                    change = (after - whole).abs() > SAME * whole.abs().clamp(min=1.0)
                    moved.append((change | (after.isfinite() != whole.isfinite())).cpu())
                several |= moved[0] & moved[1]
                ever |= moved[0] | moved[1]
        parts = zip(several.split(sizes), ever.split(sizes), strict=True)
        return [i for i, (some, any_) in enumerate(parts) if any_.any() and not some.any()]

    def _check_quadratic(self, points: Tensor, generator: torch.Generator) -> None:
        """Compare the rest with a quadratic function along random lines, near and far."""
        for point in points:
            for wide in WIDE:
                way = wide * torch.randn(
                    len(self.columns), generator=generator, dtype=point.dtype, device=point.device
                )
                u = point[self.columns] + torch.arange(-1, 3).to(way)[:, None] * way
                with torch.no_grad():
                    a, b, c, d = self._evaluate(self._rest, point[None], u)
                scale = max(1.0, *(abs(float(x)) for x in (a, b, c, d)))
                if not abs(float(d - 3 * c + 3 * b - a)) < ROUNDING * scale:
                    raise TypeError("the rest of the log density is not quadratic")


class _Graph:
    """Some vectors of terms, with the shared latents as an input of their own.

    Args:
        module: Graph of two points (D), theta's and u's, whose outputs are vectors.
        chosen: Numbers of the vectors.
    """

    def __init__(self, module: fx.GraphModule, chosen: Any) -> None:
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(module.graph, copied)
        (output,) = (node for node in module.graph.nodes if node.op == "output")
        graph.output(tuple(copied[output.args[0][i]] for i in chosen))
        for node in reversed(list(graph.nodes)):
            if node.op == "call_function" and not node.users:
                graph.erase_node(node)
        self.module = fx.GraphModule(module, graph)

    def elements(self, z: Tensor, behind: list[Tensor]) -> list[Tensor]:
        """Vectors of terms at one point, (D) -> (T_1), ..."""
        return list(self.module(z, z, *behind))

    def __call__(self, theta: Tensor, z: Tensor, behind: list[Tensor], shared: bool) -> Tensor:
        """Sum of the terms at points: theta (D) if shared, else (M, D), and z (M, D) -> (M)."""

        def total(theta: Tensor, z: Tensor, *inputs: Tensor) -> Tensor:
            return sum((part.sum() for part in self.module(theta, z, *inputs)), z.new_zeros(()))

        dims = (None if shared else 0, 0, *(None for _ in behind))
        with silence_vmap_fallback():
            found: Tensor = torch.func.vmap(total, in_dims=dims, randomness="same")(
                theta, z, *behind
            )
        return found


def _split_inputs(module: fx.GraphModule, dim: int, shared: set[int]) -> fx.GraphModule:
    """The graph with two points as inputs: the first for nodes that read shared latents only."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    value = graph.graph_copy(module.graph, copied)
    graph.output(value)
    z = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_before(z):
        theta = graph.placeholder("theta")
    places = torch.arange(dim, dtype=torch.float64)
    for node in list(z.users):
        if node.args[:1] == (z,) and all(not isinstance(a, fx.Node) for a in node.args[1:]):
            read = [node.target(places + i * dim, *node.args[1:], **node.kwargs) for i in (0, 1)]
            if not all(isinstance(one, Tensor) for one in read):
                continue
            fixed = bool((read[0] == read[1]).all())
            columns = bool((read[1] - read[0] == dim).all())
            if fixed or (columns and set(read[0].long().flatten().tolist()) <= shared):
                node.replace_input_with(z, theta)
    return fx.GraphModule(module, graph)
