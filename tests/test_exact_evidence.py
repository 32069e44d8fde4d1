"""Bounds lie below an evidence that is known, in their order; weighted draws have known moments."""

import itertools

import numpy as np
import pytest
import torch
from zoo.exact import EXACT

import flowvi
from flowvi.draws import sampling
from flowvi.flows import Chain, StudentT, Triangular

DRAWS = 20_000
LADDER = (1, 5, 50, 1000)
WIDER = 1.3
# No Gaussian comes near; and weights cannot show a mode that no draw has found.
HARD = ("banana", "funnel", "two_modes")


def wide(fit: flowvi.Fit) -> flowvi.FlowGuide:
    """A guide with heavier tails than the posteriors have, where the fit began."""
    dim = fit.target.dim
    affine = Triangular(dim)
    affine.set_(fit.start.loc, WIDER * fit.start.scale_tril)
    return flowvi.FlowGuide(dim, Chain([]), affine, StudentT(dim, df=4.0))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("ignore:Simulating one draw at a time")
def test_bounds_and_moments_of_what_is_known(name, brief):
    """Of the guide of a short fit, and of a worse one whose weights can be relied on."""
    case = EXACT[name]()
    target = flowvi.from_pyro(case.model, *case.args)

    fit = flowvi.fit(target, "fullrank", steps=5, progress=False)
    relied = sampling.draw(target, [wide(fit)], DRAWS, seed=2)

    for draws in (fit.draw(DRAWS, seed=1), relied):
        ladder = flowvi.bounds(draws, LADDER)
        # Of the same draws, cut into whole blocks: without an error but rounding.
        assert all(a.bound <= b.bound + 1e-9 for a, b in itertools.pairwise(ladder))
        assert all(row.bound <= case.log_evidence + 4 * row.se + 1e-6 for row in ladder)
    d = flowvi.diagnose(relied)
    if name not in HARD:
        assert d.khat < 0.7
        assert abs(ladder[-1].bound - case.log_evidence) < 0.02 + 4 * d.log_evidence_se
        same_moments(case.moments, relied)


def same_moments(moments, draws) -> None:
    log_w = draws.log_weights.ravel()
    w = np.exp(log_w - log_w.max())
    w /= w.sum()
    for site, known in moments.items():
        mean, sd = (np.asarray(torch.as_tensor(v)).reshape(-1) for v in known)
        away = (draws[site][0].reshape(DRAWS, -1) - mean) / sd
        for power, expected in ((1, 0.0), (2, 1.0)):
            found = w @ away**power
            error = np.sqrt((w**2) @ (away**power - found) ** 2)
            # Of some two hundred numbers one beyond 4.5 is had by chance in 700.
            assert (np.abs(found - expected) < 4.5 * error + 1e-6).all(), (site, power)
