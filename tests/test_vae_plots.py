"""Pictures of images show what they are given, on the axes that they are given."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from flowvi.plots import plot_epochs, plot_images, plot_latent_map, plot_reconstructions

mpl.use("Agg")


@pytest.fixture(autouse=True)
def same_style():
    """The user's style is as it was, and no figure is left open."""
    before = dict(mpl.rcParams)
    yield
    plt.close("all")
    assert dict(mpl.rcParams) == before


def sheet(ax):
    """What was drawn, with zeros between the images."""
    (image,) = ax.images
    return np.ma.filled(np.ma.masked_invalid(image.get_array()), 0.0)


def test_images_stand_in_a_grid_row_by_row():
    images = np.arange(1.0, 6.0).reshape(5, 1, 1) / 5 * np.ones((5, 2, 3))

    found = sheet(plot_images(images, columns=2))

    assert found.shape == (3 * 3 - 1, 2 * 4 - 1)
    np.testing.assert_allclose(found[:2, :3], 0.2)
    np.testing.assert_allclose(found[:2, 4:], 0.4)
    np.testing.assert_allclose(found[3:5, :3], 0.6)
    np.testing.assert_allclose(found[6:, 4:], 0.0)


def test_rows_of_images_have_names():
    images = np.random.default_rng(0).random((4, 8, 8))

    ax = plot_reconstructions(images, images)

    ax.figure.canvas.draw()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["image", "mean"]
    found = sheet(ax)
    np.testing.assert_allclose(found[:8, :8], images[0])
    np.testing.assert_allclose(found[9:, :8], images[0])


def test_pictures_are_drawn_on_the_axes_that_are_given():
    for draw in (
        lambda ax: plot_images(np.zeros((2, 4, 4)), ax=ax),
        lambda ax: plot_latent_map(np.zeros((5, 2)), ax=ax),
        lambda ax: plot_epochs({"epoch": [1], "bound": [-3.0], "validation": [np.nan]}, ax=ax),
    ):
        _, ax = plt.subplots()
        assert draw(ax) is ax
        ax.figure.canvas.draw()


def test_a_map_of_two_coordinates_shows_them_and_one_of_more_their_main_plane():
    rng = np.random.default_rng(0)
    plane, turn = rng.normal(size=(50, 2)) * [3, 1], np.linalg.qr(rng.normal(size=(5, 5)))[0]

    flat = plot_latent_map(plane)
    deep = plot_latent_map(plane @ turn[:2] + 1e-9)

    np.testing.assert_allclose(np.transpose(flat.lines[0].get_data()), plane)
    seen = np.transpose(deep.lines[0].get_data())
    np.testing.assert_allclose(
        np.abs(np.linalg.svd(seen)[1]), np.linalg.svd(plane - plane.mean(0))[1], rtol=1e-6
    )
    assert "of the variance" in deep.get_xlabel()


@pytest.mark.parametrize("classes", [3, 30])
def test_classes_are_coloured(classes):
    z = np.random.default_rng(0).normal(size=(90, 2))

    ax = plot_latent_map(z, np.arange(90) % classes)

    ax.figure.canvas.draw()
    assert len(ax.texts) == (classes if classes <= 10 else 0)


def test_epochs_show_both_bounds_and_forget_the_first_ones():
    bound = -30 - 1000 * np.exp(-np.arange(40.0))
    history = {"epoch": np.arange(1, 41), "bound": bound, "validation": bound - 1}

    ax = plot_epochs(history)

    # The third line marks the first epochs, which lie below the scale.
    assert [line.get_label() for line in ax.lines][2:] == ["lower"] and len(ax.lines) == 3
    assert ax.get_ylim()[0] > -60


def test_the_first_epoch_is_shown_where_it_is_not_far_off():
    bound = np.array([-31.0, -29.0, -27.0])

    ax = plot_epochs({"epoch": [1, 2, 3], "bound": bound, "validation": bound})

    assert ax.get_ylim()[0] < -31.0 and len(ax.lines) == 2


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: plot_images(np.zeros((4, 4))), "shape .*got"),
        (lambda: plot_latent_map(np.zeros((4, 1))), "D of at least 2"),
        (lambda: plot_epochs({"epoch": [1], "bound": [np.nan], "validation": [np.nan]}), "finite"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, words):
    with pytest.raises(ValueError, match=words):
        draw()
