"""Diagnostics of log weights and draws: functions of arrays that return frozen records."""

from flowvi.diagnostics.bridge_sampling import with_bridge
from flowvi.diagnostics.energy_distance import Distances, distances
from flowvi.diagnostics.evidence import LADDER, Evidence, RowEvidence, evidence
from flowvi.diagnostics.finding import VERDICTS, Check
from flowvi.diagnostics.findings import distant_restarts
from flowvi.diagnostics.importance import (
    MIN_DRAWS,
    Bound,
    Bounds,
    Estimate,
    Psis,
    RowPsis,
    as_chains,
    check_weights,
    elbo,
    gap,
    iw_bounds,
    iw_bounds_of_rows,
    khat_threshold,
    log_evidence,
    psis,
    psis_of_rows,
)
from flowvi.diagnostics.mcmc import diagnose_chains
from flowvi.diagnostics.row_evidence import evidence_of_rows
from flowvi.diagnostics.row_verdict import diagnose_rows
from flowvi.diagnostics.rows import Rows
from flowvi.diagnostics.verdict import Diagnosis, diagnose
from flowvi.diagnostics.weight_regions import Where, where

__all__ = [
    "LADDER",
    "MIN_DRAWS",
    "VERDICTS",
    "Bound",
    "Bounds",
    "Check",
    "Diagnosis",
    "Distances",
    "Estimate",
    "Evidence",
    "Psis",
    "RowEvidence",
    "RowPsis",
    "Rows",
    "Where",
    "as_chains",
    "check_weights",
    "diagnose",
    "diagnose_chains",
    "diagnose_rows",
    "distances",
    "distant_restarts",
    "elbo",
    "evidence",
    "evidence_of_rows",
    "gap",
    "iw_bounds",
    "iw_bounds_of_rows",
    "khat_threshold",
    "log_evidence",
    "psis",
    "psis_of_rows",
    "where",
    "with_bridge",
]
