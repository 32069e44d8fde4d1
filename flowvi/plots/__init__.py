"""Pictures of a fit: each function returns the matplotlib axes that it drew on."""

from flowvi.plots.calibration import plot_calibration
from flowvi.plots.caterpillar import plot_caterpillar
from flowvi.plots.compare import plot_compare
from flowvi.plots.evidence import plot_evidence
from flowvi.plots.images import (
    plot_epochs,
    plot_images,
    plot_latent_map,
    plot_reconstructions,
)
from flowvi.plots.khat import plot_khat
from flowvi.plots.loss import plot_loss
from flowvi.plots.marginals import plot_marginals
from flowvi.plots.pair import plot_pair
from flowvi.plots.predictive import plot_predictive
from flowvi.plots.recovery import plot_coverage, plot_held_out, plot_recovery
from flowvi.plots.sbc import plot_sbc
from flowvi.plots.sensitivity import plot_sensitivity
from flowvi.plots.table import plot_associations, plot_columns
from flowvi.plots.where import plot_where

__all__ = [
    "plot_associations",
    "plot_calibration",
    "plot_caterpillar",
    "plot_columns",
    "plot_compare",
    "plot_coverage",
    "plot_epochs",
    "plot_evidence",
    "plot_held_out",
    "plot_images",
    "plot_khat",
    "plot_latent_map",
    "plot_loss",
    "plot_marginals",
    "plot_pair",
    "plot_predictive",
    "plot_reconstructions",
    "plot_recovery",
    "plot_sbc",
    "plot_sensitivity",
    "plot_where",
]
