"""Write and execute the notebooks: `python docs/make_notebooks.py`, given the extra `docs`."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

FOLDER = Path(__file__).parent / "notebooks"
SMALL = """%matplotlib inline
import matplotlib as mpl
mpl.rcParams["figure.dpi"] = 60"""

# Texts begin with a hash or a letter in upper case; all else is code.
NOTEBOOKS = {
    "eight_schools": [
        "# Eight schools\n\nFrom a Pyro model to a judged posterior, and to ArviZ.",
        """import flowvi, pyro, torch
import pyro.distributions as dist

effect = torch.tensor([28, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
error = torch.tensor([15, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)

def model(effect, error):
    zero = effect.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
    with pyro.plate("school", len(effect)):
        offset = pyro.sample("offset", dist.Normal(zero, 1.0))
        theta = pyro.deterministic("theta", mu + tau * offset)
        pyro.sample("y", dist.Normal(theta, error), obs=effect)

target = flowvi.from_pyro(model, effect, error).label({"school": list("ABCDEFGH")})
print(target)""",
        "No settings: the fit chooses them, and its log says why.",
        """fit = flowvi.fit(target, seed=0, progress=False)
fit""",
        "The verdict, with the reasons for it.",
        """draws = fit.draw(4000, seed=1)
flowvi.diagnose(draws)""",
        "What the flow adds to the Gaussian that it began with.",
        """from flowvi.plots import plot_marginals

both = {"Gaussian start": fit.draw_start(4000), "flow": draws}
axes = plot_marginals(both, ["mu", "tau"], columns=2)""",
        """import arviz as az

idata = flowvi.to_inference_data(draws)
print(az.summary(idata, var_names=["mu", "tau"], kind="stats"))""",
    ],
    "own_density": [
        "# A density of your own\n\nA banana in two dimensions; its log evidence is log(pi).",
        """import math
import flowvi, torch

def banana(v):
    return -0.5 * v["x"] ** 2 - 2.0 * (v["y"] - v["x"] ** 2) ** 2

target = flowvi.from_density(banana, {"x": flowvi.Site(), "y": flowvi.Site()})
truth = math.log(math.pi)
print(truth)""",
        "A Gaussian first, then a flow.",
        """for guide in ("fullrank", "realnvp"):
    fit = flowvi.fit(target, guide, seed=0, progress=False)
    draws = fit.draw(4000, seed=1)
    print(flowvi.diagnose(draws), end="\\n\\n")""",
        "The bounds, and the estimate between them.",
        "print(flowvi.bounds(draws))",
        """from flowvi.plots import plot_pair

axes = plot_pair(draws)""",
    ],
    "in_pyro": [
        "# In Pyro\n\nA fit is a guide, and the importance-weighted bound is a loss for SVI.",
        """import flowvi, pyro, torch
import pyro.distributions as dist
from pyro.infer import SVI, Predictive, Trace_ELBO

y = torch.tensor([1.2, 0.4, 2.9, 1.7, 0.8], dtype=torch.float64)

def model(n, y=None):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.tensor(5.0, dtype=torch.float64)))
    with pyro.plate("row", n):
        return pyro.sample("y", dist.Normal(mu, sigma), obs=y)

fit = flowvi.fit(flowvi.from_pyro(model, len(y), y), seed=0, progress=False)
guide = flowvi.pyro_guide(fit)""",
        "New data, and the bound by Pyro's own loss.",
        """torch.manual_seed(0)
new = Predictive(model, guide=guide, num_samples=500, parallel=True)(3)
print(new["y"].mean(), new["y"].std())
elbo = Trace_ELBO(num_particles=500, vectorize_particles=True)
print(-elbo.loss(model, guide, len(y), y), fit.bounds)""",
        "Training goes on, here by the importance-weighted bound.",
        """loss = flowvi.IWELBO(16, vectorize_particles=True)
svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), loss)
losses = [svi.step(len(y), y) for _ in range(20)]
print(sum(losses) / len(losses))""",
    ],
}


def notebook(name: str) -> NotebookNode:
    """The cells, not yet run."""
    cells = [
        new_markdown_cell(text) if text[0] == "#" or text[0].isupper() else new_code_cell(text)
        for text in NOTEBOOKS[name]
    ]
    cells.insert(1, new_code_cell(SMALL))
    for i, cell in enumerate(cells):
        cell["id"] = f"{name}-{i}"  # the same at every run
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in NOTEBOOKS:
        made = notebook(name)
        NotebookClient(made, timeout=600).execute()
        for cell in made.cells:
            cell["metadata"] = {}
            if cell.cell_type == "code":
                # What is said on the error stream is of the machine, not of the subject.
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        nbformat.write(made, FOLDER / f"{name}.ipynb")
