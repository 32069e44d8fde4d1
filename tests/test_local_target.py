"""Local latents: the log densities of rows are those of the model, whatever its style."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flowvi

N, D, P = 12, 2, 3


@pytest.fixture
def decoder():
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, P))


@pytest.fixture
def x():
    return (torch.rand(N, P) > 0.5).double()


def vae(decoder):
    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    return model


def by_hand(decoder, z, x):
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    return dist.Bernoulli(logits=decoder(z)).log_prob(x).sum(-1), prior


@pytest.mark.parametrize("lead", [(), (3,), (3, 2)])
def test_rows_have_the_densities_of_the_model(decoder, x, lead):
    target = flowvi.from_pyro(vae(decoder), x, local="data")
    z = torch.randn(*lead, N, D)

    found = target.log_prob(z)

    assert found.shape == (*lead, N)
    torch.testing.assert_close(target.terms(z), torch.stack(by_hand(decoder, z, x), -1))
    torch.testing.assert_close(found, sum(by_hand(decoder, z, x)))
    torch.testing.assert_close(target.log_prob(z[..., 4:7, :], x[4:7]), found[..., 4:7])
    torch.testing.assert_close(
        target.log_prob(z[..., 4:6, :], target.batch([4, 5])), found[..., 4:6]
    )


def test_gradients_reach_the_models_parameters(decoder, x):
    target = flowvi.from_pyro(vae(decoder), x, local="data")
    z = torch.randn(5, N, D)

    found = torch.autograd.grad(target.log_prob(z).sum(), list(target.parameters()))

    expected = torch.autograd.grad(sum(by_hand(decoder, z, x)).sum(), list(decoder.parameters()))
    assert {id(p) for p in target.parameters()} == {id(p) for p in decoder.parameters()}
    by_shape = {tuple(g.shape): g for g in expected}
    for g in found:
        torch.testing.assert_close(g, by_shape[tuple(g.shape)])


def length(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def fixed(x):
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def indexed(x):
    with pyro.plate("data", N) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


def subsampled(x):
    with pyro.plate("data", N, subsample_size=4) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


def nested_plates(x):
    with pyro.plate("data", len(x), dim=-1):
        with pyro.plate("pair", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sum(-2), 1.0), obs=x)


@pytest.mark.parametrize("model", [length, fixed, indexed, subsampled])
def test_every_style_of_a_plate_is_unscaled(model):
    x = torch.randn(N)
    target = flowvi.from_pyro(model, x, local="data")
    z = torch.randn(3, N, 1)

    expected = dist.Normal(0.0, 1.0).log_prob(z[..., 0]) + dist.Normal(z[..., 0], 1.0).log_prob(x)

    torch.testing.assert_close(target.log_prob(z), expected)
    assert target.rows == N and not list(target.parameters())


def test_a_plate_within_the_rows_belongs_to_them():
    x = torch.randn(N)
    target = flowvi.from_pyro(nested_plates, x, local="data")
    z = torch.randn(N, 2)

    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(z.sum(-1), 1.0).log_prob(x)

    torch.testing.assert_close(target.log_prob(z), expected)


@pytest.mark.parametrize("model", [length, subsampled, nested_plates])
def test_many_rows_at_once_are_rows_one_by_one(model):
    """From the second call of a size on, the model's own operations on all rows are recorded."""
    target = flowvi.from_pyro(model, torch.randn(N), local="data")
    z = torch.randn(3, 4, N, target.dim, requires_grad=True)

    def gradient():
        found = target.log_prob(z)
        return found.detach(), torch.autograd.grad(found.pow(2).sum(), z)[0]

    alone, together = gradient(), gradient()
    replayed = gradient()

    assert target._programs.works and target._programs.programs[12 * N] is not None
    for a, b, c in zip(alone, together, replayed, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(b, c, rtol=0, atol=0)


def hierarchy(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    twice = pyro.deterministic("twice", 2 * s)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(mu, twice))
        pyro.deterministic("half", z / 2)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_latents_that_rows_share_are_a_target_of_their_own():
    x = torch.randn(N)
    target = flowvi.from_pyro(hierarchy, x, local="data")
    z, theta = torch.randn(3, 4, N, 1), torch.randn(4, 2)
    mu, s = theta[:, 0], theta[:, 1].exp()

    # A log-normal's log is normal: the Jacobian cancels.
    prior = dist.Normal(mu[:, None], 2 * s[:, None]).log_prob(z[..., 0])
    expected = prior + dist.Normal(z[..., 0].exp(), 1.0).log_prob(x)
    torch.testing.assert_close(target.log_prob(z, theta=theta), expected)
    torch.testing.assert_close(target.log_prob(z, theta=theta), expected)
    assert target._programs.works
    one = target.log_prob(z[:, 1], theta=theta[1])
    torch.testing.assert_close(one, expected[:, 1])

    shared = dist.Normal(0.0, 1.0).log_prob(mu) + dist.HalfNormal(1.0).log_prob(s) + theta[:, 1]
    torch.testing.assert_close(target.shared.log_prob(theta), shared)
    assert set(target.shared.constrain(theta)) == {"mu", "s", "twice"}
    values = target.constrain(z, theta=theta)
    assert set(values) == {"z", "half"} and values["half"].shape == (3, 4, N)
    torch.testing.assert_close(target.unconstrain(values, theta=theta), z)


def test_shared_latents_are_missed_aloud():
    target = flowvi.from_pyro(hierarchy, torch.randn(N), local="data")

    with pytest.raises(
        ValueError, match="2 unconstrained coordinates that all rows share; theta has 0"
    ):
        target.log_prob(torch.randn(N, 1))
    with pytest.raises(ValueError, match="'mu', 's' of hierarchy are latents that all rows share"):
        flowvi.fit(target, epochs=1)


def mixture(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample(
            "y", dist.Categorical(torch.tensor([0.2, 0.8])), infer={"enumerate": "parallel"}
        )
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + 3 * y, 1.0), obs=x)


def test_discrete_latents_of_a_row_are_summed_out():
    x, z = torch.randn(N), torch.randn(2, N, 1)
    target = flowvi.from_pyro(mixture, x, local="data")

    parts = [dist.Normal(z[..., 0] + 3 * y, 1.0).log_prob(x) for y in (0, 1)]
    both = torch.stack(parts) + torch.tensor([0.2, 0.8]).log().reshape(2, 1, 1)

    expected = both.logsumexp(0) + dist.Normal(0.0, 1.0).log_prob(z[..., 0])
    torch.testing.assert_close(target.log_prob(z), expected)


@pytest.mark.parametrize("kind", ["dataset", "loader"])
def test_data_sets_stand_for_their_items(decoder, x, kind):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            return x[i]

    data = Rows() if kind == "dataset" else DataLoader(Rows(), batch_size=5)
    target = flowvi.from_pyro(vae(decoder), data, local="data")
    z = torch.randn(2, 3, D)

    found = target.log_prob(z, target.batch([7, 1, 4]))

    torch.testing.assert_close(found, sum(by_hand(decoder, z, x[[7, 1, 4]])))


def test_tuples_of_a_data_set_are_several_arguments():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z * x, 1.0), obs=y)

    x, y = torch.randn(N), torch.randn(N)
    by_items = flowvi.from_pyro(model, TensorDataset(x, y), local="data")
    by_tensors = flowvi.from_pyro(model, x, y, local="data")
    z = torch.randn(N, 1)

    torch.testing.assert_close(by_items.log_prob(z), by_tensors.log_prob(z))


def test_a_density_by_hand_has_rows_too(x, decoder):
    class Joint(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, values, x):
            return sum(by_hand(self.decoder, values["z"], x))

    target = flowvi.from_density(Joint(), {"z": flowvi.Site((D,))}, data=x, local="row")
    z = torch.randn(3, N, D)

    torch.testing.assert_close(target.log_prob(z), sum(by_hand(decoder, z, x)))
    assert len(list(target.parameters())) == 4


def test_simulated_rows_follow_the_model():
    target = flowvi.from_pyro(length, torch.zeros(N), local="data")

    drawn = target.prior(4000, seed=1)
    given = target.predictive(torch.full((500, N, 1), 2.0), seed=2)["x"]

    apart = drawn["x"] - drawn["z"]
    assert abs(drawn["z"].std() - 1) < 4 * 0.5 / 4000**0.5 * 2
    assert abs(apart.mean()) < 4 / 4000**0.5 and abs((apart * drawn["z"]).mean()) < 4 / 4000**0.5
    assert given.shape == (500, N) and abs(given.mean() - 2) < 4 / (500 * N) ** 0.5


def test_rows_that_hang_together_are_refused():
    def centred(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + x.mean(), 1.0), obs=x)

    with pytest.raises(flowvi.ModelError, match="rows of plate 'data' do not stand for themselves"):
        flowvi.from_pyro(centred, torch.randn(N), local="data")


@pytest.mark.parametrize(
    ("local", "words"),
    [("rows", "no plate of that name .* its plates are: data"), ("pair", "no plate of that name")],
)
def test_plates_that_are_not_there_are_refused(local, words):
    with pytest.raises(flowvi.ModelError, match=words):
        flowvi.from_pyro(length, torch.randn(N), local=local)


def test_a_plate_without_latents_is_refused():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    with pytest.raises(flowvi.ModelError, match="no latent site in that plate; its latents are mu"):
        flowvi.from_pyro(model, torch.randn(N), local="data")


def test_rows_of_another_shape_are_refused(decoder, x):
    target = flowvi.from_pyro(vae(decoder), x, local="data")

    with pytest.raises(ValueError, match=r"tensors of shapes \('N', 3\); got \(5, 4\)"):
        target.log_prob(torch.zeros(5, D), torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"B = 5 rows and D = 2"):
        target.log_prob(torch.zeros(4, D), x[:5])


@pytest.mark.parametrize("places", [[0, N], [-1], [0.5]])
def test_rows_that_are_not_there_are_refused(places):
    target = flowvi.from_pyro(length, torch.randn(N), local="data")

    with pytest.raises(ValueError, match=f"whole numbers from 0 to {N - 1}; got"):
        target.batch(places)


def test_batch_norm_is_refused():
    layers = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Linear(4, P))

    with pytest.raises(flowvi.ModelError, match=r"fails on one: .* batch norm .*eval"):
        flowvi.from_pyro(vae(layers), (torch.rand(N, P) > 0.5).double(), local="data")
