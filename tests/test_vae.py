"""A variational autoencoder is right: its bounds, both f-VAEs, what is measured and saved."""

import copy
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import perturbed
from torch import nn
from torch.distributions import MultivariateNormal

import flowvi
from flowvi import vae
from flowvi.cli import main
from flowvi.flows import FLOWS, Chain, Diagonal, Inverse, Planar
from flowvi.guides import FlowGuide
from flowvi.guides.amortized import Amortised
from flowvi.training.epochs import Epochs
from flowvi.vae.image_files import SPLITS
from flowvi.vae.likelihoods import Gaussian
from flowvi.vae.measures import great_circle
from flowvi.vae.nets import Decoder, Encoder
from flowvi.vae.posteriors import Shifted, posterior
from flowvi.vae.priors import FlowPrior, StandardNormal

SIZE, LATENT, SCALE = (2, 3), 2, 2.0
LIKE = (torch.rand(30, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.3).double()
TINY = {"hidden": (16,)}
WIDE = ("coupling", "fvae", "iaf", "spline", "spline_autoregressive")


class Linear:
    """A linear decoder of Gaussian images, whose evidence is known: probabilistic PCA."""

    def __init__(self, rows):
        self.weight = torch.randn(math.prod(SIZE), LATENT)
        self.mean = torch.randn(SIZE)
        body = nn.Sequential(
            nn.Linear(LATENT, math.prod(SIZE), bias=False), nn.Unflatten(-1, (1, *SIZE))
        )
        with torch.no_grad():
            body[0].weight.copy_(self.weight)
        decoder = Decoder(body, self.mean.unsqueeze(0).clone())
        # What is known is not trained.
        decoder = decoder.requires_grad_(False).eval()
        likelihood = Gaussian(SCALE, learned=False)
        self.generator = vae.Generator(StandardNormal(LATENT), decoder, likelihood)
        self.x = self.marginal().sample((rows,)).reshape(rows, *SIZE)
        self.target = flowvi.from_pyro(self.generator.model, self.x, local="data")

    def marginal(self):
        noise = SCALE**2 * torch.eye(math.prod(SIZE))
        return MultivariateNormal(self.mean.flatten(), self.weight @ self.weight.T + noise)

    def log_evidence(self):
        return self.marginal().log_prob(self.x.flatten(1))

    def posterior(self):
        precision = torch.eye(LATENT) + self.weight.T @ self.weight / SCALE**2
        pull = (self.x - self.mean).flatten(1) @ self.weight / SCALE**2
        return MultivariateNormal(
            torch.linalg.solve(precision, pull.T).T, precision_matrix=precision
        )

    def encoder(self, width):
        return Encoder(nn.Flatten(), width, self.mean, 10.0)


@pytest.mark.parametrize("name", vae.POSTERIORS)
def test_guide_and_model_are_the_densities_that_they_claim_to_be(name):
    """q(z | x) integrates to one and p(x, z) to the evidence, by draws of p and of q.

    Weighted against (p + q) / 2 no draw counts for more than two. A density of z_0 in place of z_K,
    log determinants that add up over the batch, or a term of a prior that the
    model does not have, would all show here.
    """
    linear, n = Linear(3), 5000
    sizes = {"hidden": 16} if name in WIDE else {}
    inner = perturbed(posterior(name, LATENT, math.prod(SIZE), **sizes))
    guide = Amortised(linear.encoder(math.prod(SIZE)), inner)

    with torch.no_grad():
        ours, log_q = guide.sample((n,), linear.x)
        exact = linear.posterior().sample((n,))
        log_q = torch.cat([log_q, guide.log_prob(exact, linear.x)])
        log_p = linear.target.log_prob(torch.cat([ours, exact]), linear.x) - linear.log_evidence()
        log_half = torch.logaddexp(log_p, log_q) - math.log(2)

    for log_density in (log_q, log_p):
        parts = (log_density - log_half).exp().unflatten(0, (2, n))
        error = (parts.var(1).sum(0) / n).sqrt() / 2
        assert (error > 1e-3).any(), "p and q lie apart: nothing was tested"
        assert ((parts.mean((0, 1)) - 1).abs() < 4.5 * error).all()


def test_a_gaussian_guide_reaches_the_evidence_of_a_linear_decoder():
    """The posterior is a normal with one covariance for all images: nothing is left between."""
    linear = Linear(40)
    inner = posterior("fullrank", LATENT, math.prod(SIZE))
    fit = flowvi.fit(
        linear.target,
        Amortised(linear.encoder(math.prod(SIZE)), inner),
        epochs=300,
        batch_size=40,
        lr=0.05,
        progress=False,
    )

    gap = linear.log_evidence().numpy() - fit.iw_bound(particles=200).elbo

    assert abs(gap.mean()) < 0.01


class FirstForm(nn.Module):
    """The f-VAE as its authors write it: z after the flow is normal, the decoder reads the code."""

    def __init__(self, decoder, likelihood, flow):
        super().__init__()
        self.decoder, self.likelihood, self.flow = decoder, likelihood, flow

    def forward(self, z):
        code, _ = self.flow(z)
        return self.decoder(code)


def test_the_two_writings_of_the_f_vae_have_one_elbo():
    r"""A flow in the guide, or in the prior: log p - log q is the same for each draw of the noise.

    With c = E(x) + s_1 u and z = F(c),

        log N(x; G(c), s_2) + log N(z; 0, 1) - log q(z | x)
        = log N(x; G(c), s_2) + log p(c) - log N(c; E(x), s_1),

    where p(c) = N(F(c); 0, 1) |det F'(c)| is a flow prior.
    """
    dim, shape = 64, (1, 8, 8)
    x = torch.rand(5, 8, 8)
    made = vae.build(
        x,
        dim,
        "shifted",
        "gaussian",
        "glow",
        "maps",
        prior_sizes={"shape": shape, "levels": 2, "steps": 1, "hidden": 4},
        net_sizes={"channels": 2},
    )
    for part in (made.generator, made.guide):
        perturbed(part, std=0.1)
    prior = made.generator.prior
    assert isinstance(prior, FlowPrior)
    # From unit noise to a code; F is its inverse.
    to_code = Chain([prior.density.flow, prior.density.affine])
    second = flowvi.from_pyro(made.generator.model, x, local="data")
    form = FirstForm(made.generator.decoder, made.generator.likelihood, to_code)
    generator = vae.Generator(StandardNormal(dim), form, made.generator.likelihood)
    first = flowvi.from_pyro(generator.model, x, local="data")
    inner = made.guide.guide
    pushed = FlowGuide(dim, Chain([inner.flow, inner.affine, Inverse(to_code)]), Diagonal(dim))
    guide = Amortised(made.guide.encoder, pushed)

    torch.manual_seed(3)
    code, log_q = made.guide.sample((4,), x)
    of_prior = second.log_prob(code, x) - log_q
    torch.manual_seed(3)
    z, log_q = guide.sample((4,), x)
    of_guide = first.log_prob(z, x) - log_q

    assert not torch.allclose(z, code)
    torch.testing.assert_close(of_guide, of_prior, rtol=1e-10, atol=0.0)


def test_the_general_f_vae_guide_is_a_flow_of_the_shifted_one():
    """F after a shift: the same noise gives F of what the shifted normal draws."""
    plain, whole = (
        posterior("shifted", LATENT, 5),
        perturbed(posterior("fvae", LATENT, 5, hidden=16)),
    )
    shift = whole.flow.layers[0]
    plain.flow = copy.deepcopy(shift)
    assert isinstance(shift, Shifted)
    context = torch.randn(4, 5)

    torch.manual_seed(1)
    code, _ = plain.sample((6,), context)
    torch.manual_seed(1)
    z, _ = whole.sample((6,), context)
    rest = Chain([*list(whole.flow.layers)[1:], whole.affine])

    torch.testing.assert_close(z, rest(code)[0])


@pytest.mark.parametrize(
    ("guide", "prior"),
    [("gaussian", "vamp"), ("iaf", "maf"), ("sylvester", "mixture"), ("fvae", "normal")],
)
def test_everything_that_was_trained_is_saved(guide, prior, tmp_path):
    """Also the layers of the flow, the encoder and the prior."""

    def fresh():
        sizes = {"components": 3} if prior == "vamp" else {}
        made = vae.build(LIKE, LATENT, guide, prior=prior, net_sizes=TINY, prior_sizes=sizes)
        return made, flowvi.from_pyro(made.model, LIKE, local="data")

    made, target = fresh()
    before = {k: v.clone() for k, v in (made.guide.state_dict() | target.state_dict()).items()}
    fit = flowvi.fit(target, made.guide, epochs=2, batch_size=10, lr=0.01, progress=False)
    after = fit.guide.state_dict() | target.state_dict()
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    fit.save(tmp_path / "fit")

    again, other = fresh()
    loaded = flowvi.load(tmp_path / "fit", other, again.guide)

    names = {
        k for k, p in [*fit.guide.named_parameters(), *target.named_parameters()] if p.requires_grad
    }
    assert names <= moved
    z = fit.guide.sample((3,), LIKE).z
    torch.testing.assert_close(loaded.guide.log_prob(z, LIKE), fit.guide.log_prob(z, LIKE))
    torch.testing.assert_close(other.log_prob(z, LIKE), target.log_prob(z, LIKE))


def test_a_vamp_prior_and_the_guide_stay_one():
    made = vae.build(LIKE, LATENT, prior="vamp", net_sizes=TINY, prior_sizes={"components": 3})
    target = flowvi.from_pyro(made.model, LIKE, local="data")

    fit = flowvi.fit(target, made.guide, epochs=1, batch_size=10, progress=False)

    prior, z = made.generator.prior, torch.randn(7, LATENT)
    parts = torch.stack(
        [fit.guide.log_prob(z.unsqueeze(1), u.unsqueeze(0))[:, 0] for u in prior.images]
    )
    weights = prior.logits.log_softmax(0).unsqueeze(-1)
    torch.testing.assert_close(prior.log_prob(z), torch.logsumexp(parts + weights, 0))


def test_images_that_are_drawn_at_every_visit_are_trained_on(tmp_path):
    grey = np.full((20, 4, 4), 128, np.uint8)
    np.savez(tmp_path / "grey.npz", **{f"{k}_x": grey for k in SPLITS})
    images = vae.load(tmp_path / "grey.npz", "dynamic")
    made = vae.build(images.example, LATENT, net_sizes=TINY)
    target = flowvi.from_pyro(made.model, images.rows, local="data")
    seen = []
    made.guide.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))

    flowvi.fit(target, made.guide, epochs=2, batch_size=20, progress=False)

    first, second = seen[-2:]  # of the two epochs
    assert all(set(x.unique().tolist()) == {0.0, 1.0} for x in seen)
    assert abs(first.mean() - second.mean()) > 0


class Known(nn.Module):
    """Features that are the first two pixels."""

    def forward(self, x):
        return x.flatten(1)[:, :2]


def test_active_units_are_those_whose_mean_follows_the_image():
    """Noise of the draws is taken off: a wide posterior that reads nothing is not active."""
    inner = FlowGuide(3, FLOWS["planar"](3, 2, depth=1), Diagonal(3, 2))
    with torch.no_grad():
        inner.affine.params.weight.zero_()
        inner.affine.params.value.zero_()
        inner.affine.params.weight[0, 0] = 2.0
        inner.affine.params.weight[1, 1] = 0.3
        inner.affine.params.value[5] = 1.5  # log scale of the third
    guide = Amortised(Known(), inner)
    x = torch.randn(4000, 2, 1)

    units = vae.active_units(guide, x, draws=20)

    noise = math.exp(3.0) / 20
    error = noise * (2 / len(x)) ** 0.5
    assert abs(units.variance[0] - 4 * x[:, 0].var()) < 0.1
    assert abs(units.variance[1] - 0.09 * x[:, 1].var()) < 0.02
    assert abs(units.variance[2]) < 4 * error < 0.1 * noise
    few = vae.ActiveUnits(units.variance, threshold=4 * error)
    assert few.count == 2 and str(few).startswith("2 of 3 units active")
    with pytest.raises(ValueError, match="two images and two draws"):
        vae.active_units(guide, x[:1])


def test_moments_are_those_of_the_draws_of_each_image():
    made = vae.build(LIKE, LATENT, "planar", net_sizes=TINY)
    perturbed(made.guide)

    mean, variance = vae.moments(made.guide, LIKE, draws=1000)

    z = made.guide.sample((1000,), LIKE).z
    error = (2 * variance / 1000).sqrt()
    assert ((mean - z.mean(0)).abs() < 5 * error).all()
    assert mean.shape == variance.shape == (30, LATENT)


def test_a_great_circle_keeps_the_length_of_codes_and_meets_its_ends():
    a, b = torch.randn(2, 5, 64)
    b = b / b.norm(dim=-1, keepdim=True) * a.norm(dim=-1, keepdim=True)

    path = great_circle(a, b, 7)

    torch.testing.assert_close(path[:, 0], a)
    torch.testing.assert_close(path[:, -1], b)
    torch.testing.assert_close(path.norm(dim=-1), a.norm(dim=-1, keepdim=True).expand(-1, 7))
    torch.testing.assert_close(great_circle(a, 2 * a, 3)[:, 1], 1.5 * a)


def test_a_traversal_changes_one_coordinate_at_a_time():
    generator = perturbed(vae.build(LIKE, LATENT, net_sizes=TINY).generator)
    z, values = torch.randn(LATENT), torch.tensor([-1.0, 0.5])

    images = vae.traversal(generator, z, [1, 0], values)

    torch.testing.assert_close(images[0, 1], generator.mean(torch.stack([z[0], values[1]])))
    torch.testing.assert_close(images[1, 0], generator.mean(torch.stack([values[0], z[1]])))


def test_pictures_of_a_model_are_images_from_zero_to_one():
    made = vae.build(255 * LIKE, LATENT, likelihood="discretised_logistic", net_sizes=TINY)
    state = torch.get_rng_state()

    found = [
        made.generator.sample(4, seed=1),
        vae.reconstructions(made.generator, made.guide, 255 * LIKE),
        vae.interpolation(made.generator, made.guide, 255 * LIKE[:2], 255 * LIKE[2:4], 5),
    ]

    assert [tuple(x.shape) for x in found] == [(4, 8, 8), (30, 8, 8), (2, 5, 8, 8)]
    assert all(((x >= 0) & (x <= 1)).all() for x in found)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], made.generator.sample(4, seed=1))


def test_a_plain_autoencoder_learns_to_copy():
    before = vae.plain_autoencoder(LIKE, 8, epochs=1, lr=1e-9, progress=False)
    after = vae.plain_autoencoder(LIKE, 8, epochs=60, batch_size=10, progress=False)

    with torch.no_grad():
        gain = after(LIKE).mean() - before(LIKE).mean()

    assert gain > 5
    assert after.mean(after.encode(LIKE)).shape == LIKE.shape


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with a file of small images, as the working directory."""
    rng = np.random.default_rng(0)
    x = {f"{k}_x": rng.integers(0, 256, (40, 8, 8), np.uint8) for k in SPLITS}
    np.savez(tmp_path / "tiny.npz", **x, test_y=rng.integers(0, 3, 40))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    few = ["--data", "tiny.npz", "--epochs", "2", "--latent", "3", "--particles", "7", "--quiet"]
    return CliRunner().invoke(main, ["vae", *few, *arguments])


def test_the_command_writes_a_fit_its_bounds_and_pictures(tiny):
    first = run("--out", "a")
    second = run("--guide", "iaf", "--prior", "maf", "--against", "a", "--out", "b")

    assert first.exit_code == 0, first.output
    assert second.exit_code == 0, second.output
    assert "L_7 better by, paired" in second.output and "paired" not in first.output
    names = {p.name for p in (tiny / "b").iterdir()}
    assert names == {
        *("epochs.png", "map.png", "samples.png", "reconstructions.png", "interpolation.png"),
        *("traversal.png", "report.html", "table.csv", "test_bounds.csv", "parts.json", "fit"),
    }
    table = np.genfromtxt(tiny / "a/test_bounds.csv", delimiter=",", names=True)
    assert len(table) == 40 and (table["elbo"] < table["bound"] + 1e-9).all()

    parts = json.loads((tiny / "b/parts.json").read_text())
    facts = {k: v for k, v in parts.items() if k not in ("data", "binarise")}
    images = vae.load("tiny.npz", parts["binarise"])
    made = vae.build(images.example, **facts)
    target = flowvi.from_pyro(made.model, images.rows, local="data")
    fit = flowvi.load("b/fit", target, made.guide)
    bounds = np.genfromtxt(tiny / "b/test_bounds.csv", delimiter=",", names=True)
    np.testing.assert_allclose(fit.iw_bound(images.test, 7).values, bounds["bound"])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_two_test_images_are_enough(tiny, count):
    with np.load("tiny.npz") as held:
        parts = dict(held)
    parts["test_x"], parts["test_y"] = parts["test_x"][:count], parts["test_y"][:count]
    np.savez("tiny.npz", **parts)

    done = run("--out", "few")

    if count == 1:
        assert "has 1 test images: at least two are needed" in done.output
        return
    assert done.exit_code == 0, done.output
    assert (tiny / "few/interpolation.png").exists() and (tiny / "few/report.html").exists()


def test_a_training_that_was_cut_off_is_gone_on_with(tiny, monkeypatch):
    whole = run("--out", "whole")
    validate = Epochs._validate

    def pressed(self, told):
        validate(self, told)
        if told.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Epochs, "_validate", pressed)
        cut = run("--out", "out")
    done, nothing = run("--resume", "out"), run("--resume", "out")

    assert whole.exit_code == 0 and cut.exit_code == 130 and "--resume out" in cut.stderr
    assert done.exit_code == 0 and nothing.exit_code == 2
    bounds = [Path(f, "test_bounds.csv").read_text() for f in ("whole", "out")]
    assert bounds[0] == bounds[1]


def test_the_command_says_which_guide_is_worth_it(tiny, monkeypatch):
    """The differences are paired, guides are trained as alone, and an interrupt changes nothing."""
    compare = ("--compare", "planar", "--test-images", "30")
    alone = run("--guide", "planar", "--test-images", "30", "--out", "alone")
    validate = Epochs._validate

    def pressed(self, told):
        validate(self, told)
        if told.epoch == 1 and any(isinstance(part, Planar) for part in self.guide.modules()):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Epochs, "_validate", pressed)
        cut = run(*compare, "--out", "out")
    done = run(*compare, "--resume", "out")

    assert (alone.exit_code, cut.exit_code, done.exit_code) == (0, 130, 0), done.output
    assert "Worth it:" in done.output and "Kept epoch 2 of 2; stopped by the limit" in done.output
    assert "Worth it:" not in cut.output
    files = [tiny / name / "test_bounds.csv" for name in ("out", "out/planar", "alone")]
    first, second = (np.genfromtxt(f, delimiter=",", names=True) for f in files[:2])
    apart = second["elbo"] - first["elbo"]
    gain, error = apart.mean(), apart.std(ddof=1) / 30**0.5
    with open(tiny / "out/guides.csv", newline="") as file:
        table = {row["guide"]: row for row in csv.DictReader(file)}
    assert list(table) == ["gaussian", "planar"]
    np.testing.assert_allclose(float(table["planar"]["elbo_better"]), gain)
    np.testing.assert_allclose(float(table["planar"]["elbo_better_se"]), error)
    assert f"planar gains {gain:.2f} +- {error:.2f} nats on gaussian" in done.output
    assert files[1].read_text() == files[2].read_text()
    assert not list((tiny / "out").rglob("checkpoint"))


def test_the_command_proposes_a_likelihood_for_floats(tiny):
    rng = np.random.default_rng(0)
    np.savez("tiny.npz", x=rng.uniform(0.2, 0.8, (120, 8, 8)))

    done = run("--out", "a")

    assert done.exit_code == 0, done.output
    assert "0% of them within 0.05 of an end: --likelihood gaussian" in done.stderr
    assert json.loads((tiny / "a/parts.json").read_text())["likelihood"] == "gaussian"


def test_the_command_reads_pixels_as_the_likelihood_needs_them(tiny):
    done = run("--likelihood", "discretised_logistic", "--net", "conv", "--out", "c")

    assert done.exit_code == 0, done.output
    assert "bits per pixel" in done.output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--guide", "ifa", "--out", "a"), 2, "Did you mean iaf?"),
        (("--against", "tiny", "--out", "a"), 2, "does not exist"),
        (("--against", ".", "--out", "a"), 1, "name a folder that `flowvi vae` wrote"),
        (("--net", "maps", "--latent", "3", "--out", "a"), 1, "multiple of 16; got 3"),
        (("--compare", "planar,ifa", "--out", "a"), 2, "Did you mean iaf?"),
        (("--compare", "iaf,iaf", "--out", "a"), 2, "names a guide twice"),
        (("--compare", "gaussian", "--out", "a"), 2, "which the others are compared with"),
        (("--compare", "iaf", "--against", ".", "--out", "a"), 2, "--compare or --against"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(tiny, arguments, code, words):
    done = run(*arguments)

    assert done.exit_code == code
    assert words in done.output


def test_runs_on_other_images_are_not_compared(tiny):
    assert run("--out", "a").exit_code == 0

    done = run("--against", "a", "--particles", "9", "--out", "b")

    assert done.exit_code == 1
    assert "bounds of 7 draws for 40 test images: compare with --particles 7" in done.output


def test_a_report_has_the_table_and_every_picture(tiny):
    assert run("--out", "r").exit_code == 0

    page = (tiny / "r/report.html").read_text()

    assert page.count("<img") == len(list((tiny / "r").glob("*.png")))
    assert "L_7, nats per image" in page and "http" not in page.replace("http-equiv", "")
