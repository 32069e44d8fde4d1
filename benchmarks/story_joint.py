"""The joint posterior of weights theta and latents z, against evidence that is known exactly.

python benchmarks/story_joint.py

Two models whose evidence is exact, by the default call of `flowvi.fit` (all latents in one vector)
and of `flowvi.nested` (theta, and the latents of a row given theta): ELBO, the importance-weighted
bound of 1,000 draws of theta, the estimate of the log evidence, core seconds. Then the decoder with
a posterior over its last layer (`--decoder 100 500`): the gain of test images' bound over point
weights that were trained as long, by image in pairs, over seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

import flowvi
from flowvi import vae

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))

DRAWS, INNER, INSIDE = 4000, 100, 1000


def iw_bound(log_w: np.ndarray, inside: int) -> float:
    """The mean of log of means of so many weights each, all draws used once."""
    parts = torch.as_tensor(log_w).reshape(-1, inside)
    return float((torch.logsumexp(parts, 1) - math.log(inside)).mean())


def exact(name: str, model: ModuleType, quick: bool) -> None:
    """Print a row for both calls."""
    known = model.reference()["log_evidence"]
    for call in ("fit", "nested"):
        began = time.process_time()
        draws = DRAWS // 4 if quick else DRAWS
        if call == "fit":
            whole = flowvi.from_pyro(model.model, *model.data())
            log_w = flowvi.fit(whole, progress=False).draw(draws, seed=1).log_weights.reshape(-1)
        else:
            rows = flowvi.from_pyro(model.model, *model.data(), local="row")
            log_w = flowvi.nested(rows, progress=False).draw(draws, seed=1).log_weights.reshape(-1)
        seconds = time.process_time() - began
        elbo, error = log_w.mean(), log_w.std(ddof=1) / len(log_w) ** 0.5
        bound = iw_bound(log_w, min(INSIDE, draws))
        print(
            f"| {name}, `{call}` | {known:.3f} | {elbo - known:.3f} ± {error:.3f} | "
            f"{bound - known:+.4f} | {seconds:.1f} |",
            flush=True,
        )


def decoder(rows: int, seeds: int, before: int, after: int) -> None:
    """Print the gains of a posterior over the last layer, for so many images."""
    import vae_bayesian_decoder as example

    test = vae.load().test
    gains: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        points = example.start(epochs=before, rows=rows)
        base = points.trained(after).fit.iw_bound(test, particles=INNER, seed=1).values
        early = points.fit.iw_bound(test, particles=INNER, seed=1).values
        gains.setdefault("points, stopped early", []).append(float((early - base).mean()))
        for name in ("meanfield", "multiplicative"):
            fit = example.fit_weights(points, name, after)
            found = fit.predictive_bound(test, 30, particles=INNER, seed=1)
            gains.setdefault(name, []).append(float((found - base).mean()))
            words = [f"{values[-1]:.2f}" for values in gains.values()]
            print(f"{rows} images, seed {seed}: {words}", file=sys.stderr, flush=True)
    print(f"| {rows} | {' | '.join(mean_of(v) for v in gains.values())} |", flush=True)


def mean_of(values: Sequence[float]) -> str:
    """The mean over seeds with its standard error."""
    v = np.array(values)
    error = f" ± {v.std(ddof=1) / len(v) ** 0.5:.2f}" if len(v) > 1 else ""
    return f"{v.mean():.2f}{error}"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decoder", type=int, nargs="*", default=[], help="numbers of images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--before", type=int, default=60, help="epochs of points")
    parser.add_argument("--after", type=int, default=100, help="epochs of either after that")
    parser.add_argument("--quick", action="store_true", help="few draws, one seed, few epochs")
    parser.add_argument("--skip-exact", action="store_true")
    options = parser.parse_args()
    if not options.skip_exact:
        import linear_gaussian_joint
        import ppca

        print("| model, call | log evidence | ELBO less it | IW bound less it | core s |")
        print("| --- | --- | --- | --- | --- |")
        exact("linear Gaussian", linear_gaussian_joint, options.quick)
        exact("PPCA", ppca, options.quick)
    if options.decoder:
        print("| images | points, stopped early | mean field | multiplicative flow |")
        print("| --- | --- | --- | --- |")
    epochs = (5, 5) if options.quick else (options.before, options.after)
    for rows in options.decoder:
        decoder(rows, 1 if options.quick else options.seeds, *epochs)


if __name__ == "__main__":
    main()
