"""Normal approximations of local latents given the shared ones, by Newton's method."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowvi.runtime.clock import drop_if_late
from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.structure.derivatives import Curvature, Derivatives
from flowvi.targets.structure.factors import UNROLLED, Banded, Dense, Factor, Small
from flowvi.targets.structure.structure import CHAIN, UNITS, Structure

# Newton's method ends where a further step would gain less than that many nats.
CONVERGED = 1e-9
# ... where wide draws are centred: a third of a standard deviation away.
CLOSE = 0.05
# A step from where the gain is larger is checked, and shortened where it gains nothing.
CHECKED = 0.05
MOST_STEPS = 60
MOST_HALVINGS = 12
# Step from a saddle, in standard deviations of its ridged precision, and number of such steps.
NUDGE, NUDGES = 0.1, 6
# Multiples of the diagonal that are added to a precision that is not positive definite.
RIDGES = (0.0, 1e-6, 1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3, 1e6)
# Longest first step in units of one, for latents whose conditional is nearly flat; and how often
# it doubles, for modes that are far away.
LONGEST, DOUBLINGS = 20.0, 10
# A first guess of a mode that is farther from the reference is not used.
FARTHEST = 1e6
# Pairs of draws for the mean of a dense field.
SHIFT_PAIRS = 32


@dataclass
class Conditional:
    """Normal approximations N(mode, H^-1) of the latents of units, at values of theta.

    Attributes:
        z: Points (theta, mode), (S, D).
        mode: Modes of the units, (S, G, d).
        log_p: Log density at z, (S).
        slope: Its gradient by the local latents, (S, G, d).
        factor: Cholesky factors of the precisions.
        left: Nats that a further Newton step would gain, (S, G).
        definite: Whether the precision was positive definite without a ridge, (S, G).
    """

    z: Tensor
    mode: Tensor
    log_p: Tensor
    slope: Tensor
    factor: Factor
    left: Tensor
    definite: Tensor

    @property
    def log_marginal(self) -> Tensor:
        """Laplace's formula for the log density of theta, (S)."""
        d = self.mode.shape[-1]
        per_unit = self.left + 0.5 * (d * math.log(2 * math.pi) - self.factor.log_det)
        return self.log_p + per_unit.sum(-1)


@dataclass
class Normal:
    """A normal N(centre, H^-1) of the latents of units, at values of theta.

    Attributes:
        theta: Values of theta, (S, p).
        centre: Means, (S, G, d).
        factor: Cholesky factors of the precisions.
    """

    theta: Tensor
    centre: Tensor
    factor: Factor


class Laplace:
    r"""Laplace's approximation of a log density over its local latents.

    .. math::
        \log p(\theta) \approx \log p(\theta, \hat u(\theta)) + \frac{d}{2} \log 2 \pi
        - \frac{1}{2} \log |H(\theta)|

    with the mode :math:`\hat u(\theta)` and the negative Hessian H there. Newton's method
    starts at the mode of a fixed reference, shifted along the derivative of the mode by theta, so
    that the result is a function of theta alone.

    References:
        Tierney and Kadane (1986), doi:10.1080/01621459.1986.10478240.

    Args:
        target: The log density.
        structure: Its structure.
    """

    def __init__(self, target: GlobalTarget, structure: Structure) -> None:
        self.target, self.structure = target, structure
        self.derivatives = Derivatives(target, structure)
        self.shared = structure.shared.to(target.device)
        self.columns = self.derivatives.columns
        self.reference = torch.zeros(len(self.shared), dtype=target.dtype, device=target.device)
        self.mode = torch.zeros(self.columns.shape, dtype=target.dtype, device=target.device)
        # The one conditional of a model without shared latents.
        self.only: Conditional | None = None
        self._only_normal: tuple[Conditional, Normal] | None = None
        # Whether draws of a chain or a field are from a better normal than that at the mode.
        self.refined = True
        self.slope = self.mode.new_zeros(len(self.shared), *self.mode.shape)

    @torch.no_grad()
    def centre(self, theta: Tensor) -> None:
        """Take a value of theta (p) as the reference from which Newton's method starts."""
        self.forget()
        found = self.at(theta.unsqueeze(0))
        self.reference, self.mode = theta.detach().clone(), found.mode[0]
        # d mode / d theta = H^-1 d^2 log p / du dtheta
        slopes = []
        for column in self.shared:
            direction = torch.zeros_like(found.z)
            direction[0, column] = 1
            product = self.derivatives.product(found.z, direction)
            slopes.append(found.factor.solve(product[:, self.columns])[0])
        if slopes:
            self.slope = torch.stack(slopes).nan_to_num(0.0, 0.0, 0.0)

    def points(self, theta: Tensor, mode: Tensor) -> Tensor:
        """Points of values of theta and of local latents. (*S, p), (*S, G, d) -> (*S, D)."""
        z = mode.new_empty(*mode.shape[:-2], self.derivatives.dim)
        z[..., self.shared] = theta.to(mode).expand(*mode.shape[:-2], -1)
        z[..., self.columns.flatten()] = mode.flatten(-2)
        return z

    @torch.no_grad()
    def at(self, theta: Tensor) -> Conditional:
        """Approximate the conditionals at values of theta, (S, p).

        Without shared latents there is one conditional, for all S together.
        """
        theta = theta.to(self.mode)
        if self.only is not None:
            return self.only
        if not len(self.shared):
            self.only = self._search(theta[:1], CONVERGED)
            return self.only
        return self._search(theta, CONVERGED)

    @torch.no_grad()
    def near(self, theta: Tensor) -> Conditional:
        """Places near the modes at values of theta, with the curvature there: for wide draws.

        Newton's method ends earlier than in `at`, and its last step has no new curvature.
        """
        if self.only is not None or not len(self.shared):
            return self.at(theta)
        found = self._search(theta, CLOSE)
        step = found.factor.solve(found.slope)
        close = ((found.left <= CLOSE) & found.definite).unsqueeze(-1)
        return replace(found, mode=found.mode + torch.where(close, step, 0.0))

    def _start(self, theta: Tensor) -> Tensor:
        """First guesses of the modes, (S, G, d)."""
        mode = self.mode.expand(len(theta), -1, -1)
        shift = (theta - self.reference) @ self.slope.flatten(1)
        fair = torch.isfinite(shift) & (shift.abs() < FARTHEST)
        return mode + torch.where(fair, shift, 0.0).view_as(mode)

    def _bounded(self, step: Tensor, number: int) -> Tensor:
        """A step that is not longer than a step of that number may be."""
        far = step.abs().amax(-1, keepdim=True)
        longest = LONGEST * 2.0 ** min(number, DOUBLINGS)
        return step * (longest / far.clamp(min=longest))

    def _search(self, theta: Tensor, enough: float) -> Conditional:
        mode = self._start(theta)
        found = self._curvature(theta, mode)
        for number in range(MOST_STEPS):
            drop_if_late()
            if not ((found.left > enough) | ~found.definite).any():
                break
            step = found.factor.solve(found.slope)
            # A saddle, where the gradient is zero, is left along the axes of the unit.
            saddle = (~found.definite & (found.left <= CONVERGED)).unsqueeze(-1) & (number < NUDGES)
            step = torch.where(saddle, found.factor.spread(NUDGE * torch.ones_like(step)), step)
            step = self._bounded(step, number)
            tried = mode + step
            if (found.left > CHECKED).any() or not found.definite.all():
                tried = self._shortened(theta, mode, step, found)
            mode, before = tried, found
            found = self._curvature(theta, mode)
            stuck = not (found.left < 0.9 * before.left)[before.left > enough].any()
            if stuck and not (saddle.any() or (before.left > CHECKED).any()):
                # Rounding is all that is left.
                break
        return found

    def _shortened(self, theta: Tensor, mode: Tensor, step: Tensor, found: Conditional) -> Tensor:
        """The end of a step that lowers no unit's log density: halved where it would."""
        before = self.derivatives.by_unit(found.z)[..., :-1]
        size = torch.ones_like(found.left)
        for _ in range(MOST_HALVINGS):
            tried = mode + size.unsqueeze(-1) * step
            after = self.derivatives.by_unit(self.points(theta, tried))[..., :-1]
            rounding = 1e-10 * before.abs().clamp(min=1.0)
            worse = ~(after >= before + 1e-4 * size * found.left - rounding)
            if not worse.any():
                break
            size = torch.where(worse, 0.5 * size, size)
        else:
            size = torch.where(worse, 0.0, size)
        return mode + size.unsqueeze(-1) * step

    def _curvature(self, theta: Tensor, mode: Tensor) -> Conditional:
        z = self.points(theta, mode)
        log_p, slope, products = self._derivatives_in_pieces(z)
        factor, definite = self._factor(products)
        slope = slope.view_as(mode)
        # Newton's estimate of what is left to gain: half of g^T H^-1 g.
        left = 0.5 * (slope * factor.solve(slope)).sum(-1)
        left = torch.where(left.isfinite(), left, torch.inf)
        return Conditional(z, mode, log_p, slope, factor, left, definite)

    def _derivatives_in_pieces(self, z: Tensor) -> Curvature:
        size = self.derivatives.at_once
        if len(z) <= size:
            return self.derivatives.curvature(z)
        parts = [self.derivatives.curvature(one) for one in z.split(size)]
        return Curvature(*(torch.cat(some) for some in zip(*parts, strict=True)))

    def _factor(self, products: Tensor) -> tuple[Factor, Tensor]:
        """The factor of the precision, with a ridge where it is not positive definite."""
        first = self._factored(products, torch.zeros(()))
        if first.ok.all():
            return first, first.ok
        ridge = torch.zeros(first.ok.shape, dtype=products.dtype, device=products.device)
        for size in RIDGES[1:]:
            ridge = torch.where(self._factored(products, ridge).ok, ridge, size)
        return self._factored(products, ridge), first.ok

    def _factored(self, products: Tensor, ridge: Tensor) -> Factor:
        """Factor -H + ridge * (|diagonal| + 1) of each unit; the ridge is () or (S, G)."""
        size = self.columns.shape[1]
        if self.structure.kind == CHAIN:
            bands = self._bands(products)
            added = ridge.expand(len(products), 1) * (bands[:, 0].abs() + 1)
            bands[:, 0] += added
            return Banded(bands.nan_to_num(nan=-1.0), len(self.derivatives.probes))
        assert self.derivatives.colouring is not None
        # (S, C, G, d) -> (S, G, C, d)
        own = products.unflatten(-1, self.columns.shape).transpose(1, 2)
        blocks = -self.derivatives.colouring.elements(own)
        blocks = 0.5 * (blocks + blocks.mT)
        diagonal = blocks.diagonal(dim1=-2, dim2=-1).abs() + 1
        blocks = blocks + torch.diag_embed(ridge.unsqueeze(-1) * diagonal)
        blocks = blocks.nan_to_num(nan=-1.0)
        return Small(blocks) if size <= UNROLLED else Dense(blocks)

    def _bands(self, products: Tensor) -> Tensor:
        """Elements (t + k, t) of the precision of a chain, (S, b + 1, n)."""
        order, n = self.structure.order, self.structure.size
        colours = len(self.derivatives.probes)
        place = torch.arange(n, device=products.device)
        bands = products.new_zeros(len(products), min(order, n - 1) + 1, n)
        for k in range(bands.shape[1]):
            bands[:, k, : n - k] = -products[:, (place % colours)[: n - k], place[k:]]
        return bands

    def marginal_gradient(self, found: Conditional) -> Tensor:
        """Gradient of Laplace's formula by theta, (S, p).

        With A = H^-1 and H the negative Hessian at the mode, the gradient of -log|H| / 2 is
        that of tr(A d^2 log p / du^2) / 2, directly and by the mode, whose derivative is
        A d^2 log p / du dtheta.
        """
        weights = self._trace_weights(found)
        pieces = []
        size = self.derivatives.at_once
        for z, w, start in zip(
            found.z.split(size), weights.split(size), range(0, len(found.z), size), strict=True
        ):
            trace = self.derivatives.trace_gradient(z, w)
            pieces.append((trace, start))
        trace = torch.cat([piece for piece, _ in pieces])
        along = found.factor.solve(trace[:, self.columns])
        direction = torch.zeros_like(found.z)
        direction[:, self.columns.flatten()] = along.flatten(1)
        by_mode = torch.cat(
            [
                self.derivatives.product(z, v)
                for z, v in zip(found.z.split(size), direction.split(size), strict=True)
            ]
        )
        gradient = torch.cat([self.derivatives.gradient(z) for z in found.z.split(size)])
        whole = gradient + 0.5 * (trace + by_mode)
        return whole[:, self.shared]

    def forget(self) -> None:
        """Forget the one conditional of a model without shared latents."""
        self.only = self._only_normal = None

    def centred(self, found: Conditional) -> Normal:
        """The normal that draws are from: at the mode, or a better one of a chain or a field."""
        if self._only_normal is not None and self._only_normal[0] is found:
            return self._only_normal[1]
        normal = self.normal(found)
        if found is self.only:
            self._only_normal = found, normal
        return normal

    def normal(self, found: Conditional) -> Normal:
        """As `centred`, computed anew."""
        theta = found.z[:, self.shared]
        if self.structure.kind == UNITS or not self.refined:
            return Normal(theta, found.mode, found.factor)
        return Normal(theta, found.mode + self.mean_shift(found), found.factor)

    @torch.no_grad()
    def log_weight(self, normal: Normal, white: Tensor) -> tuple[Tensor, Tensor]:
        r"""Log weights of draws of a chain or a field, and their gradients by the noise.

        Args:
            normal: What the draws u are from.
            white: Their noise w, (..., S, 1, N).

        Returns:
            log p(theta, u) - log q(u | theta), (..., S), and its gradient by w, (..., S, 1, N).
        """
        u = normal.centre + normal.factor.spread(white)
        z = self.points(normal.theta, u)
        log_p, slope = self.derivatives.value_and_gradient(z.reshape(-1, z.shape[-1]))
        slope = slope[:, self.columns].view(u.shape)
        half_log = 0.5 * (u.shape[-1] * math.log(2 * math.pi) - normal.factor.log_det[:, 0])
        value = log_p.view(u.shape[:-2]) + half_log + 0.5 * white.square().sum((-2, -1))
        return value, normal.factor.pull(slope) + white

    @torch.no_grad()
    def mean_shift(self, found: Conditional) -> Tensor:
        r"""The mean of the conditional less its mode, to first order, (S, G, d).

        .. math:: \delta = H^{-1} E[\nabla_u \log p(\theta, u)], \qquad u \sim N(\hat u, H^{-1})

        For a chain the expectation is taken to second order of the gradient, where it is half of
        the gradient of tr(H^-1 d^2 log p / du^2); for a field it is an average over pairs of
        opposite draws, the same for every theta. A step of Newton's method for the mean of the
        normal approximation of the largest ELBO (van Niekerk and Rue, 2024, arXiv:2111.12945).
        """
        if self.structure.kind == CHAIN:
            size = self.derivatives.at_once
            weights = self._trace_weights(found)
            pairs = zip(found.z.split(size), weights.split(size), strict=True)
            trace = torch.cat([self.derivatives.trace_gradient(z, w) for z, w in pairs])
            return 0.5 * found.factor.solve(trace[:, self.columns])
        generator = torch.Generator(found.z.device).manual_seed(0)
        noise = torch.randn(
            SHIFT_PAIRS,
            1,
            *found.mode.shape[1:],
            generator=generator,
            dtype=found.z.dtype,
            device=found.z.device,
        )
        away = found.factor.spread(noise.expand(SHIFT_PAIRS, *found.mode.shape))
        total = torch.zeros_like(found.z)
        for one in away:
            for side in (one, -one):
                z = self.points(found.z[:, self.shared], found.mode + side)
                total += self.derivatives.gradient(z)
        mean = total[:, self.columns] / (2 * SHIFT_PAIRS)
        return found.factor.solve(mean)

    def _trace_weights(self, found: Conditional) -> Tensor:
        """H^-1 laid out as the products with probes are, (S, C, L)."""
        inverse = found.factor.inverse()
        colouring = self.derivatives.colouring
        if colouring is not None:
            # (S, d, G, d) -> (S, C, G, d)
            inverse = colouring.weights(inverse.transpose(1, 2)).transpose(1, 2)
        return inverse.flatten(2)
