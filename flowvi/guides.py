"""Guides: densities on R^D that can be sampled and scored."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from flowvi.arguments import given, unknown, whole
from flowvi.flows import (
    BASES,
    FLOWS,
    Base,
    Chain,
    Diagonal,
    InSingle,
    Kronecker,
    Layer,
    LowRank,
    Normal,
    SinhArcsinh,
    Triangular,
)
from flowvi.flows.nets import Amortised

# Beyond so many dimensions a matrix of D x D is too much.
FULL_RANK_DIM = 2000
# And beyond so many, a fit of more than a Gaussian leaves the matrix as it found it: each of its
# numbers would move by Adam's step size, whatever its gradient, which adds up to nats.
HELD_DIM = 300

Affine = Diagonal | Triangular | LowRank | Kronecker
# Points (*S, D) to log densities (*S).
LogDensity = Callable[[Tensor], Tensor]


class Draw(NamedTuple):
    """Samples z, (*S, *B, D), and their log density under the guide, (*S, *B)."""

    z: Tensor
    log_q: Tensor


class Strata(NamedTuple):
    """The same number of samples from every part of a guide, one part after the other.

    Attributes:
        z: Samples, (N, *S, *B, D), N the number of parts times the draws of each.
        log_q: Log density under the whole guide, (N, *S, *B).
        log_share: Log of what each draw counts in an average over the guide,
            broadcastable to (N, *S, *B); the shares add up to one over N.
    """

    z: Tensor
    log_q: Tensor
    log_share: Tensor


class Scored(NamedTuple):
    """Strata with the score of the guide at its own draws.

    Attributes:
        z: As in `Strata`; for a joint guide, the other variables stand behind z.
        log_q: As in `Strata`; for a joint guide, that of all variables.
        log_share: As in `Strata`.
        score: Gradient of log q at z, (N, *S, *B, D): a constant, as if parameters and
            context did not depend on anything.
    """

    z: Tensor
    log_q: Tensor
    log_share: Tensor
    score: Tensor


class Guide(nn.Module):
    """A density q(z | context) on R^D.

    Attributes:
        dim: Length D of z.
        pathwise: Whether the gradient of an average over draws is that of the draws.
        flat: Whether `start` makes no use of correlations: of a Gaussian, the scales are enough.
        joint: Whether z is drawn with other variables, so that its own density is an integral.
        kind: What `make_guide` calls such guides, where they can be made again by name.
        spec: The sizes with which it makes this one, if it can.
    """

    dim: int
    pathwise: ClassVar[bool] = True
    flat: bool = False
    joint: ClassVar[bool] = False
    kind: ClassVar[str] = ""
    spec: dict[str, Any] | None = None

    def sample(self, shape: tuple[int, ...], context: Tensor | None = None) -> Draw:
        """Draw `shape` reparameterised samples for every row of the context."""
        raise NotImplementedError

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Score samples. (*S, *B, D) -> (*S, *B)."""
        raise NotImplementedError

    def strata(self, shape: tuple[int, ...], context: Tensor | None = None) -> Strata:
        """Draw `shape` samples from every part of the guide; a plain guide is one part."""
        z, log_q = self.sample(shape, context)
        return Strata(z, log_q, log_q.new_full((), -math.log(shape[0])))

    def scored(self, shape: tuple[int, ...], context: Tensor | None = None) -> Scored:
        """Draw as `strata` does, and differentiate log q at the draws, for path gradients."""
        z, log_q, log_share = self.strata(shape, context)
        with torch.enable_grad():
            fixed = z.detach().requires_grad_()
            log_prob = self.log_prob(fixed, None if context is None else context.detach())
            (score,) = torch.autograd.grad(log_prob.sum(), fixed)
        return Scored(z, log_q, log_share, score)

    def lifted(self, log_p: LogDensity) -> LogDensity:
        """The density to compare the draws of `scored` with: of z, and of what is behind it."""
        return log_p

    def skip(self, shape: tuple[int, ...]) -> None:
        """Take the random numbers of `strata` and `scored` from the generator, and no draws."""
        with torch.no_grad():
            self.strata(shape)

    def log_part(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log density of the part that each draw of `strata` came from, less the whole's."""
        return z.new_zeros(())

    def in_single(self) -> "Guide | None":
        """A copy of a guide in double precision that does in single what loses nothing by it.

        Its parameters are those of the guide, in the same order. None if there is nothing
        like that.
        """
        return None

    def start(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Become the Gaussian N(loc, L L^T), or the nearest one that the guide can be.

        Args:
            loc: Mean, (D).
            scale_tril: Lower triangular L with a positive diagonal, (D, D).
        """
        raise NotImplementedError


class Pushforward(Guide):
    """Base noise pushed through a flow and then through an affine layer.

    Abstract: a guide of this kind adds nothing but its choice of layers.
    """

    def __init__(self, dim: int, flow: Layer, affine: Affine, base: Base | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.base = Normal(dim) if base is None else base
        self.flow = flow
        self.affine = affine

    def sample(self, shape: tuple[int, ...], context: Tensor | None = None) -> Draw:
        rows = () if context is None else context.shape[:-1]
        eps = self.base.sample((*shape, *rows))
        z, ladj = self.transport(eps, context)
        return Draw(z, self.base.log_prob(eps) - ladj)

    def transport(self, eps: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map base noise to z. (..., D) -> (..., D), log|det dz/deps| (...)."""
        y, flow_ladj = self.flow(eps, context)
        z, affine_ladj = self.affine(y, context)
        return z, flow_ladj + affine_ladj

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        if z.shape[-1] != self.dim:
            raise ValueError(f"z has {z.shape[-1]} columns but the guide has D = {self.dim}.")
        y, affine_ladj = self.affine.inverse(z, context)
        eps, flow_ladj = self.flow.inverse(y, context)
        return self.base.log_prob(eps) + flow_ladj + affine_ladj

    def scored(self, shape: tuple[int, ...], context: Tensor | None = None) -> Scored:
        rows = () if context is None else context.shape[:-1]
        eps = self.base.sample((*shape, *rows))
        y, flow_ladj, score = self.flow.push(eps, self.base.score(eps), context)
        z, affine_ladj, score = self.affine.push(y, score, context)
        # In the order of `sample`, so that both give the same bits.
        log_q = self.base.log_prob(eps) - (flow_ladj + affine_ladj)
        return Scored(z, log_q, log_q.new_full((), -math.log(shape[0])), score)

    def skip(self, shape: tuple[int, ...]) -> None:
        self.base.sample(shape)

    def start(self, loc: Tensor, scale_tril: Tensor) -> None:
        self.affine.set_(loc, scale_tril)


class MeanField(Pushforward):
    """A Gaussian with independent coordinates.

    `start` takes the diagonal Gaussian nearest in KL(q || p), which is narrower
    than the marginals of a correlated one.

    Args:
        dim: Length D of the latent vector.
        context_dim: Length C of the context that mean and scales depend on; 0 for none.
    """

    flat = True

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim, Chain([]), Diagonal(dim, context_dim))


class FullRank(Pushforward):
    """A Gaussian with a full covariance matrix.

    Args:
        dim: Length D of the latent vector.
        context_dim: Length C of the context that mean and scales depend on; 0 for none.
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim, Chain([]), Triangular(dim, context_dim))


class LowRankNormal(Pushforward):
    """A Gaussian whose covariance is a diagonal plus a matrix of low rank.

    Args:
        dim: Length D of the latent vector.
        context_dim: Length C of the context that it depends on; 0 for none.
        rank: Rank R of the matrix.
    """

    flat = True

    def __init__(self, dim: int, context_dim: int = 0, rank: int = 8) -> None:
        super().__init__(dim, Chain([]), LowRank(dim, context_dim, rank))


class KroneckerNormal(Pushforward):
    """A Gaussian of a matrix whose rows and columns are correlated.

    Args:
        dim: Length D of the latent vector, the matrix row by row.
        context_dim: Length C of the context that its mean depends on; 0 for none.
        rows: Number of rows of the matrix.
    """

    flat = True

    def __init__(self, dim: int, context_dim: int = 0, rows: int | None = None) -> None:
        super().__init__(dim, Chain([]), Kronecker(dim, context_dim, rows))


class SkewedNormal(Pushforward):
    r"""A normal that is skewed, coordinate by coordinate, before and after these are mixed.

    .. math:: z = m + \sigma \odot S_2(R \, S_1(\epsilon))

    with sinh-arcsinh maps :math:`S_i` of each coordinate and a lower triangular R, of low rank
    beyond D = 2000. :math:`S_2` alone is a Gaussian copula with marginals of its own;
    :math:`S_1` skews what is left of each coordinate given those before it. Beside the normal
    that it starts at it trains 8 D numbers: a guide for posteriors of hundreds of dimensions,
    each a little skewed, where the networks of a flow have far too many. Up to D = 300, R is
    trained too. With a depth, so many couplings come before :math:`S_1`.

    Args:
        dim: Length D of the latent vector.
        context_dim: Length C of the context that all but R depend on; 0 for none.
        depth: Number of couplings.

    Raises:
        ValueError: The depth is no whole number from 0 on.
    """

    def __init__(self, dim: int, context_dim: int = 0, depth: int = 0) -> None:
        inner: Triangular | LowRank
        if dim <= FULL_RANK_DIM:
            inner = Triangular(dim, context_dim, held=dim > HELD_DIM)
        else:
            inner = LowRank(dim, context_dim)
        skews = [SinhArcsinh(dim, context_dim) for _ in range(2)]
        depth = whole("depth", depth, 0)
        couplings = [FLOWS["realnvp"](dim, context_dim, depth)] if depth else []
        flow = Chain([*couplings, skews[0], inner, skews[1]])
        super().__init__(dim, flow, Diagonal(dim, context_dim))

    def in_single(self) -> Guide | None:
        layers = cast(Chain, self.flow).layers
        inner = None if len(layers) < 4 else _in_single(cast(Layer, layers[0]))
        if inner is None:
            return None
        new = copy.deepcopy(self)
        cast(Chain, new.flow).layers[0] = inner
        return new

    def start(self, loc: Tensor, scale_tril: Tensor) -> None:
        flat = scale_tril.dim() == 1
        widths = scale_tril if flat else scale_tril.norm(dim=1)
        unit = torch.ones_like(widths) if flat else scale_tril / widths[:, None]
        inner = cast(Triangular, cast(Chain, self.flow).layers[-2])
        inner.set_(torch.zeros_like(loc), unit)
        self.affine.set_(loc, widths)


class FlowGuide(Pushforward):
    """Base noise pushed through a flow and then through an affine layer.

    The flow works in coordinates in which the target is about standard: `start`
    sets the affine layer and leaves the flow as it is, which is the identity as
    long as the guide is fresh.

    Args:
        dim: Length D of the latent vector.
        flow: Layer mapping R^D to R^D.
        affine: The layer after it; a triangular one by default.
        base: The density before it; the standard normal by default.
    """

    def __init__(
        self,
        dim: int,
        flow: Layer,
        affine: Affine | None = None,
        base: Base | None = None,
    ) -> None:
        super().__init__(dim, flow, Triangular(dim) if affine is None else affine, base)

    def in_single(self) -> Guide | None:
        # A guide derived from this one may look inside of its flow.
        inner = _in_single(self.flow) if type(self) is FlowGuide else None
        if inner is None:
            return None
        new = copy.deepcopy(self)
        new.flow = inner
        return new


class MixtureGuide(Guide):
    r"""A mixture of guides, for posteriors with several modes.

    .. math:: q(z) = \sum_m \pi_m q_m(z), \qquad \pi = \mathrm{softmax}(\lambda)

    The density is exact. `sample` picks a component for each draw, so what it
    returns has no gradient with respect to the weights. Objectives draw from
    every component instead, by `strata`: an average over the guide is then
    :math:`\sum_m \pi_m E_{q_m}[\cdot]`, in which the weights stand openly.
    Scoring the draws of all M components takes M^2 calls of a component.

    Args:
        components: The M guides, all of one D and one context.
        logits: Weights :math:`\lambda` at the start, (M); equal by default.
        context_dim: Length C of the context that the weights depend on; 0 for none.

    References:
        Morningstar et al. (2021), "Automatic Differentiation Variational
        Inference with Mixtures", arXiv:2003.01687: stratified bounds.
        Roeder, Wu and Duvenaud (2017), arXiv:1703.09194: their path gradients.
    """

    pathwise: ClassVar[bool] = False

    def __init__(
        self, components: Iterable[Guide], logits: Tensor | None = None, context_dim: int = 0
    ) -> None:
        super().__init__()
        self.components = nn.ModuleList(components)
        dims = sorted({part.dim for part in self._parts()})
        if len(dims) != 1:
            raise ValueError(f"A mixture needs components of one D; got components of D = {dims}.")
        if any(part.joint for part in self._parts()):
            raise ValueError("A guide that draws other variables cannot be part of a mixture.")
        self.dim = dims[0]
        start = torch.zeros(len(self.components)) if logits is None else logits.clone()
        self.logits = Amortised(start, context_dim)

    def sample(self, shape: tuple[int, ...], context: Tensor | None = None) -> Draw:
        z = torch.stack([part.sample(shape, context).z for part in self._parts()])
        which = Categorical(logits=self.logits(context)).sample(shape)
        index = which[None, ..., None].expand(1, *z.shape[1:])
        chosen = z.gather(0, index).squeeze(0)
        return Draw(chosen, self.log_prob(chosen, context))

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self._mix(self.log_parts(z, context), context)

    def strata(self, shape: tuple[int, ...], context: Tensor | None = None) -> Strata:
        z = torch.cat([part.sample(shape, context).z for part in self._parts()])
        share = self.log_weights(context).movedim(-1, 0) - math.log(shape[0])
        share = share.repeat_interleave(shape[0], dim=0)
        return Strata(z, self.log_prob(z, context), _between(share, z.dim() - 1))

    def skip(self, shape: tuple[int, ...]) -> None:
        for part in self._parts():
            part.skip(shape)

    def in_single(self) -> Guide | None:
        parts = [part.in_single() for part in self._parts()]
        if not any(parts):
            return None
        new = copy.deepcopy(self)
        for i, part in enumerate(parts):
            new.components[i] = new.components[i] if part is None else part
        return new

    def log_part(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        scores = self.log_parts(z, context)
        own = [score.chunk(len(scores))[m] for m, score in enumerate(scores)]
        return torch.cat(own) - self._mix(scores, context)

    def log_parts(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Score samples under each component. (*S, *B, D) -> (M, *S, *B)."""
        return torch.stack([part.log_prob(z, context) for part in self._parts()])

    def log_weights(self, context: Tensor | None = None) -> Tensor:
        """Log weights of the components, (*B, M); (M) without a context."""
        return torch.log_softmax(self.logits(context), dim=-1)

    def start(self, loc: Tensor, scale_tril: Tensor) -> None:
        self.start_many([(loc, scale_tril)] * len(self.components))

    def start_many(self, starts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start every component at a Gaussian of its own, at a mode of the target say.

        Args:
            starts: Mean (D) and lower triangular L (D, D), one pair for each component.
        """
        if len(starts) != len(self.components):
            raise ValueError(
                f"A mixture of {len(self.components)} components needs as many starts; "
                f"got {len(starts)}."
            )
        for part, (loc, scale_tril) in zip(self._parts(), starts, strict=True):
            part.start(loc, scale_tril)

    def _parts(self) -> list[Guide]:
        return cast(list[Guide], list(self.components))

    def _mix(self, scores: Tensor, context: Tensor | None) -> Tensor:
        weights = self.log_weights(context).movedim(-1, 0)
        return torch.logsumexp(_between(weights, scores.dim()) + scores, dim=0)


def mixture(
    dim: int,
    context_dim: int = 0,
    components: int = 3,
    component: str = "realnvp",
    parts: Sequence[Mapping[str, Any]] | None = None,
) -> MixtureGuide:
    """A mixture of guides, of one kind unless told otherwise.

    Args:
        dim: Length D of the latent vector.
        context_dim: Length C of the context; 0 for an unconditional guide.
        components: Number of components M.
        component: Name of their kind, for `make_guide`.
        parts: For components of different kinds, what `make_guide` takes for each, by name.
    """
    kinds = [{"name": component}] * components if parts is None else parts
    made = [make_guide(dim=dim, context_dim=context_dim, **kind) for kind in kinds]
    return MixtureGuide(made, context_dim=context_dim)


GUIDES: dict[str, Callable[..., Guide]] = {
    "fullrank": FullRank,
    "kronecker": KroneckerNormal,
    "lowrank": LowRankNormal,
    "meanfield": MeanField,
    "mixture": mixture,
    "skewed": SkewedNormal,
}
# Guides that draw z together with other variables: see `Guide.joint`.
JOINT_GUIDES: dict[str, Callable[..., Guide]] = {}


def make_guide(
    name: str, dim: int, context_dim: int = 0, base: str = "normal", **sizes: Any
) -> Guide:
    """Build a guide by name: a row of `GUIDES`, or a flow of `FLOWS` on an affine layer.

    That layer is of full rank up to D = 2000, and of low rank beyond.

    Args:
        name: Name of the guide or flow.
        dim: Length D of the latent vector.
        context_dim: Length C of the context; 0 for an unconditional guide.
        base: Name of the density that a flow starts from, a row of `BASES`.
        **sizes: Of the guide or the flow, such as its depth.

    Raises:
        ValueError: There is no such name, or the depth is no whole number of at least 1.
    """
    named = {**JOINT_GUIDES, **GUIDES}
    if name in named:
        return named[name](dim, context_dim, **sizes)
    if name in FLOWS:
        given(whole, "depth", sizes.get("depth"))
        flow = FLOWS[name](dim, context_dim, **sizes)
        affine = Triangular if dim <= FULL_RANK_DIM else LowRank
        return FlowGuide(dim, flow, affine(dim, context_dim), BASES[base](dim))
    raise ValueError(unknown("guide", name, sorted(guide_names())))


def starts_flat(name: str) -> bool:
    """Whether the guide of a name makes no use of correlations when it starts: see `Guide.flat`."""
    kind = GUIDES.get(name)
    return isinstance(kind, type) and issubclass(kind, Guide) and kind.flat


def guide_names() -> set[str]:
    """All names that `make_guide` takes."""
    return {*GUIDES, *JOINT_GUIDES, *FLOWS}


def _in_single(flow: Layer) -> Layer | None:
    """A copy of a flow that works in single precision, if that is enough."""
    double = {p.dtype for p in flow.parameters()} == {torch.float64}
    return InSingle(copy.deepcopy(flow)) if double and flow.single else None


def _between(values: Tensor, dims: int) -> Tensor:
    """Put sample dimensions of size 1 behind the first: (N, *B) -> (N, 1, ..., *B)."""
    return values.reshape(len(values), *[1] * (dims - values.dim()), *values.shape[1:])
