"""NUTS in the base space of a fitted guide, where the posterior is close to the base density."""

from __future__ import annotations

from typing import cast

from flowvi.draws.draws import Draws
from flowvi.fitting.result import Fit, NestedFit, RowFit
from flowvi.fitting.structured_fit import StructuredFit
from flowvi.runtime.arguments import check_integer, require_fit, suggest_spelling
from flowvi.samplers.nuts import NutsSettings, check_has_map, run_nuts


@suggest_spelling
def neutra(
    fit: Fit,
    warmup: int = 300,
    draws: int = 1000,
    chains: int = 4,
    seed: int = 0,
    *,
    target_accept: float = 0.8,
    progress: bool = True,
) -> Draws:
    """Sample the posterior by NUTS in the base space of the best guide.

    The guide's quality affects the run time, not the sampled distribution. `diagnose` judges
    the draws by R-hat, effective sample size and divergences. See
    `flowvi.samplers.nuts.run_nuts` for the density that is sampled.

    Args:
        fit: A fit whose best guide maps noise: a flow, full rank, mean field.
        warmup: Number of adaptation steps, which are dropped.
        draws: Number of draws of each chain.
        chains: Number of chains, at least 2.
        seed: Seed of all chains; the global generators are not changed.
        target_accept: Target acceptance probability; a larger one gives smaller steps.
        progress: Whether to show the progress: one bar in a terminal or a notebook, and a line
            every 10 seconds elsewhere.

    Returns:
        Draws of the posterior, with the log density of the guide at each draw.

    References:
        Hoffman et al. (2019), "NeuTra-lizing bad geometry in Hamiltonian Monte
        Carlo using neural transport", arXiv:1903.03704.
    """
    if isinstance(fit, RowFit | NestedFit):
        why = "latents for each row" if isinstance(fit, RowFit) else "a bound for its density"
        raise TypeError(
            f"neutra samples one vector of latents, and got a {type(fit).__name__}, with {why}: "
            "capture the model without local=, which puts all latents into one vector."
        )
    if isinstance(fit, StructuredFit):
        raise TypeError(
            "neutra needs a guide that maps noise to all latents, and got a StructuredFit, whose "
            "local latents are integrated: fit(target, 'realnvp') has such a map."
        )
    require_fit("neutra", fit, Fit, "what flowvi.fit returned")
    check_has_map(fit.guide)
    check_lengths({"warmup": warmup, "draws": draws}, chains, target_accept)
    plan = NutsSettings(warmup, draws, chains, target_accept)
    found = run_nuts(fit.target, fit.guide, plan, seed, fit.meta, progress=progress)
    return cast(Draws, found)


def check_lengths(counts: dict[str, int], chains: int, target_accept: float) -> None:
    """Refuse lengths and numbers of chains that are too small to be judged."""
    for name, count in counts.items():
        check_integer(name, count, 100)
    # R-hat needs at least two chains.
    check_integer("chains", chains, 2)
    if not 0 < target_accept < 1:
        raise ValueError(f"target_accept must lie between 0 and 1; got {target_accept}.")
