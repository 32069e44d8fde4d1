"""Guides, priors and bounds of one VAE on the same images, compared image by image.

    python benchmarks/vae.py guides mnist.npz --epochs 30
    python benchmarks/vae.py guides mnist.npz --seconds 600
    python benchmarks/vae.py iwae mnist.npz --epochs 30
    python benchmarks/vae.py conv mnist.npz --device cuda
    python benchmarks/vae.py speed mnist.npz

`guides` trains the same MLP (784-300-300-64) with every guide and prior, for the same epochs or
the same CPU seconds; `iwae` the published one (784-200-200-50, tanh) with K = 1, 5, 50; `conv`
follows the protocol of Sylvester flows, for a GPU; `speed` times an epoch beside Pyro, and beside
pythae and zuko where they are installed. Rows are printed as they are done: -ELBO on all test
images, the bound of 500 draws on the first 1,000, and how much better that is than the first row,
paired, with standard errors.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import vae_speed
from torch import nn

import flowvi
from flowvi import vae
from flowvi.objectives import Renyi

BOUND_IMAGES, BOUND_DRAWS = 1000, 500
WARMUP = 5


@dataclass(frozen=True)
class Case:
    """One row of a table: what differs from the first.

    Attributes:
        name: What to call it.
        parts: Of `vae.build`.
        objective: What is maximised.
    """

    name: str
    parts: dict[str, Any] = field(default_factory=dict)
    objective: Renyi = field(default_factory=lambda: flowvi.elbo(1, "total"))


@dataclass(frozen=True)
class Protocol:
    """What the rows of a table have in common.

    Attributes:
        cases: The rows.
        parts: Of `vae.build`.
        settings: How to go through the images.
    """

    cases: list[Case]
    parts: dict[str, Any]
    settings: flowvi.Minibatch


def guides() -> Protocol:
    """Guides and priors on one MLP."""
    cases = [
        Case("Gaussian", {"guide": "gaussian"}),
        Case("planar x4", {"guide": "planar"}),
        Case("radial x4", {"guide": "radial"}),
        Case("Sylvester x4, 8 directions", {"guide": "sylvester"}),
        Case("Householder, 8 reflections", {"guide": "householder"}),
        Case("IAF x2", {"guide": "iaf"}),
        Case("coupling x4", {"guide": "coupling"}),
        Case("spline coupling x2", {"guide": "spline"}),
        Case("f-VAE, coupling x4", {"guide": "fvae", "guide_sizes": {"depth": 4, "hidden": 300}}),
        Case("Gaussian, coupling prior x4", {"prior": "coupling", "prior_sizes": {"hidden": 300}}),
        Case("Gaussian, MAF prior x4", {"prior": "maf", "prior_sizes": {"hidden": 300}}),
        Case(
            "Gaussian, mixture prior of 100",
            {"prior": "mixture", "prior_sizes": {"components": 100}},
        ),
        Case("Gaussian, VampPrior of 100", {"prior": "vamp"}),
    ]
    return Protocol(cases, {"latent": 64}, flowvi.Minibatch(warmup_epochs=WARMUP))


def iwae() -> Protocol:
    """The IWAE of Burda et al. (2016), with plain and doubly reparameterised gradients."""
    cases = [Case("K = 1", objective=flowvi.elbo(1, "total"))]
    for k in (5, 50):
        cases.append(Case(f"K = {k}, plain", objective=flowvi.iwelbo(k, "total")))
        cases.append(Case(f"K = {k}, DReG", objective=flowvi.iwelbo(k, "dreg")))
    nets = {"hidden": (200, 200), "activation": nn.Tanh}
    return Protocol(cases, {"latent": 50, "net_sizes": nets}, flowvi.Minibatch(batch_size=20))


def conv() -> Protocol:
    """The gated convolutions of van den Berg et al. (2018): published in their table 1."""
    cases = [
        Case("Gaussian", {"guide": "gaussian"}),
        Case("planar x16", {"guide": "planar", "guide_sizes": {"depth": 16}}),
        Case("IAF x16", {"guide": "iaf", "guide_sizes": {"depth": 16}}),
        Case("O-Sylvester x16", {"guide": "sylvester", "guide_sizes": {"depth": 16, "rank": 32}}),
        Case("H-Sylvester x16", {"guide": "sylvester_householder", "guide_sizes": {"depth": 16}}),
        Case("T-Sylvester x16", {"guide": "sylvester_triangular", "guide_sizes": {"depth": 16}}),
    ]
    parts = {"latent": 64, "net": "conv", "net_sizes": {"channels": 32}}
    settings = flowvi.Minibatch(
        epochs=2000, warmup_epochs=100, lr=5e-4, decay=0.0, patience=50, amp=True
    )
    return Protocol(cases, parts, settings)


PROTOCOLS = {"conv": conv, "guides": guides, "iwae": iwae}


def rows(images: vae.Images, protocol: Protocol, options: argparse.Namespace) -> Iterator[str]:
    """Train and measure every case; yields the lines of a table."""
    k = f"L_{BOUND_DRAWS}"
    yield f"| model | epochs | CPU s | -ELBO | -{k} | {k} better by | ELBO better by |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    first = None
    for case in protocol.cases:
        if options.only and case.name not in options.only:
            continue
        began = time.process_time()
        fit, epochs = trained(images, case, protocol, options)
        seconds = time.process_time() - began
        test = images.test.to(options.device)
        elbo = fit.iw_bound(test, 1)
        bound = fit.iw_bound(test[:BOUND_IMAGES], BOUND_DRAWS)
        better = ["", ""]
        if first is not None:
            gains = [bound.minus(first[0]), elbo.minus(first[1])]
            better = [f"{gain.value:.2f} ± {gain.se:.2f}" for gain in gains]
        first = first or (bound, elbo)
        numbers = f"{-elbo.mean:.2f} | {-bound.mean:.2f} | {better[0]} | {better[1]}"
        yield f"| {case.name} | {epochs} | {seconds:.0f} | {numbers} |"


def trained(
    images: vae.Images, case: Case, protocol: Protocol, options: argparse.Namespace
) -> tuple[flowvi.RowFit, int]:
    """A fit of one case, and its number of epochs."""
    epochs = options.epochs or protocol.settings.epochs
    if options.seconds:
        # As many epochs as fit, by the time of one.
        began = time.process_time()
        _fit(images.first(2000), case, protocol, 1, options)
        short = time.process_time() - began
        began = time.process_time()
        _fit(images.first(4000), case, protocol, 1, options)
        an_image = (time.process_time() - began - short) / 2000
        epochs = max(2 * WARMUP, round(options.seconds / (an_image * len(images.train))))
    return _fit(images, case, protocol, epochs, options), epochs


def _fit(
    images: vae.Images,
    case: Case,
    protocol: Protocol,
    epochs: int,
    options: argparse.Namespace,
) -> flowvi.RowFit:
    made = vae.build(images.example, **{**protocol.parts, **case.parts}, seed=options.seed)
    made.generator.to(options.device)
    made.guide.to(options.device)
    target = flowvi.from_pyro(made.model, images.train.to(options.device), local="data")
    # Short runs have a short warm-up.
    warmup = min(protocol.settings.warmup_epochs, epochs // 4)
    settings = replace(protocol.settings, warmup_epochs=warmup)
    patient = settings.patience is not None
    return flowvi.fit(
        target,
        made.guide,
        case.objective,
        epochs=epochs,
        validation=images.val.to(options.device) if patient else None,
        seed=options.seed,
        minibatch=settings,
        progress=options.progress,
    )


def main() -> None:
    """Read the command line and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("table", choices=[*PROTOCOLS, "speed"])
    parser.add_argument("data", type=Path, help="an .npz file, as `flowvi vae --data` reads")
    parser.add_argument("--epochs", type=int)
    parser.add_argument(
        "--seconds", type=float, help="CPU seconds for each row, in place of epochs"
    )
    parser.add_argument("--train", type=int, help="only the first so many training images")
    parser.add_argument("--tests", type=int, help="only the first so many test images")
    parser.add_argument("--only", nargs="*", help="rows of these names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    images = vae.load(options.data).first(options.train, options.tests)
    if options.table == "speed":
        lines = vae_speed.table(images, options.epochs or vae_speed.REACHED)
    else:
        lines = rows(images, PROTOCOLS[options.table](), options)
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
