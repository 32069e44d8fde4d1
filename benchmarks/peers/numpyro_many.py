"""NumPyro's NUTS on the models of many latents: core seconds to 400 effective draws.

    python -m peers.numpyro_many nuts NAME --data FILE.npz --out FILE.npz [--seconds 600] [--seed 0]

The process needs NumPyro and NumPy alone. One chain, in double precision, on one core, from the
first compilation on: 500 steps of adaptation, then blocks of draws until every parameter has 400
effective draws or the seconds are spent. Parametrisations are those of the model's file, but for
fields, whose latents are whitened: a centred field is out of NUTS's reach.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS

WARMUP, BLOCK, ENOUGH = 500, 500, 400


def scales() -> tuple[Any, Any, Any]:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfNormal(2.0))
    return mu, tau, numpyro.sample("s", dist.HalfNormal(2.0))


def normal_groups(y: Any) -> None:
    mu, tau, s = scales()
    with numpyro.plate("group", len(y)):
        u = numpyro.sample("u", dist.Normal(mu, tau))
    numpyro.sample("y", dist.Normal(u[:, None], s), obs=y)


def normal_groups_noncentered(y: Any) -> None:
    mu, tau, s = scales()
    with numpyro.plate("group", len(y)):
        offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
    u = numpyro.deterministic("u", mu + tau * offset)
    numpyro.sample("y", dist.Normal(u[:, None], s), obs=y)


def tied_groups(y: Any) -> None:
    mu, tau, s = scales()
    with numpyro.plate("group", len(y)):
        u = numpyro.sample("u", dist.Normal(0.0, tau))
    numpyro.sample("y", dist.Normal(mu + u[:, None], s), obs=y)
    numpyro.factor("sum_to_zero", dist.Normal(0.0, 0.01 * len(y)).log_prob(u.sum()))


def radon_slopes(uranium: Any, county: Any, floor: Any, level: Any) -> None:
    mu_a = numpyro.sample("mu_a", dist.Normal(0.0, 5.0))
    gamma = numpyro.sample("gamma", dist.Normal(0.0, 5.0))
    mu_b = numpyro.sample("mu_b", dist.Normal(0.0, 5.0))
    tau_a = numpyro.sample("tau_a", dist.HalfNormal(1.0))
    tau_b = numpyro.sample("tau_b", dist.HalfNormal(1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("county", len(uranium)):
        intercept = numpyro.sample("intercept", dist.Normal(mu_a + gamma * uranium, tau_a))
        slope = numpyro.sample("slope", dist.Normal(mu_b, tau_b))
    mean = intercept[county] + slope[county] * floor
    numpyro.sample("level", dist.Normal(mean, sigma), obs=level)


def random_slopes(group: Any, x: Any, y: Any) -> None:
    dim = x.shape[1]
    beta = numpyro.sample("beta", dist.Normal(0.0, 5.0).expand([dim]).to_event(1))
    tau = numpyro.sample("tau", dist.HalfNormal(2.0).expand([dim]).to_event(1))
    factor = numpyro.sample("factor", dist.LKJCholesky(dim, 2.0))
    s = numpyro.sample("s", dist.HalfNormal(2.0))
    with numpyro.plate("group", int(group.max()) + 1):
        u = numpyro.sample("u", dist.MultivariateNormal(beta, scale_tril=tau[:, None] * factor))
    numpyro.sample("y", dist.Normal((x * u[group]).sum(-1), s), obs=y)


def intercepts(groups: int) -> Any:
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("group", groups):
        return numpyro.sample("u", dist.Normal(mu, tau))


def logistic_groups(group: Any, outcome: Any) -> None:
    u = intercepts(int(group.max()) + 1)
    numpyro.sample("outcome", dist.Bernoulli(logits=u[group]), obs=outcome)


def poisson_groups(exposure: Any, count: Any) -> None:
    u = intercepts(len(count))
    numpyro.sample("count", dist.Poisson(exposure * jnp.exp(u)[:, None]), obs=count)


def beta_binomial(trials: Any, successes: Any) -> None:
    mean = numpyro.sample("mean", dist.Beta(2.0, 2.0))
    size = numpyro.sample("size", dist.LogNormal(2.0, 1.0))
    with numpyro.plate("group", len(trials)):
        p = numpyro.sample("p", dist.Beta(mean * size, (1 - mean) * size))
    numpyro.sample("successes", dist.Binomial(trials.astype(int), p), obs=successes)


def irt_persons(right: Any) -> None:
    persons, items = right.shape
    with numpyro.plate("item", items):
        a = numpyro.sample("a", dist.LogNormal(0.0, 0.5))
        b = numpyro.sample("b", dist.Normal(0.0, 2.0))
    with numpyro.plate("person", persons):
        ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
    numpyro.sample("right", dist.Bernoulli(logits=a * (ability[:, None] - b)), obs=right)


def crossed_groups(person: Any, item: Any, rating: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau_u = numpyro.sample("tau_u", dist.HalfNormal(1.0))
    tau_v = numpyro.sample("tau_v", dist.HalfNormal(1.0))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    with numpyro.plate("person", int(person.max()) + 1):
        u = numpyro.sample("u", dist.Normal(0.0, tau_u))
    with numpyro.plate("item", 15):
        v = numpyro.sample("v", dist.Normal(0.0, tau_v))
    numpyro.sample("rating", dist.Normal(mu + u[person] + v[item], s), obs=rating)


def dense_logistic(x: Any, outcome: Any) -> None:
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("coefficient", x.shape[1]):
        w = numpyro.sample("w", dist.Normal(0.0, scale))
    numpyro.sample("outcome", dist.Bernoulli(logits=x @ w), obs=outcome)


def stochastic_volatility(y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    persistence = numpyro.sample("persistence", dist.Beta(20.0, 1.5))
    phi = numpyro.deterministic("phi", 2 * persistence - 1)
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    h = numpyro.sample("h", dist.ImproperUniform(dist.constraints.real_vector, (), (len(y),)))
    first = dist.Normal(mu, sigma / jnp.sqrt(1 - phi**2)).log_prob(h[0])
    step = dist.Normal(mu + phi * (h[:-1] - mu), sigma).log_prob(h[1:])
    numpyro.factor("chain", first + step.sum())
    numpyro.sample("y", dist.Normal(0.0, jnp.exp(h / 2)), obs=y)


def local_level(y: Any) -> None:
    step = numpyro.sample("step", dist.HalfNormal(1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(2.0))
    level = numpyro.sample(
        "level", dist.ImproperUniform(dist.constraints.real_vector, (), (len(y),))
    )
    first = dist.Normal(0.0, 5.0).log_prob(level[0])
    numpyro.factor("chain", first + dist.Normal(level[:-1], step).log_prob(level[1:]).sum())
    numpyro.sample("y", dist.Normal(level, noise), obs=y)


def cox_grid(count: Any, factor: Any) -> None:
    cells = count.size
    with numpyro.plate("cell", cells):
        white = numpyro.sample("white", dist.Normal(0.0, 1.0))
    field = numpyro.deterministic("field", np.log(126) - 1.91 / 2 + factor @ white)
    numpyro.sample("count", dist.Poisson(jnp.exp(field) / cells), obs=count.ravel())


def gp_counts(x: Any, count: Any) -> None:
    mean = numpyro.sample("mean", dist.Normal(0.0, 3.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    rho = numpyro.sample("rho", dist.LogNormal(-1.5, 0.5))
    distance = (x[:, None] - x) / rho
    covariance = alpha**2 * jnp.exp(-(distance**2) / 2) + 1e-6 * jnp.eye(len(x))
    with numpyro.plate("point", len(x)):
        white = numpyro.sample("white", dist.Normal(0.0, 1.0))
    f = numpyro.deterministic("f", mean + jnp.linalg.cholesky(covariance) @ white)
    numpyro.sample("count", dist.Poisson(jnp.exp(f)), obs=count)


MODELS: dict[str, Callable[..., None]] = {
    "normal_groups": normal_groups,
    "normal_groups_noncentered": normal_groups_noncentered,
    "tied_groups": tied_groups,
    "radon_slopes": radon_slopes,
    "random_slopes": random_slopes,
    "logistic_groups": logistic_groups,
    "poisson_groups": poisson_groups,
    "beta_binomial": beta_binomial,
    "irt_persons": irt_persons,
    "crossed_groups": crossed_groups,
    "dense_logistic": dense_logistic,
    "stochastic_volatility": stochastic_volatility,
    "local_level": local_level,
    "cox_grid": cox_grid,
    "gp_counts": gp_counts,
}


def sampled(
    model: Callable[..., None], data: list[np.ndarray], seconds: float, seed: int
) -> tuple[dict[str, np.ndarray], float, int]:
    """Draws, (draw, *shape) by name; the fewest effective draws; the number of divergences."""
    mcmc = MCMC(NUTS(model), num_warmup=WARMUP, num_samples=BLOCK, progress_bar=False)
    blocks: list[dict[str, Any]] = []
    key, divergent, fewest = jax.random.PRNGKey(seed), 0, 0.0
    while fewest < ENOUGH and (not blocks or time.process_time() < seconds):
        mcmc.run(key, *data, extra_fields=("diverging",))
        mcmc.post_warmup_state, key = mcmc.last_state, mcmc.last_state.rng_key
        blocks.append(jax.device_get(mcmc.get_samples()))
        divergent += int(mcmc.get_extra_fields()["diverging"].sum())
        values = {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
        fewest = min(lowest(v[None]) for v in values.values())
    return values, fewest, divergent


def lowest(chains: np.ndarray) -> float:
    """Fewest effective draws of the entries that vary."""
    flat = chains.reshape(*chains.shape[:2], -1)
    flat = flat[..., flat.std((0, 1)) > 1e-12]
    return float(np.min(effective_sample_size(flat), initial=np.inf))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=["nuts"])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    numpyro.enable_x64()
    warnings.simplefilter("ignore")
    with np.load(options.data) as file:
        data = [file[name] for name in file.files]
    began = time.process_time()
    values, fewest, divergent = sampled(MODELS[options.name], data, options.seconds, options.seed)
    cpu = time.process_time() - began
    found = {f"mean/{name}": v.mean(0) for name, v in values.items()}
    found |= {f"sd/{name}": v.std(0) for name, v in values.items()}
    np.savez(options.out, **found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    note = (
        f"{len(next(iter(values.values())))} draws, {fewest:.0f} effective, {divergent} divergent"
    )
    enough = "" if fewest >= ENOUGH else "not enough effective draws: "
    print(json.dumps({"cpu": cpu, "peak_mb": peak, "note": enough + note}))


if __name__ == "__main__":
    main()
