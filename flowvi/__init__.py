"""flowvi: normalizing-flow guides for arbitrary Bayesian models."""

from flowvi._version import __version__
from flowvi.amortised import Amortised, PerRow
from flowvi.blocks import BlockGuide, Blocks
from flowvi.bnn import LIKELIHOODS, PRIORS, bayesian
from flowvi.checkpoint import load
from flowvi.compare import compare
from flowvi.draws import Draws, bounds, diagnose, resample, where
from flowvi.evidence import evidence
from flowvi.fit import Fit, fit
from flowvi.flows import FLOWS
from flowvi.guides import GUIDES, FlowGuide, FullRank, MeanField
from flowvi.inference_data import to_inference_data
from flowvi.loo import loo
from flowvi.minibatch import Minibatch
from flowvi.multiplicative import Multiplicative
from flowvi.nested import NestedFit, nested
from flowvi.neutra import neutra
from flowvi.objectives import OBJECTIVES, elbo, iwelbo, renyi, wake_sleep
from flowvi.predict import Prediction, predict
from flowvi.pyro_elbo import IWELBO
from flowvi.pyro_guide import PyroGuide, pyro_guide
from flowvi.pyro_parts import GuideDistribution
from flowvi.records import Step
from flowvi.report import report
from flowvi.row_draws import RowBounds, RowDraws
from flowvi.row_fit import RowFit
from flowvi.row_pyro_guide import RowPyroGuide
from flowvi.row_training import Epoch
from flowvi.sbc import sbc
from flowvi.target import LocalTarget, ModelError, Site, Target, from_density, from_pyro

__all__ = [
    "FLOWS",
    "GUIDES",
    "IWELBO",
    "LIKELIHOODS",
    "OBJECTIVES",
    "PRIORS",
    "Amortised",
    "BlockGuide",
    "Blocks",
    "Draws",
    "Epoch",
    "Fit",
    "FlowGuide",
    "FullRank",
    "GuideDistribution",
    "LocalTarget",
    "MeanField",
    "Minibatch",
    "ModelError",
    "Multiplicative",
    "NestedFit",
    "PerRow",
    "Prediction",
    "PyroGuide",
    "RowBounds",
    "RowDraws",
    "RowFit",
    "RowPyroGuide",
    "Site",
    "Step",
    "Target",
    "__version__",
    "bayesian",
    "bounds",
    "compare",
    "diagnose",
    "elbo",
    "evidence",
    "fit",
    "from_density",
    "from_pyro",
    "iwelbo",
    "load",
    "loo",
    "nested",
    "neutra",
    "predict",
    "pyro_guide",
    "renyi",
    "report",
    "resample",
    "sbc",
    "to_inference_data",
    "wake_sleep",
    "where",
]
