"""The compiled step is the eager step, is made beside the fit, and is never in its way."""

import inspect
import subprocess

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from test_target import captured
from torch import nn
from zoo import ZOO

import flowvi
from flowvi.flows import FLOWS
from flowvi.guides import GUIDES, Guide, make_guide
from flowvi.guides.registry import mixture
from flowvi.objectives import elbo, iwelbo
from flowvi.targets import Target
from flowvi.targets.recording.program import PATIENCE
from flowvi.training.compiling import Accelerator, Bound, NotOneGraph, background, step, trace
from flowvi.training.evaluation import estimate

REPEATS = 8
# A mixture of full size, and an image flow, are covered by their parts.
NAMES = sorted({*GUIDES, *FLOWS} - {"mixture", "image_glow"})
CASES = [(name, elbo()) for name in NAMES]
EXTRA = (elbo(gradient="total"), iwelbo(4))
CASES += [(name, objective) for name in ("meanfield", "planar") for objective in EXTRA]

pytestmark = pytest.mark.filterwarnings("ignore:Singular sample detected")


def trained_of(*modules: nn.Module) -> list[torch.Tensor]:
    return [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]


def accelerator(target: Target, guide: Guide, objective=None, compile=False) -> Accelerator:
    objective = elbo() if objective is None else objective

    def bound(repeats, rows):
        batch = dict(zip(target.subsampled, rows, strict=True))

        def log_p(z):
            return target.log_prob(z, batch) if batch else target.log_prob(z)

        return estimate(objective, log_p, guide, repeats).bound.mean()

    said: list[str] = []
    made = Accelerator(
        [guide, target], trained_of(guide, target), bound, REPEATS, compile, said.append
    )
    made.said = said
    for _ in range(PATIENCE + 1):  # the last one lowers the model's own graph
        made.eager(REPEATS, rows_of(target))
    return made


def rows_of(target: Target) -> list[torch.Tensor]:
    return [torch.randperm(size)[:batch] for size, batch in target.subsampled.values()]


def perturbed(guide: Guide) -> Guide:
    for p in guide.parameters():
        nn.init.normal_(p, std=0.1)
    return guide


def small(name: str, dim: int) -> Guide:
    """A guide of two layers, where the depth can be chosen."""
    takes = name in FLOWS and "depth" in inspect.signature(FLOWS[name]).parameters
    return make_guide(name, dim, **({"depth": 2} if takes else {}))


def same_as_eager(made: Accelerator, rows) -> None:
    """The recorded graph, at other parameters than it was recorded at, on the eager noise."""
    graph = trace(made.module, rows)
    for p in made.trained:
        p.data += 0.01 * torch.randn_like(p)
    flat = nn.utils.parameters_to_vector(made.trained).detach()
    state = torch.get_rng_state()
    expected = made.eager(REPEATS, rows)
    torch.set_rng_state(state)

    found = graph.module(flat, *rows, *graph.draw())

    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


# A third of the models; all of them take more than a minute.
SOME = [
    pytest.param(name, marks=[] if i % 3 == 0 else [pytest.mark.slow]) for i, name in enumerate(ZOO)
]


@pytest.mark.parametrize("name", SOME)
def test_the_graph_of_every_model_is_its_eager_step(name):
    _, target = captured(name)
    guide = perturbed(make_guide("meanfield", target.dim)).to(target.dtype)
    made = accelerator(target, guide)

    same_as_eager(made, rows_of(target))


def schools() -> Target:
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])

    def eight(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(5.0))
        with pyro.plate("school", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 10.0), obs=y)

    return flowvi.from_pyro(eight, y)


@pytest.mark.parametrize("name, objective", CASES, ids=str)
def test_the_graph_of_every_guide_is_its_eager_step_or_is_refused(name, objective):
    target = schools()
    made = accelerator(target, perturbed(small(name, target.dim)), objective)
    try:
        same_as_eager(made, [])
    except NotOneGraph as refused:
        assert str(refused)
        assert name not in {"meanfield", "fullrank", "lowrank", "realnvp"}


@pytest.mark.parametrize("objective", [elbo(), iwelbo(4)], ids=str)
def test_the_graph_of_a_mixture_is_its_eager_step(objective):
    target = schools()
    guide = mixture(target.dim, parts=[{"name": "meanfield"}, {"name": "fullrank"}])

    same_as_eager(accelerator(target, perturbed(guide), objective), [])


def test_a_bound_that_looks_at_values_is_refused():
    guide = make_guide("meanfield", 2)

    def bound():
        z = guide.sample((4,)).z
        return z.sum() if float(z[0, 0]) > 0 else -z.sum()

    with pytest.raises(NotOneGraph):
        trace(Bound([guide], bound))


def test_random_numbers_that_depend_on_values_are_refused():
    guide = make_guide("meanfield", 2)

    def bound():
        z = guide.sample((4,)).z
        return (z * torch.bernoulli(z.detach().sigmoid())).sum()

    with pytest.raises(NotOneGraph, match="bernoulli"):
        trace(Bound([guide], bound))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWVI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLOWVI_COMPILE", "auto")
    return tmp_path / "cache"


compiler = pytest.mark.skipif(bool(background.available()), reason=background.available())


@compiler
@pytest.mark.slow
def test_a_compiled_fit_is_the_eager_one_and_the_second_finds_it(cache):
    target = schools()
    settings = {"guide": "fullrank", "steps": 150, "escalate": False, "progress": False}
    eager = flowvi.fit(target, compile=False, **settings)

    first = flowvi.fit(target, compile=True, **settings)
    second = flowvi.fit(target, compile=True, **settings)

    assert [path.suffix for path in cache.iterdir()] == [".pt2"]
    assert any("compiled in the background" in line for line in first.log)
    assert any("(found" in line for line in second.log)
    for fit in (first, second):
        np.testing.assert_allclose(fit.history["bound"], eager.history["bound"], rtol=1e-8)


def test_without_a_compiler_one_line_says_so(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    made = accelerator(schools(), make_guide("meanfield", 10), compile=True)

    made.consider(1e6, [])

    assert made.said == ["the step is not compiled: there is no C++ compiler (g++) on the path"]
    assert not made.pending and not made.takes(REPEATS)


@compiler
def test_a_compiler_that_fails_is_said_and_leaves_nothing(cache, tmp_path, monkeypatch):
    wrong = tmp_path / "worker.py"
    wrong.write_text("raise SystemExit('no space left')")
    monkeypatch.setattr(background.worker, "__file__", str(wrong))
    made = accelerator(schools(), make_guide("meanfield", 10), compile=True)

    made.consider(1e6, [])

    assert made.said == ["the step is not compiled: no space left"]
    assert not list(cache.iterdir())


@compiler
def test_a_folder_that_cannot_be_written_to_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLOWVI_CACHE", str(tmp_path / "file" / "cache"))
    made = accelerator(schools(), make_guide("meanfield", 10), compile=True)

    made.consider(1e6, [])

    assert len(made.said) == 1 and "Not a directory" in made.said[0]
    assert not made.pending


@compiler
def test_what_is_wrong_in_the_cache_is_deleted(cache):
    made = accelerator(schools(), make_guide("meanfield", 10), compile=True)
    graph = trace(made.module)
    cache.mkdir()
    package = cache / f"{graph.key()}.pt2"
    package.write_bytes(b"not a package")

    made.consider(1e6, [])

    assert len(made.said) == 1 and made.said[0].startswith("the step is not compiled")
    assert not package.exists()


def test_short_fits_do_not_look_for_a_compiled_step(cache, monkeypatch):
    monkeypatch.setattr(step, "trace", None)
    made = accelerator(schools(), make_guide("meanfield", 10), compile="auto")

    made.consider(step.LOOK_SECONDS - 1, [])
    made.consider(step.MAKE_SECONDS - 1, [])

    assert made.pending and not made.said


@compiler
def test_the_end_of_a_fit_ends_the_compilation(cache, monkeypatch):
    started = []
    popen = subprocess.Popen

    def watched(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(background.subprocess, "Popen", watched)
    monkeypatch.setattr(step, "MAKE_SECONDS", 0.0)
    monkeypatch.setattr(step, "processors", lambda: 2)

    flowvi.fit(schools(), "meanfield", steps=50, escalate=False, progress=False)

    assert [process.poll() is not None for process in started] == [True]


def test_the_key_knows_operations_constants_and_sizes():
    target = schools()
    guide = make_guide("meanfield", target.dim)
    key = trace(accelerator(target, guide).module).key()

    assert trace(accelerator(target, guide).module).key() == key
    assert trace(accelerator(target, guide, iwelbo(4)).module).key() != key
    other = flowvi.from_density(lambda v: -(v["x"] ** 2).sum(-1), {"x": flowvi.Site((target.dim,))})
    assert trace(accelerator(other, guide).module).key() != key


@pytest.mark.parametrize("word, meaning", [("on", True), ("off", False), ("", "auto")])
def test_the_environment_decides_what_auto_means(word, meaning, monkeypatch):
    monkeypatch.setenv("FLOWVI_COMPILE", word)

    assert step.asked("auto") == meaning
    assert step.asked(True) is True
    assert step.asked(False) is False


def test_compile_takes_three_values():
    with pytest.raises(ValueError, match="compile must be True, False or"):
        flowvi.fit(schools(), compile="maybe", progress=False)


def test_a_word_that_means_nothing_is_refused_before_the_fit(monkeypatch):
    monkeypatch.setenv("FLOWVI_COMPILE", "yes")

    with pytest.raises(ValueError, match="FLOWVI_COMPILE must be on, off or auto; got 'yes'"):
        flowvi.fit(schools(), progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_that_is_wrong_by_more_than_rounding_is_refused(dtype):
    guide = make_guide("meanfield", 10).to(dtype)
    # Near the middle of the posterior, where the bound and what rounding allows are small.
    guide.start(torch.zeros(10, dtype=dtype), 0.1 * torch.eye(10, dtype=dtype))
    made = accelerator(schools(), guide)
    graph = trace(made.module)
    made._compilation = background.Compilation(graph, nn.utils.parameters_to_vector(made.trained))

    for off, refused in ((0.0, False), (0.1, True), (float("nan"), True)):
        made.compiled = lambda *inputs, off=off: tuple(x + off for x in graph.module(*inputs))
        assert bool(made._check([])) == refused


def subsampled(size: int) -> Target:
    """A plate of which a step sees some rows, and a parameter of the model's own."""
    pyro.clear_param_store()
    y = torch.linspace(-1.0, 2.0, 20)

    def model(y):
        scale = pyro.param("scale", torch.tensor(1.5), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y), subsample_size=size) as rows:
            pyro.sample("y", dist.Normal(mu, scale), obs=y[rows])

    return flowvi.from_pyro(model, y)


def test_rows_and_parameters_of_the_model_are_inputs_of_the_graph():
    target = subsampled(5)
    made = accelerator(target, perturbed(make_guide("fullrank", target.dim)))
    assert [size for size, _ in target.subsampled.values()] == [20]
    assert any(p is own for own in target.parameters() for p in made.trained)

    graph = trace(made.module, rows_of(target))

    flat = nn.utils.parameters_to_vector(made.trained).detach()
    for _ in range(3):
        rows, state = rows_of(target), torch.get_rng_state()
        value, gradient = made.eager(REPEATS, rows)
        torch.set_rng_state(state)
        found = graph.module(flat, *rows, *graph.draw())
        torch.testing.assert_close(found[0], value)
        torch.testing.assert_close(found[1], gradient)


def test_the_key_knows_the_number_of_rows():
    keys = set()
    for size in (5, 6):
        target = subsampled(size)
        made = accelerator(target, make_guide("meanfield", target.dim))
        graph = trace(made.module, rows_of(target))
        assert graph.inputs[1] == ((size,), torch.int64)
        keys.add(graph.key())
    assert len(keys) == 2
