"""A guide whose depth is chosen when drawing: each prefix of its layers is a guide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from flowvi.flows import FLOWS, Base, Chain, Layer, LowRank, Triangular
from flowvi.guides.amortized import Amortised
from flowvi.guides.guide import FULL_RANK_DIM, Guide, ScoredSample, StratifiedSample
from flowvi.guides.pushforward import AffineLayer, Pushforward
from flowvi.runtime.arguments import check_choice, check_integer


class Exit(NamedTuple):
    """Draws of one prefix: z (*S, *B, D), log q (*S, *B), and the score (*S, *B, D) if asked."""

    z: Tensor
    log_q: Tensor
    score: Tensor | None


class PrefixGuide(Pushforward):
    r"""A flow of K layers with an affine layer behind each of them.

    .. math:: q_k: \quad z = A_k(f_k(\dots f_1(\epsilon))), \qquad k = 0, \dots, K

    The density of the guide is that of all layers, :math:`q_K`. Each other :math:`q_k` is a guide
    as well, which costs k layers: `prefix`; :math:`q_0` is a Gaussian. Objectives draw from all of
    them at once, by `stratified_sample`, whose draws share their noise and the work of the layers.
    With the ELBO they thus maximise the mean of the K + 1 bounds:

    .. math:: \frac{1}{K + 1} \sum_{k=0}^{K} E_{q_k}[\log p(z) - \log q_k(z)].

    Args:
        layers: The layers :math:`f_1, \dots, f_K`; without any, the guide is the Gaussian.
        affines: The layers :math:`A_0, \dots, A_K`.
        base: The density of :math:`\epsilon`; the standard normal by default.
        spec: Arguments with which `prefix_guide` makes the same guide, if it can.
    """

    kind: ClassVar[str] = "prefixes"

    def __init__(
        self,
        dim: int,
        layers: Sequence[Layer],
        affines: Sequence[AffineLayer],
        base: Base | None = None,
        spec: dict[str, Any] | None = None,
    ) -> None:
        if len(affines) != len(layers) + 1:
            raise ValueError(
                f"{len(layers)} layers need {len(layers) + 1} affine layers; got {len(affines)}."
            )
        super().__init__(dim, Chain(layers), affines[-1], base)
        self.earlier = nn.ModuleList(affines[:-1])
        self.spec = spec

    @property
    def depth(self) -> int:
        """Number of layers K."""
        return len(cast(Chain, self.flow).layers)

    def prefix(self, layers: int) -> PrefixGuide:
        """The guide of the first layers, with the same parameters: the same tensors.

        Args:
            layers: Number of layers, from 0 (a Gaussian) to K.

        Raises:
            ValueError: There are fewer layers.
        """
        layers = check_integer("layers", layers, 0)
        if layers > self.depth:
            raise ValueError(f"layers must be at most {self.depth}, the guide's; got {layers}.")
        spec = None if self.spec is None else {**self.spec, "layers": layers}
        return PrefixGuide(
            self.dim, self._layers()[:layers], self._affines()[: layers + 1], self.base, spec
        )

    def stratified_sample(
        self, shape: tuple[int, ...], context: Tensor | None = None
    ) -> StratifiedSample:
        found = list(self._exits(shape, context, scored=False))
        z, log_q = (torch.cat(parts) for parts in ([e.z for e in found], [e.log_q for e in found]))
        return StratifiedSample(z, log_q, log_q.new_full((), -math.log(len(found) * shape[0])))

    def sample_with_score(
        self, shape: tuple[int, ...], context: Tensor | None = None
    ) -> ScoredSample:
        found = list(self._exits(shape, context, scored=True))
        z, log_q = (torch.cat(parts) for parts in ([e.z for e in found], [e.log_q for e in found]))
        share = log_q.new_full((), -math.log(len(found) * shape[0]))
        return ScoredSample(z, log_q, share, torch.cat([cast(Tensor, e.score) for e in found]))

    def start(self, loc: Tensor, scale_tril: Tensor) -> None:
        for affine in self._affines():
            affine.set_(loc, scale_tril)

    def _exits(
        self, shape: tuple[int, ...], context: Tensor | None, scored: bool
    ) -> Iterator[Exit]:
        """Draws of all prefixes, from the same noise."""
        rows = () if context is None else context.shape[:-1]
        x = self.base.sample((*shape, *rows))
        log_base, flow_ladj = self.base.log_prob(x), x.new_zeros(x.shape[:-1])
        score = self.base.score(x) if scored else None
        layers: list[Layer | None] = [None, *self._layers()]
        for layer, affine in zip(layers, self._affines(), strict=True):
            if layer is not None:
                x, ladj, score = _step(layer, x, score, context)
                flow_ladj = flow_ladj + ladj
            z, ladj, end = _step(affine, x, score, context)
            # Sum in the order of `sample`, for bitwise equal results.
            yield Exit(z, log_base - (flow_ladj + ladj), end)

    def _layers(self) -> list[Layer]:
        return cast(list[Layer], list(cast(Chain, self.flow).layers))

    def _affines(self) -> list[AffineLayer]:
        return [*cast(list[AffineLayer], list(self.earlier)), self.affine]


def prefix_guide(
    dim: int,
    context_dim: int = 0,
    flow: str = "realnvp",
    sizes: Mapping[str, Any] | None = None,
    layers: int | None = None,
) -> PrefixGuide:
    """A guide whose prefixes are guides, of a flow by name.

    Args:
        dim: Length D of the latent vector.
        context_dim: Length C of the context; 0 for an unconditional guide.
        flow: Row of `FLOWS` that is made of layers.
        sizes: Of the flow, such as its depth.
        layers: Only the first so many layers; all by default.

    Raises:
        ValueError: There is no such flow, or it is one layer.
    """
    check_choice("flow", flow, FLOWS)
    if flow not in LAYERED:
        raise ValueError(
            f"The flow '{flow}' is not made of layers, so it has no prefixes: take one of "
            f"{', '.join(LAYERED)}."
        )
    parts = layers_of(FLOWS[flow](dim, context_dim, **(sizes or {})))
    affine = Triangular if dim <= FULL_RANK_DIM else LowRank
    affines = [affine(dim, context_dim) for _ in range(len(parts) + 1)]
    spec = {"flow": flow, "sizes": dict(sizes or {})}
    made = PrefixGuide(dim, parts, affines, spec=spec)
    return made if layers is None else made.prefix(layers)


# Flows that are made of layers.
LAYERED = (
    *("glow", "iaf", "maf", "marginals", "naf", "nice", "nsf_autoregressive", "nsf_coupling"),
    *("planar", "radial", "realnvp", "realnvp_clamped", "spline", "sylvester"),
    *("sylvester_householder", "sylvester_triangular"),
)


def layers_of(flow: Layer) -> list[Layer]:
    """The layers of a composed flow, each with what follows it: an order, or scales.

    A layer begins at each member of the class that the first one has.

    Args:
        flow: A row of `LAYERED`: its first member begins a layer.
    """
    members = _members(flow)
    starts = [i for i, m in enumerate(members) if type(m) is type(members[0])]
    ends = [*starts[1:], len(members)]
    return [Chain(members[i:j]) for i, j in zip(starts, ends, strict=True)]


def prefix_of(guide: Guide, layers: int) -> Guide:
    """The guide of the first layers of a guide that was made for it.

    Args:
        guide: A `PrefixGuide`, or one that reads rows.
        layers: Number of layers, from 0.

    Raises:
        ValueError: The guide has no prefixes, or fewer layers.
    """
    if isinstance(guide, Amortised):
        return Amortised(guide.encoder, prefix_of(guide.guide, layers))
    if not isinstance(guide, PrefixGuide):
        raise ValueError(
            f"layers chooses a prefix of a guide whose prefixes were trained; {_named(guide)} was "
            "trained as a whole. Fit one with guide=flowvi.Prefixes('realnvp')."
        )
    return guide.prefix(layers)


def depth_of(guide: Guide) -> int:
    """Number of layers of a guide that was made for prefixes; an error as of `prefix_of`."""
    whole = prefix_of(guide, 0)
    inner = guide.guide if isinstance(whole, Amortised) and isinstance(guide, Amortised) else guide
    return cast(PrefixGuide, inner).depth


def _members(layer: Layer) -> list[Layer]:
    """The layers of nested chains, in their order."""
    if not isinstance(layer, Chain):
        return [layer]
    return [m for part in layer.layers for m in _members(cast(Layer, part))]


def _step(
    layer: Layer, x: Tensor, score: Tensor | None, context: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if score is None:
        return *layer(x, context), None
    return layer.push(x, score, context)


def _named(guide: Guide) -> str:
    return f"a {guide.kind} guide" if guide.kind else f"a {type(guide).__name__}"
