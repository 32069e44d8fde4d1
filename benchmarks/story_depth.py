"""Complexity at run time: one flow whose depth is chosen when drawing, on known evidence.

Part `schemes` trains each prefix of a flow to be a guide in several ways; part `curve` is the gap
to the exact log evidence against layers and seconds, by the scheme that `flowvi.Prefixes` has.

    python benchmarks/story_depth.py schemes
    python benchmarks/story_depth.py curve --out depth.json
    python benchmarks/story_depth.py curve --quick
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import densities
import numpy as np
import torch
from scipy.integrate import quad
from torch import Tensor
from torch.distributions import Normal

import flowvi
from flowvi import Site, Target
from flowvi.draws.prefixes import seconds_of_draws
from flowvi.flows import Chain, Layer, Triangular
from flowvi.guides import FlowGuide, Guide, PrefixGuide, ScoredSample, make_guide
from flowvi.guides.pushforward import AffineLayer
from flowvi.initialization.gaussian import GaussianApproximation

ROOT = Path(__file__).parents[1]
JUDGED = 20_000
# Of the plane: a start that covers all modes, and of eight schools none is needed.
WIDE = 2.0


class Case(NamedTuple):
    """A target, its exact log evidence, and a start; None lets the fit search."""

    target: Target
    log_z: float
    start: GaussianApproximation | None = None


def cases() -> dict[str, Callable[[], Case]]:
    """Targets by name."""
    planes = {name: _plane(name) for name in ("U1", "U2", "U3", "U4")}
    return {**planes, "eight schools": _schools, "two modes": _two_modes}


def _plane(name: str) -> Callable[[], Case]:
    return lambda: Case(densities.make_target(name), densities.DENSITIES[name].log_z, _wide())


def _wide() -> GaussianApproximation:
    return GaussianApproximation(torch.zeros(2), WIDE * torch.eye(2), "wide")


def _schools() -> Case:
    model = runpy.run_path(str(ROOT / "models/eight_schools.py"))
    return Case(flowvi.from_pyro(model["model"], *model["data"]()), -31.3113)


def _two_modes() -> Case:
    """A square that was seen with noise: a ~ N(0, 1), b ~ N(a, 0.5), 2.25 ~ N(a^2, 0.5)."""

    def log_density(v: dict[str, Tensor]) -> Tensor:
        prior = Normal(0.0, 1.0).log_prob(v["a"]) + Normal(v["a"], 0.5).log_prob(v["b"])
        return prior + Normal(v["a"].square(), 0.5).log_prob(torch.tensor(2.25))

    def joint(a: float) -> float:
        square = -0.5 * ((2.25 - a * a) / 0.5) ** 2 - 0.5 * a * a
        return math.exp(square) / (2 * math.pi * 0.5)

    log_z = math.log(2 * quad(joint, 0, 10, points=[1.5])[0])
    return Case(flowvi.from_density(log_density, {"a": Site(), "b": Site()}), log_z, _wide())


class RandomPrefix(PrefixGuide):
    """Trains one prefix a step, drawn at random, in place of the mean of all."""

    def sample_with_score(
        self, shape: tuple[int, ...], context: Tensor | None = None
    ) -> ScoredSample:
        k = int(torch.randint(0, self.depth + 1, ()))
        return self.prefix(k).deepest(shape, context)

    def prefix(self, layers: int) -> RandomPrefix:
        guide = super().prefix(layers)
        return RandomPrefix(guide.dim, guide._layers(), guide._affines(), guide.base)

    def deepest(self, shape: tuple[int, ...], context: Tensor | None) -> ScoredSample:
        """Draws of all layers, as of any other flow."""
        flow = FlowGuide(self.dim, self.flow, cast(Triangular, self.affine), self.base)
        return flow.sample_with_score(shape, context)


class Trained(NamedTuple):
    """Guides by number of layers from 0, and the core seconds of their training."""

    guides: list[Guide]
    seconds: float


def mean(case: Case, flow: str, depth: int, steps: int) -> Trained:
    """The mean of the bounds of all prefixes: `flowvi.Prefixes`."""
    return _together(case, _fresh(case, flow, depth), steps)


def shared(case: Case, flow: str, depth: int, steps: int) -> Trained:
    """The same with one affine layer for all prefixes."""
    guide = _fresh(case, flow, depth)
    affines = [guide.affine] * (depth + 1)
    return _together(case, PrefixGuide(guide.dim, guide._layers(), affines), steps)


def at_random(case: Case, flow: str, depth: int, steps: int) -> Trained:
    """A prefix of random length in each step."""
    guide = _fresh(case, flow, depth)
    return _together(case, RandomPrefix(guide.dim, guide._layers(), guide._affines()), steps)


def layerwise(case: Case, flow: str, depth: int, steps: int) -> Trained:
    """One layer after the other; those before it are constants."""
    fresh, began = _fresh(case, flow, depth), _core_seconds()
    layers: list[Layer] = []
    affines: list[AffineLayer] = []
    for layer in fresh._layers():
        for p in [p for known in layers for p in known.parameters()]:
            p.requires_grad_(False)
        guide = FlowGuide(fresh.dim, Chain([*layers, layer]), Triangular(fresh.dim))
        fit = _fit(case, guide, max(1, steps // depth))
        trained = cast(FlowGuide, fit.guide)
        layers = cast(list[Layer], list(cast(Chain, trained.flow).layers))
        affines.append(trained.affine)
    made: list[Guide] = [
        FlowGuide(fresh.dim, Chain(layers[:k]), affines[max(k, 1) - 1]) for k in range(depth + 1)
    ]
    return Trained(made, _core_seconds() - began)


def whole(case: Case, flow: str, depth: int, steps: int) -> Trained:
    """The usual training of all layers, cut afterwards: nothing is asked of the prefixes."""
    fresh, began = _fresh(case, flow, depth), _core_seconds()
    fit = _fit(case, FlowGuide(fresh.dim, Chain(fresh._layers()), Triangular(fresh.dim)), steps)
    trained = cast(FlowGuide, fit.guide)
    layers = cast(list[Layer], list(cast(Chain, trained.flow).layers))
    made: list[Guide] = [
        FlowGuide(fresh.dim, Chain(layers[:k]), trained.affine) for k in range(depth + 1)
    ]
    return Trained(made, _core_seconds() - began)


def apart(case: Case, flow: str, depth: int, steps: int) -> Trained:
    """A flow of its own for each depth, trained in the usual way."""
    began = _core_seconds()
    made: list[Guide] = [_fit(case, make_guide("fullrank", case.target.dim), steps).guide]
    for k in range(1, depth + 1):
        made.append(_fit(case, make_guide(flow, case.target.dim, depth=k), steps).guide)
    return Trained(made, _core_seconds() - began)


SCHEMES = {
    "mean of all": mean,
    "mean, one affine layer": shared,
    "one at random": at_random,
    "layer by layer": layerwise,
    "trained whole, then cut": whole,
    "a flow for each": apart,
}


def _fresh(case: Case, flow: str, depth: int) -> PrefixGuide:
    torch.manual_seed(0)
    return flowvi.Prefixes(flow, {"depth": depth}).build(case.target)


def _fit(case: Case, guide: Guide, steps: int) -> flowvi.Fit:
    return flowvi.fit(
        case.target, guide, steps=steps, start=case.start, compile=False, progress=False, lr=5e-3
    )


def _together(case: Case, guide: PrefixGuide, steps: int) -> Trained:
    began = _core_seconds()
    fitted = cast(PrefixGuide, _fit(case, guide, steps).guide)
    return Trained([fitted.prefix(k) for k in range(fitted.depth + 1)], _core_seconds() - began)


@torch.no_grad()
def gap(case: Case, guide: Guide) -> tuple[float, float]:
    """The exact log evidence less the ELBO, and its standard error."""
    torch.manual_seed(1)
    log_w = []
    for _ in range(JUDGED // 2000):
        z, log_q = FlowGuide.sample(cast(FlowGuide, guide), (2000,))
        log_w.append(case.target.log_prob(z) - log_q)
    found = case.log_z - torch.cat(log_w).double()
    return float(found.mean()), float(found.std()) / math.sqrt(len(found))


def schemes(flow: str, depth: int, steps: int, names: list[str]) -> Iterator[str]:
    """A line for each target and scheme: the gap of each prefix."""
    heads = " | ".join(str(k) for k in range(depth + 1))
    yield f"| target | training | {heads} | core s |"
    yield "| --- | --- |" + " --- |" * (depth + 2)
    for name in names:
        for scheme, train in SCHEMES.items():
            case = cases()[name]()
            trained = train(case, flow, depth, steps)
            gaps = [gap(case, guide)[0] for guide in trained.guides]
            cells = " | ".join(f"{g:.3f}" for g in gaps)
            yield f"| {name} | {scheme} | {cells} | {trained.seconds:.0f} |"


def curve(flow: str, depth: int, steps: int, names: list[str], out: Path | None) -> Iterator[str]:
    """A line for each target and number of layers: the gap, and the time of draws."""
    yield "| target | layers | gap, nats | ms of 1,000 draws |"
    yield "| --- | --- | --- | --- |"
    found: dict[str, list[list[float]]] = {}
    for name in names:
        case = cases()[name]()
        trained = mean(case, flow, depth, steps)
        found[name] = []
        for k, guide in enumerate(trained.guides):
            value, error = gap(case, guide)
            seconds = seconds_of_draws(guide)
            found[name].append([k, value, error, seconds])
            yield f"| {name} | {k} | {value:.4f} ± {error:.4f} | {1000 * seconds:.2f} |"
    if out is not None:
        facts = {"flow": flow, "depth": depth, "steps": steps, "rows": found}
        out.write_text(json.dumps(facts, indent=1))


def _core_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Read the command line and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", choices=["schemes", "curve"])
    parser.add_argument("--flow", default="nsf_coupling")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--only", nargs="*", default=[*cases()], help="targets of these names")
    parser.add_argument("--out", type=Path, help="of curve: numbers for docs/make_story.py")
    parser.add_argument("--quick", action="store_true", help="few steps, two targets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    np.seterr(all="ignore")
    steps, names = options.steps, options.only
    if options.quick:
        steps, names = 60, names[:1]
    if options.part == "schemes":
        lines = schemes(options.flow, options.depth, steps, names)
    else:
        lines = curve(options.flow, options.depth, steps, names, options.out)
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
