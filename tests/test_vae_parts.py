"""Nets, data, priors and guides of a VAE are what their names say."""

import numpy as np
import pyro
import pytest
import torch
from families import perturbed
from scipy.io import savemat

from flowvi.flows import Flip, Permutation
from flowvi.vae import (
    NETS,
    POSTERIORS,
    PRIORS,
    Binarise,
    build,
    load,
    nets,
    posterior,
    propose_likelihood,
)
from flowvi.vae.maps import Cropped, Padded
from flowvi.vae.priors import MixturePrior

SIZE, LATENT = (8, 8), 3
SMALL = [name for name in PRIORS if name != "glow"]  # Importance sampling will do.
CODE = 16  # Length of a code that is an image.
LIKE = (torch.rand(40, *SIZE, generator=torch.Generator().manual_seed(1)) < 0.3).double()


def made(net="mlp", prior="normal", **parts):
    maps = net == "maps" or prior == "glow"
    return build(LIKE, CODE if maps else LATENT, net=net, prior=prior, **parts)


@pytest.mark.parametrize("size", [(8, 8), (28, 20)])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("net", NETS)
def test_nets_have_the_shapes_that_were_asked_for(net, outputs, size):
    latent = 128 if net == "maps" else LATENT
    bodies = NETS[net](size, latent, outputs)

    assert bodies.encoder(torch.randn(4, 1, *size)).shape == (4, bodies.width)
    assert bodies.decoder(torch.randn(4, latent)).shape == (4, outputs, *size)


@pytest.mark.parametrize("net", NETS)
def test_nets_treat_every_image_alone(net):
    """No normalisation over the batch: an image's features are its own."""
    encoder, decoder = made(net=net).guide.encoder, made(net=net).generator.decoder
    z = torch.randn(5, 4, made(net=net).dim)

    torch.testing.assert_close(encoder(LIKE)[3], encoder(LIKE[3]))
    torch.testing.assert_close(decoder(z)[2, 1], decoder(z[2, 1]))


@pytest.mark.parametrize("net", NETS)
def test_a_fresh_decoder_draws_the_pixel_means(net):
    vae = made(net=net)

    found = vae.generator.mean(torch.zeros(vae.dim))

    torch.testing.assert_close(found, LIKE.mean(0), rtol=0.0, atol=0.15)


def test_sizes_that_do_not_suit_a_net_are_refused():
    with pytest.raises(ValueError, match="8 x 6 must be divisible by 4"):
        NETS["conv"]((8, 6), LATENT, 1)
    with pytest.raises(ValueError, match=r"codes of 8 x 8 pixels.*multiple of 64; got 100"):
        NETS["maps"]((28, 20), 100, 1)
    with pytest.raises(ValueError, match="hidden must name"):
        NETS["mlp"]((8, 6), LATENT, 1, hidden=())


def test_padding_is_undone_by_cropping():
    x = torch.randn(2, 1, 28, 20)

    assert Padded((28, 20))(x).shape == (2, 1, 32, 32)
    assert torch.equal(Cropped((28, 20))(Padded((28, 20))(x)), x)


@pytest.mark.parametrize("name", POSTERIORS)
def test_every_layer_of_a_guide_reads_the_image(name):
    """All parameters are functions of the features, but those of the f-VAE's flow."""
    guide = perturbed(posterior(name, LATENT, 5))
    first, second = torch.randn(2, 5)
    x = torch.randn(6, LATENT)

    def flatten(layer):
        return (
            [m for part in layer.layers for m in flatten(part)]
            if hasattr(layer, "layers")
            else [layer]
        )

    layers = [*flatten(guide.flow), guide.affine]
    reads = [not torch.equal(m(x, first)[0], m(x, second)[0]) for m in layers]
    fixed = [isinstance(m, Flip | Permutation) for m in layers]
    fixed[-1] = name not in ("gaussian", "fullrank")  # Scales and shifts of all images alike.

    if name in ("fvae", "shifted"):
        assert reads == [True] + [False] * (len(layers) - 1)
    else:
        assert reads == [not is_fixed for is_fixed in fixed]


@pytest.mark.parametrize("name", POSTERIORS)
def test_all_parameters_of_a_guide_are_trained(name):
    guide = perturbed(posterior(name, LATENT, 5))
    z, log_q = guide.sample((9,), torch.randn(4, 5))

    (z.square().sum() + log_q.sum()).backward()

    trained = [p for p in guide.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_guide_scores_its_own_draws(name):
    """The log determinant is one number for each draw, of all layers: nothing adds up over rows."""
    guide, context = perturbed(posterior(name, LATENT, 5)), torch.randn(4, 5)

    z, log_q = guide.sample((9,), context)

    assert log_q.shape == (9, 4)
    torch.testing.assert_close(guide.log_prob(z, context), log_q)
    torch.testing.assert_close(guide.log_prob(z[:, 2], context[2]), log_q[:, 2])


def test_the_f_vae_posterior_knows_the_image_by_a_shift_alone():
    guide = perturbed(posterior("fvae", LATENT, 5))
    shift = guide.flow.layers[0]
    u, context = torch.randn(7, LATENT), torch.randn(2, 5)
    moved = shift.inverse(shift(u, context[0])[0], context[1])[0]

    first, second = guide.transport(u, context[0])[0], guide.transport(moved, context[1])[0]

    torch.testing.assert_close(first, second)


def wide_prior(name):
    """A prior of about unit scale, away from its start."""
    prior = perturbed(made(prior=name).generator.prior)
    if name == "vamp":
        with torch.no_grad():
            prior.guide.affine.params.value[LATENT:] += 1.0
    return prior


@pytest.mark.parametrize("name", SMALL)
def test_a_prior_is_a_normalised_density(name):
    """Importance sampling from a wide normal finds the norm 1."""
    prior = wide_prior(name)
    wide = torch.distributions.Normal(torch.zeros(prior.dim), 3.0)
    z = wide.sample((40_000,))

    with torch.no_grad():
        weight = (prior.log_prob(z) - wide.log_prob(z).sum(-1)).exp()

    error = weight.std() / len(z) ** 0.5
    assert error < 0.05
    assert abs(weight.mean() - 1) < 4 * error


@pytest.mark.parametrize("name", SMALL)
def test_draws_of_a_prior_follow_its_density(name):
    """E[q / p] over draws of p is one for any density q."""
    prior = wide_prior(name)
    narrow = torch.distributions.Normal(torch.full((prior.dim,), 0.2), 0.4)
    z = prior().sample((40_000,))

    with torch.no_grad():
        weight = (narrow.log_prob(z).sum(-1) - prior.log_prob(z)).exp()

    assert abs(weight.mean() - 1) < 4 * weight.std() / len(z) ** 0.5


@pytest.mark.parametrize("name", ["glow", "maf", "coupling"])
def test_a_flow_prior_scores_the_flow_s_own_draws(name):
    prior = perturbed(made(prior=name).generator.prior)

    z, log_q = prior.density.sample((9,))

    torch.testing.assert_close(prior.log_prob(z), log_q)


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_is_a_site_of_a_pyro_model(name):
    vae = made(prior=name)

    trace = pyro.poutine.trace(vae.model).get_trace(LIKE[:6])
    trace.compute_log_prob()

    z = trace.nodes["z"]
    assert z["value"].shape == (6, vae.dim)
    torch.testing.assert_close(z["log_prob"], vae.generator.prior.log_prob(z["value"]))
    assert trace.nodes["x"]["log_prob"].shape == (6,)


@pytest.mark.parametrize("name", PRIORS)
def test_the_parameters_of_a_prior_are_parameters_of_the_model(name):
    vae = made(prior=name)

    trace = pyro.poutine.trace(vae.model).get_trace(LIKE[:6])
    params = {n.split("$$$")[1] for n in trace.param_nodes if n.startswith("prior")}

    assert params == {n for n, _ in vae.generator.prior.named_parameters()}


def test_a_vamp_prior_is_the_guide_s_mixture_over_its_images():
    vae = perturbed(made(prior="vamp", prior_sizes={"components": 4}).generator)
    prior, z = vae.prior, torch.randn(9, LATENT)

    parts = [prior.guide.log_prob(z, prior.encoder(image)).exp() for image in prior.images]
    weights = prior.logits.softmax(0)

    expected = sum(w * p for w, p in zip(weights, parts, strict=True)).log()
    torch.testing.assert_close(prior.log_prob(z), expected)
    assert ((prior.images > 0) & (prior.images < 1)).all()


def test_a_mixture_prior_scores_as_torch_s_mixture_does():
    prior, z = perturbed(MixturePrior(LATENT, 4)), torch.randn(9, 2, LATENT)
    parts = torch.distributions.Normal(prior.loc, prior.log_scale.exp())
    whole = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=prior.logits),
        torch.distributions.Independent(parts, 1),
    )

    torch.testing.assert_close(prior.log_prob(z), whole.log_prob(z))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"guide": "gausian"}, "No guide of a VAE named 'gausian'.*Choose from coupling"),
        ({"prior": "flow"}, "No prior named 'flow'.*Choose from coupling, glow"),
        ({"net": "resnet"}, "No net named 'resnet'.*Choose from conv, maps"),
        ({"likelihood": "bce"}, "No likelihood named 'bce'"),
        ({"net_sizes": {"width": 3}}, "net 'mlp' has no size 'width'; it takes hidden, activation"),
        ({"guide": "iaf", "guide_sizes": {"rank": 3}}, "guide 'iaf' does not take rank=3"),
        ({"prior": "vamp", "prior_sizes": {"components": 99}}, "between 1 and .* 40; got 99"),
    ],
)
def test_unknown_parts_are_refused_by_name(parts, words):
    with pytest.raises(ValueError, match=words):
        made(**parts)


def test_grey_values_are_no_data_of_a_bernoulli_likelihood():
    with pytest.raises(ValueError, match="Binarise them"):
        build(LIKE * 0.5, LATENT)


def test_building_leaves_the_generators_alone():
    state = torch.get_rng_state()

    first, second = made(guide="planar"), made(guide="planar")

    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(first.guide.parameters(), second.guide.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def file(tmp_path):
    """A file of images in three splits, with bits and labels of the first two."""
    rng = np.random.default_rng(0)
    arrays = {
        f"{k}_x": rng.integers(0, 256, (30, 4, 4), np.uint8) for k in ("train", "val", "test")
    }
    arrays |= {"train_y": np.arange(30, dtype=np.uint8), "val_y": np.arange(30, dtype=np.uint8)}
    bits = (rng.random((30, 16)) < 0.5).astype(np.uint8)
    arrays["val_bits"] = np.packbits(bits, axis=1)
    np.savez(tmp_path / "some.npz", **arrays)
    return tmp_path / "some.npz", arrays, bits


def test_static_pixels_are_those_of_the_file_or_drawn_once(file):
    path, arrays, bits = file

    first, second = load(path), load(path)

    assert first.name == "some" and first.visit is None and first.size == (4, 4)
    assert np.array_equal(first.val.numpy().reshape(30, -1), bits)
    assert torch.equal(first.train, second.train)
    assert set(first.train.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(first.train[0], torch.as_tensor(arrays["train_x"][0] > 127))
    assert torch.equal(first.labels["val"], torch.arange(30)) and "test" not in first.labels


def test_other_ways_to_read_pixels(file):
    path, arrays, _ = file

    threshold, grey, levels = (load(path, way) for way in ("threshold", "grey", "levels"))

    assert np.array_equal(threshold.test.numpy(), arrays["test_x"] > 127)
    assert np.array_equal(levels.train.numpy(), arrays["train_x"])
    torch.testing.assert_close(grey.train, levels.train / 255)


def test_dynamic_pixels_are_drawn_at_every_visit(file):
    path, arrays, _ = file
    images = load(path, "dynamic")

    visits = torch.stack([images.visit(images.train) for _ in range(400)])
    rows = images.rows

    assert not torch.equal(visits[0], visits[1])
    grey = torch.as_tensor(arrays["train_x"]) / 255
    error = (grey * (1 - grey) / len(visits)).sqrt()
    assert ((visits.mean(0) - grey).abs() <= 4.5 * error).all()
    assert set(images.test.unique().tolist()) == {0.0, 1.0}
    assert len(rows) == 30 and set(rows[0].unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(torch.stack([rows[0] for _ in range(9)]).std(0), torch.zeros(4, 4))
    assert set(images.example.unique().tolist()) == {0.0, 1.0}


def test_a_binarisation_with_a_seed_has_a_generator_of_its_own():
    state, grey = torch.get_rng_state(), torch.rand(5, 4, 4, generator=torch.Generator())

    first, second = Binarise(3)(grey), Binarise(3)(grey)

    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_array_is_cut_by_an_order_of_the_file(tmp_path):
    x = np.arange(40, dtype=np.uint8).reshape(10, 2, 2)
    order = np.random.default_rng(0).permutation(10)
    np.savez(tmp_path / "f.npz", x=x, perm_1=np.arange(10), perm_2=order)

    images = load(tmp_path / "f.npz", "levels", split="perm_2")

    whole = torch.cat([images.train, images.val, images.test])
    assert [len(images.train), len(images.val), len(images.test)] == [8, 1, 1]
    assert np.array_equal(whole.numpy(), x[order])
    assert torch.equal(load(tmp_path / "f.npz", "levels").test[0], torch.as_tensor(x[9]).double())


def letters(rows, rng):
    """Black-and-white images that are not their own transpose, (N, 28, 28)."""
    return (rng.random((rows, 28, 28)) < 0.3).astype(np.uint8)


def test_fixed_mnist_is_read_from_its_folder(tmp_path):
    rng = np.random.default_rng(1)
    held = {"train": letters(4, rng), "valid": letters(2, rng), "test": letters(3, rng)}
    for word, bits in held.items():
        np.savetxt(tmp_path / f"binarized_mnist_{word}.amat", bits.reshape(len(bits), -1), "%d")

    images = load(tmp_path)

    for split, word in (("train", "train"), ("val", "valid"), ("test", "test")):
        assert np.array_equal(getattr(images, split).numpy(), held[word])
    assert torch.equal(load(tmp_path / "binarized_mnist_test.amat").test, images.test)
    (tmp_path / "binarized_mnist_test.amat").write_text("0 1 2")
    with pytest.raises(ValueError, match=r"_test\.amat must hold 784 zeros and ones.*got 2, and 1"):
        load(tmp_path)
    (tmp_path / "binarized_mnist_test.amat").unlink()
    with pytest.raises(ValueError, match=r"one \.amat file with 'test' in its name.*found none"):
        load(tmp_path)


def test_matlab_files_are_read_upright(tmp_path):
    rng = np.random.default_rng(2)
    shapes = {k: letters(n, rng) for k, n in (("train", 4), ("val", 2), ("test", 3))}
    by_column = {k: x.transpose(0, 2, 1).reshape(len(x), -1) for k, x in shapes.items()}
    labels = {"train_labels": np.arange(4)[None], "test_labels": np.arange(3)[None]}
    held = {f"{k}_data": 1 - x for k, x in by_column.items()}
    savemat(tmp_path / "caltech.mat", {**held, **labels})
    grey = rng.integers(0, 256, (1350 + 3, 28, 28)) / 255
    columns = grey.transpose(0, 2, 1).reshape(len(grey), -1).T
    savemat(tmp_path / "chardata.mat", {"data": columns[:, :1350], "testdata": columns[:, 1350:]})
    savemat(tmp_path / "other.mat", {"y": columns[:, :3]})
    (tmp_path / "text.mat").write_text("no archive, but long enough for a header" * 10)

    caltech, omniglot = load(tmp_path / "caltech.mat"), load(tmp_path / "chardata.mat", "grey")

    assert all(np.array_equal(getattr(caltech, k).numpy(), x) for k, x in shapes.items())
    assert caltech.labels["test"].tolist() == [0, 1, 2]
    np.testing.assert_allclose(omniglot.test.numpy(), grey[1350:], atol=1e-7)
    assert [len(omniglot.train), len(omniglot.val)] == [5, 1345]
    whole = torch.cat([omniglot.train, omniglot.val]).sum((1, 2)).sort().values.numpy()
    np.testing.assert_allclose(whole, np.sort(grey[:1350].sum((1, 2))), rtol=1e-6)
    with pytest.raises(ValueError, match=r"must hold data, testdata or train_data.*it has y"):
        load(tmp_path / "other.mat")
    with pytest.raises(ValueError, match="no MATLAB file"):
        load(tmp_path / "text.mat")


@pytest.mark.parametrize("name", ["f.mat", "f.npz"])
@pytest.mark.parametrize("harm", [lambda b: b[:2000], lambda b: b[:1500] + bytes(9) + b[1509:]])
def test_damaged_image_files_are_named(tmp_path, name, harm):
    x = np.random.default_rng(3).integers(0, 2, (1400, 784)).astype(np.uint8)
    if name == "f.mat":
        savemat(tmp_path / name, {"data": x.T, "testdata": x[:9].T}, do_compression=True)
    else:
        np.savez_compressed(tmp_path / name, x=x.reshape(-1, 28, 28))
    (tmp_path / name).write_bytes(harm((tmp_path / name).read_bytes()))

    with pytest.raises(ValueError, match=rf"{name} is (no|not) .*damaged"):
        load(tmp_path / name)


def test_digits_come_without_a_file():
    pytest.importorskip("sklearn")

    images = load()

    assert [len(images.train), len(images.val), len(images.test)] == [1397, 200, 200]
    assert images.size == (8, 8) and images.first(50, 10).test.shape == (10, 8, 8)
    assert set(images.labels["test"].tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"train_x": np.zeros((3, 2, 2), np.uint8)}, "no array 'val_x'; it has train_x"),
        (
            {"x": np.zeros((30, 2, 2))},
            "255 for this likelihood; got float64.*continuous_bernoulli or gaussian",
        ),
        ({"x": np.zeros((30, 4), np.uint8)}, r"'x' must have shape \(N, H, W\).*\(30, 4\)"),
        ({"x": np.full((30, 2, 2), 1.5)}, "whole grey levels 0 to 255, or values in"),
        ({"x": np.full((30, 2, 2), np.nan)}, "whole grey levels 0 to 255, or values in"),
        ({"x": np.zeros((0, 2, 2), np.uint8)}, "and numbers; got uint8 of shape"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "f.npz", **arrays)

    with pytest.raises(ValueError, match=words):
        load(tmp_path / "f.npz")


def test_values_in_the_unit_interval_are_grey(tmp_path):
    x = np.random.default_rng(0).random((30, 2, 2)).astype(np.float32)
    np.savez(tmp_path / "f.npz", x=x)

    images = load(tmp_path / "f.npz", "grey")

    np.testing.assert_array_equal(images.train.numpy(), x[: len(images.train)])
    with pytest.raises(ValueError, match=r"'x' .*load\(path, 'grey'"):
        load(tmp_path / "f.npz", "levels")


def test_floats_get_a_likelihood_that_suits_them(tmp_path):
    """Ink and paper, tones, and floats that are 0 and 1 alone."""
    rng = np.random.default_rng(0)
    ink = (rng.random((30, 2, 2)) < 0.5).astype(np.float32)
    pixels = {"bits": ink, "ink": abs(ink - 0.01), "tones": rng.uniform(0.2, 0.8, ink.shape)}
    found = {}
    for name, x in pixels.items():
        np.savez(tmp_path / f"{name}.npz", x=x)
        found[name] = propose_likelihood(tmp_path / f"{name}.npz")

    assert {name: one.likelihood for name, one in found.items()} == {
        "bits": "bernoulli",
        "ink": "continuous_bernoulli",
        "tones": "gaussian",
    }
    assert not found["bits"].reason and "100% of them" in found["ink"].reason
    assert "0% of them" in found["tones"].reason
    images = load(tmp_path / "bits.npz")
    np.testing.assert_array_equal(images.train.numpy(), ink[: len(images.train)])
    assert propose_likelihood().likelihood == "bernoulli"


def test_a_file_that_is_missing_or_no_archive_is_named(tmp_path):
    (tmp_path / "f.npz").write_text("no archive")

    with pytest.raises(ValueError, match=r"not an \.npz file"):
        load(tmp_path / "f.npz")
    with pytest.raises(ValueError, match="There is no file"):
        load(tmp_path / "g.npz")
    with pytest.raises(ValueError, match="Choose from static, dynamic"):
        load(binarise="otsu")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["down", "up"])
def test_gated_convolutions_start_by_passing_on_what_comes_in(kind, stride):
    """Several in a row neither lose nor blow up what tells one image from another."""
    layer = {"down": nets._down, "up": nets._up}[kind]
    x = torch.randn(4, 16, 64, 64)
    for _ in range(2):
        y = layer(16, 16, stride)(x).detach()[..., 2:-2, 2:-2]
        assert 0.9 < y.std() / x.std() < 1.15
        x = y


def test_a_learnt_scale_starts_at_half_of_what_the_pixels_vary_by():
    x = torch.linspace(0.0, 1.0, 16).reshape(4, 4) + 0.2 * torch.randn(500, 4, 4)

    own = build(x, 2, likelihood="gaussian").generator.likelihood
    told = build(x, 2, likelihood="gaussian", likelihood_sizes={"scale": 0.5})

    fixed = build(x, 2, likelihood="gaussian", likelihood_sizes={"learned": False})

    assert float(fixed.generator.likelihood.scale) == pytest.approx(0.3)
    assert float(own.scale.detach()) == pytest.approx(0.1, rel=0.02)
    assert float(told.generator.likelihood.scale.detach()) == pytest.approx(0.5)
