"""flowvi: normalizing-flow guides for arbitrary Bayesian models."""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from flowvi._version import __version__
from flowvi.compat import arviz_groups as groups

if TYPE_CHECKING:
    from flowvi.amortized.amortize import amortize
    from flowvi.amortized.guide import AmortizedGuide
    from flowvi.amortized.table import Fits
    from flowvi.analysis.average import average
    from flowvi.analysis.compare import compare
    from flowvi.analysis.diagnosis import diagnose
    from flowvi.analysis.evidence import evidence
    from flowvi.analysis.loo import loo
    from flowvi.analysis.neutra import neutra
    from flowvi.analysis.nuts import nuts
    from flowvi.analysis.sbc import sbc
    from flowvi.analysis.sensitivity import sensitivity
    from flowvi.bnn import LIKELIHOODS, PRIORS, bayesian
    from flowvi.draws.diagnose import bounds, where
    from flowvi.draws.draws import Draws, RowDraws
    from flowvi.draws.prediction import Prediction, predict
    from flowvi.draws.resampling import resample
    from flowvi.draws.row_bounds import RowBounds
    from flowvi.fitting.fit import fit
    from flowvi.fitting.fit_nested import nested
    from flowvi.fitting.load import load
    from flowvi.fitting.result import Fit, NestedFit, RowFit
    from flowvi.fitting.structured_fit import StructuredFit
    from flowvi.flows import FLOWS
    from flowvi.guides import (
        GUIDES,
        BlockGuide,
        Blocks,
        FlowGuide,
        FullRank,
        MeanField,
        Multiplicative,
        Prefixes,
    )
    from flowvi.guides.amortized import Amortised, PerRow
    from flowvi.interop.inference_data import to_inference_data
    from flowvi.interop.pyro_distribution import GuideDistribution
    from flowvi.interop.pyro_elbo import IWELBO
    from flowvi.interop.pyro_guide import PyroGuide, pyro_guide
    from flowvi.interop.pyro_row_guide import RowPyroGuide
    from flowvi.objectives import OBJECTIVES, elbo, iwelbo, renyi, wake_sleep
    from flowvi.objectives.nested import NestedTarget
    from flowvi.reporting import report
    from flowvi.runtime.tables import read_table
    from flowvi.targets import LocalTarget, ModelError, Site, Target, from_density, from_pyro
    from flowvi.targets.streams import read_rows
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
    "AmortizedGuide",
    "BlockGuide",
    "Blocks",
    "Draws",
    "Epoch",
    "Fit",
    "Fits",
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
    "Prefixes",
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
    "amortize",
    "average",
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
    "nuts",
    "predict",
    "pyro_guide",
    "read_rows",
    "read_table",
    "renyi",
    "report",
    "resample",
    "sbc",
    "sensitivity",
    "structure",
    "to_inference_data",
    "wake_sleep",
    "where",
]

# Modules of the public names. A name is imported when it is first needed: torch and Pyro take
# seconds, which the help of a command should not.
_MODULES = {
    "amortized.amortize": "amortize",
    "amortized.guide": "AmortizedGuide",
    "amortized.table": "Fits",
    "analysis.average": "average",
    "analysis.compare": "compare",
    "analysis.diagnosis": "diagnose",
    "analysis.evidence": "evidence",
    "analysis.loo": "loo",
    "analysis.neutra": "neutra",
    "analysis.nuts": "nuts",
    "analysis.sbc": "sbc",
    "analysis.sensitivity": "sensitivity",
    "bnn": "LIKELIHOODS PRIORS bayesian",
    "draws.diagnose": "bounds where",
    "draws.draws": "Draws RowDraws",
    "draws.prediction": "Prediction predict",
    "draws.resampling": "resample",
    "draws.row_bounds": "RowBounds",
    "fitting.fit": "fit",
    "fitting.fit_nested": "nested",
    "fitting.load": "load",
    "fitting.result": "Fit NestedFit RowFit",
    "fitting.structured_fit": "StructuredFit",
    "flows": "FLOWS",
    "guides": "GUIDES BlockGuide Blocks FlowGuide FullRank MeanField Multiplicative Prefixes",
    "guides.amortized": "Amortised PerRow",
    "interop.inference_data": "to_inference_data",
    "interop.pyro_distribution": "GuideDistribution",
    "interop.pyro_elbo": "IWELBO",
    "interop.pyro_guide": "PyroGuide pyro_guide",
    "interop.pyro_row_guide": "RowPyroGuide",
    "objectives": "OBJECTIVES elbo iwelbo renyi wake_sleep",
    "objectives.nested": "NestedTarget",
    "reporting": "report",
    "runtime.tables": "read_table",
    "targets": "LocalTarget ModelError Site Target from_density from_pyro",
    "targets.streams": "read_rows",
    "targets.structure": "MarginalTarget Structure structure",
    "training.epochs": "Epoch",
    "training.minibatch": "Minibatch",
    "training.records": "Step",
    "training.schedule": "Schedule",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}

# Where `groups` was when pages first named it.
sys.modules[f"{__name__}.groups"] = groups


if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            value = import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
