"""Count the modes that the search for a start reports: false ones, and true ones that it finds.

    python benchmarks/modes.py [--shared DIR] [--random 50] [--set NAME] [--only NAME] [--seed 0]

Of each model the start, the search for modes and the check of a Gaussian without training are
run, with and without correlations; no fit. A mode is reported where the check says that the
guide leaves it out. Sets with one mode: models made at random (generalized linear and
hierarchical ones), the small models of the tests, the posteriors and the record in DIR, but for
those that are known to have more. Targets with several: as many as listed have to be found.
Prints a row for each and both rates: D, modes found, expected and reported, evaluations of the
density, and those of the start and the search for modes alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import corpus
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from random_models import random_model
from zoo import ZOO
from zoo.exact import EXACT

import flowvi
from flowvi.guides import make_guide
from flowvi.initialization.candidates import best_gaussian
from flowvi.initialization.missed_modes import missed_modes
from flowvi.initialization.modes import further_modes
from flowvi.initialization.preflight import preflight
from flowvi.targets import Target
from flowvi.training.evaluation import evaluate

ROOT = Path(__file__).resolve().parents[1]
Made = Callable[[], Target]

# Among the models of the sets with one mode, those that have more, and how many.
SEVERAL: dict[str, int] = {
    "low_dim_gauss_mix_collapse": 2,
    "two_modes": 2,
    "mixture_prior": 4,
    "von_mises": 2,  # the data lie on the far side of the circle, which two ways lead to
}
GUIDES = ("meanfield", "fullrank")
DRAWS = 1000


class Row(NamedTuple):
    """What was found of one model.

    Attributes:
        dim: D.
        modes: Modes, that of the start among them.
        reported: Of them, those that the guide is said to leave out.
        spent: Evaluations of the density.
        seconds: Time.
    """

    dim: int
    modes: int
    reported: int
    spent: int
    seconds: float


def search(target: Target, guide_name: str, seed: int) -> Row:
    """The start, the search for modes and the check of a Gaussian without training."""
    spent, log_prob, began = 0, Target.log_prob, time.perf_counter()

    def counting(self: Target, z: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        nonlocal spent
        spent += z.numel() // z.shape[-1]
        return log_prob(self, z, batch)

    Target.log_prob = counting  # type: ignore[method-assign]
    try:
        seen, flat = preflight(target, seed), guide_name == "meanfield"
        best, _, ends = best_gaussian(
            target, seed, flat, lambda _: None, median=seen.median, places=seen.places
        )
        modes = further_modes(target, best, ends, seen.places, seed, lambda _: None)
        guide = make_guide(guide_name, target.dim).to(target.dtype)
        guide.start(best.loc, best.scale_tril)
        found = evaluate(flowvi.elbo(1), target.log_prob, guide, seed, DRAWS, DRAWS)
        covered = found.bound + (found.gap if math.isfinite(found.gap) else 0.0)
        missed = missed_modes(target, guide, covered, modes, seed)
    finally:
        Target.log_prob = log_prob  # type: ignore[method-assign]
    return Row(target.dim, 1 + len(modes), len(missed), spent, time.perf_counter() - began)


def made_at_random(count: int) -> Iterator[tuple[str, Made]]:
    """Generalized linear and hierarchical models."""
    for seed in range(count):
        words, model, args = random_model(seed)
        yield f"{seed}: {words}", partial(flowvi.from_pyro, model, *args)


def of_the_tests() -> Iterator[tuple[str, Made]]:
    """The small models of the tests."""
    for name, build in {**ZOO, **EXACT}.items():

        def make(build: Callable[[], Any] = build) -> Target:
            pyro.clear_param_store()
            case = build()
            return flowvi.from_pyro(case.model, *case.args, **getattr(case, "kwargs", {}))

        yield name, make


def of_the_corpus(shared: Path) -> Iterator[tuple[str, Made]]:
    """Posteriors with reference draws."""
    for folder in sorted(p for p in (shared / "posteriors").glob("*") if p.is_dir()):

        def make(folder: Path = folder) -> Target:
            module = corpus.load_model(folder.name)
            args = corpus.arguments(module, folder.name, folder)
            return flowvi.from_pyro(module.model, *args)

        yield folder.name, make


def of_the_record(shared: Path) -> Iterator[tuple[str, Made]]:
    """Models with published bounds."""
    for path in sorted((shared / "record").glob("*/model.py")):

        def make(path: Path = path) -> Target:
            spec = importlib.util.spec_from_file_location(path.parent.name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            args, kwargs = module.load(path.parent)
            return flowvi.from_pyro(module.model, *args, **kwargs)

        yield path.parent.name, make


def _plain(log_p: Callable[[Tensor], Tensor], dim: int) -> Made:
    return lambda: flowvi.from_density(lambda v: log_p(v["x"]), {"x": flowvi.Site((dim,))})


def two_normals(distance: float, share: float, dim: int) -> Made:
    """Two normals, the second with a share of the mass."""

    def log_p(x: Tensor) -> Tensor:
        away = 0.5 * distance / dim**0.5
        a = -0.5 * (x + away).square().sum() + math.log(1 - share)
        b = -0.5 * (x - away).square().sum() + math.log(share)
        return torch.logaddexp(a, b)

    return _plain(log_p, dim)


def two_bananas(x: Tensor) -> Tensor:
    """Two arcs that do not touch, one above the other."""

    def arc(up: float) -> Tensor:
        return -0.5 * x[0].square() - 2 * (x[1] - up * (2 + 0.3 * x[0].square())).square()

    return torch.logaddexp(arc(1.0), arc(-1.0))


def waves(x: Tensor) -> Tensor:
    """A product of sines on a normal: hills, of which the two nearest to zero weigh most."""
    return 15 * (2 * x).sin().prod() - 0.2 * x.square().sum()


def wells(x: Tensor) -> Tensor:
    """Two wells on each of three axes."""
    return (-(x**4) + 6 * x**2).sum()


def labels(y: Tensor) -> None:
    """Three components with everything unknown, whose labels can be swapped."""
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("component", 3):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    with pyro.plate("row", len(y)):
        mixture = dist.MixtureSameFamily(dist.Categorical(p), dist.Normal(mu, s))
        pyro.sample("y", mixture, obs=y)


def factors(y: Tensor) -> None:
    """One factor whose sign can be turned with that of its loadings."""
    load = pyro.sample("load", dist.Normal(torch.zeros(y.shape[1]), 1.0).to_event(1))
    f = pyro.sample("f", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(f[:, None] * load, 0.5).to_event(2), obs=y)


def with_several() -> Iterator[tuple[str, Made, int]]:
    """Targets with several modes, and how many there are."""
    for distance, share, dim in [(6, 0.5, 1), (8, 0.3, 2), (8, 0.5, 5), (10, 0.1, 10)]:
        name = f"two normals {distance} sds apart, {share} of the mass, D = {dim}"
        yield name, two_normals(distance, share, dim), 2
    yield "two bananas", _plain(two_bananas, 2), 2
    yield "products of sines", _plain(waves, 2), 2
    yield "wells", _plain(wells, 3), 8
    generator = torch.Generator().manual_seed(0)
    y = torch.cat([m + 0.3 * torch.randn(15, generator=generator) for m in (-4.0, 0.0, 5.0)])
    yield "labels of three components", partial(flowvi.from_pyro, labels, y), 6
    x = torch.randn(12, 1, generator=generator) * torch.tensor([1.0, -0.8, 0.6])
    y = x + 0.5 * torch.randn(12, 3, generator=generator)
    yield "signs of a factor", partial(flowvi.from_pyro, factors, y), 2


def rows(given: argparse.Namespace) -> Iterator[tuple[str, str, Made, int]]:
    """Sets, names, targets and numbers of modes."""
    sets = {
        "random": made_at_random(given.random),
        "tests": of_the_tests(),
        "posteriors": of_the_corpus(given.shared),
        "record": of_the_record(given.shared),
    }
    for kind, models in sets.items():
        for name, make in models:
            yield kind, name, make, SEVERAL.get(name, 1)
    for name, make, count in with_several():
        yield "several", name, make, count


def main() -> None:
    """Search all, and print both rates."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = Path(os.environ.get("FLOWVI_SHARED", ROOT.parent / "shared"))
    parser.add_argument("--shared", type=Path, default=shared)
    parser.add_argument("--random", type=int, default=50)
    parser.add_argument("--set", default="")
    parser.add_argument("--only", default="")
    parser.add_argument("--guide", choices=GUIDES)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    searched = false = several = found = 0
    for kind, name, make, expected in rows(given):
        if given.set not in ("", kind) or given.only not in name:
            continue
        for guide in [given.guide] if given.guide else GUIDES:
            torch.manual_seed(given.seed)
            try:
                row = search(make(), guide, given.seed)
            except (ValueError, RuntimeError) as error:
                print(f"{kind}  {name}  {guide}  refused: {str(error)[:80]}", flush=True)
                continue
            searched += expected == 1
            false += expected == 1 and row.reported > 0
            several += expected > 1
            found += expected > 1 and row.modes >= expected and row.reported > 0
            mark = " <--" if (row.modes < expected) or (expected == 1 and row.reported) else ""
            print(
                f"{kind}  {name}  {guide}  D {row.dim}  modes {row.modes} of {expected}  "
                f"reported {row.reported}  evaluations {row.spent}  s {row.seconds:.1f}{mark}",
                flush=True,
            )
    print(f"false modes reported: {false} of {searched} searches with one mode")
    print(f"all modes found and reported: {found} of {several} searches with several")


if __name__ == "__main__":
    main()
