"""The same families in other libraries, at the depths and widths of `flowvi.flows`.

Networks have two hidden layers of 64 units. They have SiLU, as ours do, where it
can be asked for: not in Pyro, whose builders choose ReLU. The smallest residual
network of normflows' splines has three layers. Pyro's masked networks must be as wide as
the vector is long, so they are left out for D > 64. Splines have 8 bins. All act in the
direction base -> target, but for zuko, which is told to go backwards where its
other direction is the fast one.
"""

# The libraries are imported where they are used: zuko changes torch when it is imported.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

Map = Callable[[Tensor], tuple[Tensor, Tensor]]
Built = tuple[nn.Module, Map]
HIDDEN = (64, 64)
BINS = 8
NETWORK: dict[str, Any] = {"hidden_features": HIDDEN, "activation": nn.SiLU}


def _pyro(make: Callable[[Any, int], list[Any]]) -> Callable[[int], Built]:
    def build(dim: int) -> Built:
        import pyro.distributions.transforms as T

        transforms = make(T, dim)

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            total = x.new_zeros(x.shape[:-1])
            for transform in transforms:
                y = transform(x)
                ladj = transform.log_abs_det_jacobian(x, y)
                total = total + (ladj if transform.domain.event_dim else ladj.sum(-1))
                x = y
            return x, total

        return nn.ModuleList(t for t in transforms if isinstance(t, nn.Module)), forward

    return build


def _flipped(T: Any, dim: int, depth: int, layer: Callable[[], Any]) -> list[Any]:
    order = torch.arange(dim).flip(0)
    return [m for _ in range(depth) for m in (layer(), T.Permute(order))]


def _pyro_iaf(T: Any, dim: int) -> list[Any]:
    return _flipped(T, dim, 4, lambda: T.affine_autoregressive(dim, list(HIDDEN)))


PYRO = {
    "planar": _pyro(lambda T, dim: [T.planar(dim) for _ in range(8)]),
    "radial": _pyro(lambda T, dim: [T.radial(dim) for _ in range(8)]),
    "householder": _pyro(lambda T, dim: [T.householder(dim, 8)]),
    "sylvester_householder": _pyro(lambda T, dim: [T.sylvester(dim, 8) for _ in range(4)]),
    "spline": _pyro(lambda T, dim: [T.Spline(dim, BINS, 5.0, "quadratic")]),
    "realnvp": _pyro(
        lambda T, dim: _flipped(T, dim, 8, lambda: T.affine_coupling(dim, list(HIDDEN)))
    ),
    "iaf": _pyro(_pyro_iaf),
    "maf": _pyro(lambda T, dim: [t.inv for t in _pyro_iaf(T, dim)]),
    "naf": _pyro(
        lambda T, dim: _flipped(
            T, dim, 2, lambda: T.neural_autoregressive(dim, list(HIDDEN), width=BINS)
        )
    ),
    "nsf_coupling": _pyro(
        lambda T, dim: _flipped(
            T, dim, 4, lambda: T.spline_coupling(dim, dim // 2, list(HIDDEN), BINS, 5.0)
        )
    ),
    "nsf_autoregressive": _pyro(
        lambda T, dim: _flipped(
            T, dim, 2, lambda: T.spline_autoregressive(dim, list(HIDDEN), BINS, 5.0)
        )
    ),
}


def _zuko(make: Callable[[Any, int], Any], backwards: bool = False) -> Callable[[int], Built]:
    def build(dim: int) -> Built:
        import zuko

        module = make(zuko, dim)
        lazy = getattr(module, "transform", module)

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            transform = lazy()
            found: tuple[Tensor, Tensor] = (
                transform.inv if backwards else transform
            ).call_and_ladj(x)
            return found

        return module, forward

    return build


def _zuko_coupling(zuko: Any, dim: int, depth: int, **univariate: Any) -> Any:
    return zuko.flows.NICE(dim, transforms=depth, **NETWORK, **univariate)


def _rational(zuko: Any) -> dict[str, Any]:
    return {
        "univariate": zuko.transforms.MonotonicRQSTransform,
        "shapes": [(BINS,), (BINS,), (BINS - 1,)],
    }


ZUKO = {
    "spline": _zuko(lambda z, dim: z.flows.ElementWiseTransform(dim, **_rational(z))),
    "nice": _zuko(
        lambda z, dim: _zuko_coupling(
            z, dim, 8, univariate=z.transforms.AdditiveTransform, shapes=[()]
        )
    ),
    "realnvp": _zuko(lambda z, dim: _zuko_coupling(z, dim, 8)),
    "iaf": _zuko(lambda z, dim: z.flows.MAF(dim, transforms=4, **NETWORK)),
    "maf": _zuko(lambda z, dim: z.flows.MAF(dim, transforms=4, **NETWORK), True),
    "naf": _zuko(
        lambda z, dim: z.flows.NAF(
            dim, transforms=2, signal=BINS, network={"hidden_features": (BINS,)}, **NETWORK
        )
    ),
    "nsf_coupling": _zuko(lambda z, dim: _zuko_coupling(z, dim, 4, **_rational(z))),
    "nsf_autoregressive": _zuko(
        lambda z, dim: z.flows.NSF(dim, bins=BINS, transforms=2, **NETWORK)
    ),
    "ffjord": _zuko(lambda z, dim: z.flows.CNF(dim, exact=True, **NETWORK)),
}


def _normflows(make: Callable[[Any, int], list[nn.Module]]) -> Callable[[int], Built]:
    def build(dim: int) -> Built:
        import normflows

        layers = make(normflows, dim)

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            total = x.new_zeros(x.shape[:-1])
            for layer in layers:
                x, ladj = layer(x)
                total = total + ladj
            return x, total

        return nn.ModuleList(layers), forward

    return build


def _halves(nf: Any, dim: int, scale: bool) -> list[nn.Module]:
    outputs = (dim // 2) * (2 if scale else 1)
    sizes = [dim - dim // 2, *HIDDEN]
    hidden = [m for pair in zip(sizes, HIDDEN, strict=False) for m in (nn.Linear(*pair), nn.SiLU())]
    network = nn.Sequential(*hidden, nn.Linear(HIDDEN[-1], outputs))
    return [nf.flows.AffineCouplingBlock(network, scale=scale), nf.flows.Permute(dim, mode="swap")]


def _masked(nf: Any, dim: int) -> list[nn.Module]:
    layer = nf.flows.MaskedAffineAutoregressive
    masked = layer(dim, HIDDEN[0], None, 1, use_residual_blocks=False, activation=silu)
    return [masked, nf.flows.Permute(dim, mode="swap")]


def _glow(nf: Any, dim: int) -> list[nn.Module]:
    coupling = _halves(nf, dim, True)[0]
    return [coupling, nf.flows.InvertibleAffine(dim), nf.flows.ActNorm((dim,))]


def _spline(nf: Any, dim: int) -> nn.Module:
    layer: nn.Module = nf.flows.CoupledRationalQuadraticSpline(
        dim, 1, HIDDEN[0], num_bins=BINS, tail_bound=5.0, activation=nn.SiLU
    )
    return layer


def _swapped(nf: Any, dim: int, depth: int, layer: Callable[[], nn.Module]) -> list[nn.Module]:
    return [m for _ in range(depth) for m in (layer(), nf.flows.Permute(dim, mode="swap"))]


NORMFLOWS = {
    "affine_diagonal": _normflows(lambda nf, dim: [nf.flows.AffineConstFlow((dim,))]),
    "planar": _normflows(lambda nf, dim: [nf.flows.Planar((dim,)) for _ in range(8)]),
    "radial": _normflows(lambda nf, dim: [nf.flows.Radial((dim,)) for _ in range(8)]),
    "nice": _normflows(lambda nf, dim: [m for _ in range(8) for m in _halves(nf, dim, False)]),
    "realnvp": _normflows(lambda nf, dim: [m for _ in range(8) for m in _halves(nf, dim, True)]),
    "iaf": _normflows(lambda nf, dim: [m for _ in range(4) for m in _masked(nf, dim)]),
    "glow": _normflows(lambda nf, dim: [m for _ in range(8) for m in _glow(nf, dim)]),
    "nsf_coupling": _normflows(lambda nf, dim: _swapped(nf, dim, 4, lambda: _spline(nf, dim))),
}
BUILD: dict[str, dict[str, Callable[[int], Built]]] = {
    "pyro": PYRO,
    "zuko": ZUKO,
    "normflows": NORMFLOWS,
}


def has(library: str, family: str, dim: int) -> bool:
    """Whether a library has the family at this size."""
    narrow = library == "pyro" and family in ("iaf", "maf", "naf", "nsf_autoregressive")
    return family in BUILD[library] and not (narrow and dim > HIDDEN[0])
