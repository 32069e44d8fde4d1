"""flowvi: normalizing-flow guides for arbitrary Bayesian models."""

import sys

from flowvi._version import __version__
from flowvi.analysis.compare import compare
from flowvi.analysis.evidence import evidence
from flowvi.analysis.loo import loo
from flowvi.analysis.neutra import neutra
from flowvi.analysis.sbc import sbc
from flowvi.bnn import LIKELIHOODS, PRIORS, bayesian
from flowvi.compat import arviz_groups as groups
from flowvi.draws.diagnose import bounds, diagnose, where
from flowvi.draws.draws import Draws, RowDraws
from flowvi.draws.prediction import Prediction, predict
from flowvi.draws.resampling import resample
from flowvi.draws.row_bounds import RowBounds
from flowvi.fitting.fit import fit
from flowvi.fitting.fit_nested import nested
from flowvi.fitting.load import load
from flowvi.fitting.result import Fit, NestedFit, RowFit, StructuredFit
from flowvi.flows import FLOWS
from flowvi.guides import GUIDES, BlockGuide, Blocks, FlowGuide, FullRank, MeanField, Multiplicative
from flowvi.guides.amortized import Amortised, PerRow
from flowvi.interop.inference_data import to_inference_data
from flowvi.interop.pyro_distribution import GuideDistribution
from flowvi.interop.pyro_elbo import IWELBO
from flowvi.interop.pyro_guide import PyroGuide, pyro_guide
from flowvi.interop.pyro_row_guide import RowPyroGuide
from flowvi.objectives import OBJECTIVES, elbo, iwelbo, renyi, wake_sleep
from flowvi.objectives.nested import NestedTarget
from flowvi.reporting import report
from flowvi.targets import LocalTarget, ModelError, Site, Target, from_density, from_pyro
from flowvi.targets.structure import MarginalTarget, Structure, structure
from flowvi.training.epochs import Epoch
from flowvi.training.minibatch import Minibatch
from flowvi.training.records import Step
from flowvi.training.schedule import Schedule

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
    "MarginalTarget",
    "MeanField",
    "Minibatch",
    "ModelError",
    "Multiplicative",
    "NestedFit",
    "NestedTarget",
    "PerRow",
    "Prediction",
    "PyroGuide",
    "RowBounds",
    "RowDraws",
    "RowFit",
    "RowPyroGuide",
    "Schedule",
    "Site",
    "Step",
    "Structure",
    "StructuredFit",
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
    "structure",
    "to_inference_data",
    "wake_sleep",
    "where",
]


# Where `groups` was when pages first named it.
sys.modules[f"{__name__}.groups"] = groups


def __dir__() -> list[str]:
    return sorted(__all__)
