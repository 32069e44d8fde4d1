"""Evaluations keep to max_memory, and what comes of them does not depend on it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.distributions import constraints

import flowvi
from flowvi.cli import main
from flowvi.draws.sampling import draw
from flowvi.guides import FullRank, MeanField, make_guide
from flowvi.runtime import memory
from flowvi.runtime.clock import Clock
from flowvi.runtime.columns import Columns
from flowvi.training.draw_gradient import DrawGradient
from flowvi.training.settings import Settings

# A process that may allocate so much more, and no byte beyond, while it draws 10,000 times
# 100 numbers: the table has 16 MB, and a draw takes 4,000 rows to be scored.
SCRIPT = """
import resource, sys
import torch, flowvi
from flowvi.draws.sampling import draw
from flowvi.guides import MeanField

x = torch.randn(4000, 100, generator=torch.Generator().manual_seed(0))
def log_prob(values):
    return -(x @ values["w"]).tanh().square().mean() - values["w"].square().sum()
real = torch.distributions.constraints.real
target = flowvi.from_density(log_prob, {"w": flowvi.Site(shape=(100,), support=real)})
guide = MeanField(100).to(target.dtype)
draw(target, [guide], 100)
held = next(int(line.split()[1]) for line in open("/proc/self/status") if "VmData" in line)
most = 1024 * held + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
with flowvi.runtime.memory.memory_limit(sys.argv[1]):
    print(draw(target, [guide], 10_000).z.shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process allocates")
def test_a_limit_is_kept():
    def drawn(max_memory):
        """Whether there were draws, where 64 MB could be allocated."""
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, max_memory, str(64 * 10**6)],
            capture_output=True,
            text=True,
        )
        return done.stdout.strip() == "(1, 10000, 100)", done.stderr

    kept, words = drawn("64MB")
    assert kept, words
    kept, words = drawn("1GB")
    assert not kept and "allocate memory" in words


@pytest.fixture
def target():
    """A density of 30 numbers in two sites, one of them positive."""

    def log_prob(values):
        return -values["a"].square().sum() - values["b"].log().square().sum()

    real, positive = constraints.real, constraints.positive
    sites = {"a": flowvi.Site((10,), real), "b": flowvi.Site((4, 5), positive)}
    return flowvi.from_density(log_prob, sites)


@pytest.mark.parametrize("name", ["meanfield", "realnvp", "mixture"])
def test_draws_do_not_depend_on_the_limit(target, name, monkeypatch):
    """The same draws to the bit, in a table in memory and in one on disk; densities to rounding."""
    guide = make_guide(name, target.dim).to(target.dtype)
    whole = draw(target, [guide, guide], 500, seed=3)
    monkeypatch.setattr(memory, "EVALUATED", 1e-3)
    monkeypatch.setattr(memory, "TABLED", 1e-3)
    with memory.memory_limit("32MB"):
        assert 1 < target.chunk() < 100
        parts = draw(target, [guide, guide], 500, seed=3)

    np.testing.assert_array_equal(parts.z, whole.z)
    np.testing.assert_allclose(parts.log_p, whole.log_p, rtol=1e-12)
    np.testing.assert_array_equal(parts.log_q, whole.log_q)
    for site in ("a", "b"):
        np.testing.assert_allclose(parts[site], whole[site], rtol=1e-12)


def test_a_point_costs_what_its_tensors_hold():
    """Of n rows of 1,000 numbers: two at the same time at most, and a constant of 10,000."""

    def function(n):
        fixed = torch.ones(10_000)
        x = torch.ones(n, 1000) + fixed[:1000]
        return x.exp()

    fixed, each = memory.measure_cost(function)

    assert each == pytest.approx(2 * 8 * 1000, rel=0.01)
    assert fixed == pytest.approx(8 * 10_000, rel=0.3)


def test_a_gradient_keeps_what_it_will_need():
    def function(n, gradient):
        z = torch.ones(n, 1000).requires_grad_(gradient)
        return z.exp().exp().exp().exp().exp().sum()

    plain, kept = (
        memory.measure_cost(lambda n, g=g: function(n, g)).per_point for g in (False, True)
    )

    assert plain == pytest.approx(2 * 8 * 1000, rel=0.51)
    assert kept >= 6 * 8 * 1000


def test_a_dense_scale_is_no_cost_of_a_draw():
    """Two guides of one D, one with a matrix that is the same for all draws."""
    narrow, dense = (
        memory.measure_cost(lambda n, g=g: g.sample((n,))) for g in (MeanField(500), FullRank(500))
    )

    assert dense.fixed > 500 * 500 * 4
    assert dense.per_point < 3 * narrow.per_point


def test_costs_say_how_many_points_fit():
    assert memory.Cost(100.0, 10.0).points_within(1000) == 90
    assert memory.Cost(100.0, 10.0).points_within(50) == 1
    assert memory.Cost(0.0, 10.0).points_within(10**9) == memory.MOST


@pytest.mark.parametrize(
    ("words", "size"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8), (64_000_000, 64 * 10**6)],
)
def test_sizes_have_units(words, size):
    with memory.memory_limit(words):
        assert memory.limit() == size
        with memory.memory_limit(None):
            assert memory.limit() == size
    assert memory.limit() == memory.DEFAULT


@pytest.mark.parametrize("words", ["much", "2 XB", "1kB", "", -5, "1.2.3GB", "1e9"])
def test_sizes_without_meaning_are_refused(words):
    with pytest.raises(ValueError, match="max_memory must be a number of bytes or a size such as"):
        memory.parse_size(words)


def test_the_variable_sets_the_default(monkeypatch):
    monkeypatch.setenv("FLOWVI_MAX_MEMORY", "200MB")
    assert memory.limit() == 200 * 10**6

    monkeypatch.setenv("FLOWVI_MAX_MEMORY", "little")
    with pytest.raises(ValueError, match="The variable FLOWVI_MAX_MEMORY must be"):
        memory.limit()


def test_the_command_line_takes_a_limit():
    done = CliRunner().invoke(main, ["fit", "model.py", "--out", "new", "--max-memory", "1kB"])

    assert done.exit_code == 2
    assert "--max-memory" in done.output and "got '1kB'" in done.output


def test_columns_on_disk_are_those_in_memory(monkeypatch):
    rng = np.random.default_rng(0)
    pieces = [
        {"x": rng.normal(size=(n, 3)), "flag": rng.normal(size=n) > 0, "none": np.zeros((n, 0))}
        for n in (5, 1, 20)
    ]
    for share in (1.0, 0.0):
        monkeypatch.setattr(memory, "TABLED", share)
        columns = Columns(26)
        for piece in pieces:
            columns.add(piece)

        for name, array in columns.arrays.items():
            whole = np.concatenate([piece[name] for piece in pieces])
            assert type(array) is np.ndarray and array.dtype == whole.dtype
            np.testing.assert_array_equal(array, whole)
            array[:1] = 0  # the owner's to change


@pytest.mark.slow
def test_a_step_beyond_the_limit_is_made_in_parts():
    x = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def log_prob(values):
        return -(x @ values["w"]).tanh().square().mean() - values["w"].square().sum()

    def fitted(**limit):
        target = flowvi.from_density(log_prob, {"w": flowvi.Site((5,))})
        options = {"particles": 256, "steps": 30, "lr": 1e-2, "compile": False, "progress": False}
        return target, flowvi.fit(target, "fullrank", **options, **limit)

    with memory.memory_limit("32MB"):
        target, part = fitted()
        assert target.at_once() < 256
    _, whole = fitted(max_memory="4GB")
    _, again = fitted(max_memory="32MB")
    bounds = [fit.history["bound"] for fit in (part, whole, again)]
    assert np.array_equal(bounds[0], bounds[2])
    # As many draws, on the same noise or on other: no more scatter.
    assert abs(part.bounds[0] - whole.bounds[0]) < 0.01
    assert 0.5 < np.std(bounds[0][5:]) / np.std(bounds[1][5:]) < 2


def test_the_gradient_of_a_step_in_parts_is_the_mean_of_theirs(target, monkeypatch):
    guide = FullRank(target.dim).to(target.dtype)
    settings = Settings(flowvi.elbo(1), 1, 1e-3, 12, compile=False)
    gradients = DrawGradient(target, guide, settings, Clock(), lambda line: None)
    monkeypatch.setattr(target, "at_once", lambda: 5)
    gradients.__dict__.pop("_fits", None)
    gradients.__dict__.pop("_unit", None)
    torch.manual_seed(0)
    bound, gradient = gradients(12)
    assert gradients.parts(12) == [4, 4, 4]
    torch.manual_seed(0)
    parts = [gradients.fast.eager(4, []) for _ in range(3)]
    assert torch.allclose(bound, sum(b for b, _ in parts) / 3)
    assert torch.allclose(gradient, sum(g for _, g in parts) / 3)
