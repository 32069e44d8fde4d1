"""The report as one HTML file that works without network access."""

from __future__ import annotations

import inspect
import itertools
import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from flowvi._version import __version__
from flowvi.compat import arviz_stats as stats
from flowvi.diagnostics import VERDICTS, Diagnosis
from flowvi.draws.draws import Draws
from flowvi.draws.scalars import elements
from flowvi.fitting.request import STRUCTURED
from flowvi.fitting.result import Fit, NestedFit, RowFit
from flowvi.guides.registry import guide_names, make_guide
from flowvi.plots.caterpillar import unit_values
from flowvi.reporting.contents import Contents, of_fit, of_folder
from flowvi.reporting.pictures import pictures
from flowvi.reporting.units import chosen_units, doubtful_units, elements_of_units
from flowvi.runtime.arguments import require_fit
from flowvi.runtime.files import write_atomic
from flowvi.runtime.rng import isolated_rng

REPORT = "report.html"
ROWS = 200  # of the posterior table
LEAST = 20  # number of the least trusted rows that are listed
NO_RHAT = "–"
TEMPLATE = "report.html.j2"
TONES = dict(zip(VERDICTS, ("good", "care", "bad"), strict=True))
ADVICE = {
    VERDICTS[0]: "Use the draws in posterior.nc as they are.",
    VERDICTS[1]: "Use the draws in resampled.nc; those in posterior.nc need their weights.",
    VERDICTS[2]: "Do not draw conclusions from these draws. The reasons say what to look at.",
}
REFERENCES = (
    "Vehtari, Simpson, Gelman, Yao and Gabry (2024), “Pareto smoothed importance sampling”, "
    "JMLR 25(72): k-hat and the resampled draws.",
    "Agrawal and Domke (2025), “Disentangling impact of capacity, objective, batchsize, "
    "estimators, and step-size on flow VI”, arXiv:2412.08824: the recipe of the fit.",
    "Burda, Grosse and Salakhutdinov (2016), “Importance weighted autoencoders”, "
    "arXiv:1509.00519: the bounds L_K.",
)


class Scalar(NamedTuple):
    """A row of the posterior table."""

    name: str
    mean: str
    sd: str
    low: str
    median: str
    high: str
    rhat: str


def report(
    source: Fit | RowFit | NestedFit | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    draws: int = 4000,
    seed: int = 0,
) -> Path:
    """Write a report on a fit as one HTML file that includes its pictures.

    Args:
        source: A fit, or a folder that ``flowvi fit`` wrote; only files of the folder are read.
        out: The file to write. For a folder the default is its report.html.
        draws: For a fit, number of draws from each guide, or for each row.
        seed: For a fit, seed of the draws.

    Returns:
        The path of the file.

    Raises:
        ValueError: The folder holds no results, or a fit was given without `out`.
    """
    kinds = (Fit, RowFit, NestedFit)
    like = "a fit, or a folder that flowvi fit wrote"
    require_fit("report", source, (*kinds, str, os.PathLike), like)
    if isinstance(source, kinds):
        if out is None:
            raise ValueError('Say where the report goes: report(fit, "report.html").')
        contents, file = of_fit(source, draws, seed), Path(out)
    else:
        contents = of_folder(Path(source))
        file = Path(source) / REPORT if out is None else Path(out)
    write_atomic(file, page(contents).encode())
    return file


def page(contents: Contents) -> str:
    """HTML text of the page, with all names of the user escaped."""
    import jinja2

    loader = jinja2.PackageLoader("flowvi.reporting", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    drawn = pictures(contents)
    diagnosis = contents.diagnosis
    verdict = diagnosis.verdict if diagnosis else "not judged"
    facts = contents.facts
    rows = list(itertools.islice(_scalars(contents), ROWS + 1))
    return environment.get_template(TEMPLATE).render(
        title=facts.get("model", "") or "fit",
        verdict=verdict,
        tone=TONES.get(verdict, "care"),
        advice=ADVICE.get(verdict, "There are too few draws to judge them."),
        reasons=diagnosis.reasons if diagnosis else (),
        numbers=list(_numbers(contents)),
        fitted=list(_fitted(contents)),
        sites=contents.sites,
        log=contents.log,
        rows=rows[:ROWS],
        least=list(_least_trusted(diagnosis)),
        more=len(rows) > ROWS,
        units=_unit_facts(contents.kept),
        doubtful=doubtful_units(contents.kept),
        compared=any(row.rhat != NO_RHAT for row in rows),
        restarts=len(_by_restart(contents).log_p) > 1,
        alone=contents.facts.get("restarts", 0) != 1 or "inner" in contents.facts,
        kept=contents.kind,
        pictures={key: [p for p in drawn if p.key == key] for key in {p.key for p in drawn}},
        ladder=contents.evidence,
        improper=facts.get("improper", ()),
        guides=_guide_references(str(facts.get("guide", ""))),
        references=REFERENCES,
        versions=_versions(facts),
        seed=facts.get("seed", "unknown"),
        command=_command(facts),
        made=str(facts.get("created_at", ""))[:10],
        flowvi=__version__,
    )


def _numbers(c: Contents) -> Iterator[tuple[str, str, str]]:
    """The most important numbers: name, value, explanation."""
    d = c.diagnosis
    if d is None:
        return
    if math.isnan(d.rhat):
        good = d.khat < d.khat_threshold
        yield (
            "Pareto k-hat",
            f"{d.khat:.2f}",
            f"{'below' if good else 'not below'} {d.khat_threshold:.2f}",
        )
    else:
        yield "R-hat", f"{d.rhat:.3f}", f"{d.divergences} divergences"
    yield "effective draws", f"{d.ess:,.0f}", f"of {d.draws:,}"
    if math.isfinite(d.log_evidence):
        yield "log evidence", f"{d.log_evidence:.3f}", f"± {d.log_evidence_se:.2g}"
    if math.isfinite(d.elbo):
        yield "ELBO", f"{d.elbo:.3f}", f"± {d.elbo_se:.2g}"
        yield "KL(q || p)", f"{d.gap:.3g}", "nats"


def _least_trusted(d: Diagnosis | None) -> Iterator[tuple[str, ...]]:
    """Table lines of the least trusted rows of the data."""
    if d is None or d.rows is None:
        return
    r = d.rows
    for i in r.worst(LEAST):
        evidence = f"{r.log_evidence[i]:.3f} ± {r.log_evidence_se[i]:.2g}"
        yield r.labels[i], r.verdict[i], f"{r.khat[i]:.2f}", f"{r.ess[i]:,.0f}", evidence


def _fitted(c: Contents) -> Iterator[tuple[str, str]]:
    f = c.facts
    columns = [site["columns"][1] for site in c.sites.values()]
    names = {
        "model": "Model",
        "structure": "Structure",
        "guide": "Guide of shared latents" if "shared" in f else "Guide",
        "objective": "Objective",
        "precision": "Precision",
        "inner": "Guide of rows",
        "steps": "Steps",
        "epochs": "Epochs",
        "particles": "Draws a step",
        "restarts": "Restarts",
    }
    if "inner" in f:
        names["particles"] = "Draws of each row"
    for key, word in names.items():
        if key in f:
            yield word, str(f[key])
    if columns:
        yield "Dimensions", f"{max(columns)} (of {len(columns)} latent sites)"
    for group in ("observed_data", "constant_data"):
        sizes = _sizes(c, group)
        if sizes:
            yield group.replace("_", " ").capitalize(), sizes
    if "seconds" in f:
        yield "Time", f"{float(f['seconds']):.1f} s"
    if f.get("interrupted"):
        yield "Interrupted", "yes: these are the results of the steps until then"
    if f.get("skipped"):
        yield "Steps skipped", f"{f['skipped']} (their gradient was not finite, or far too long)"


def _sizes(c: Contents, group: str) -> str:
    from flowvi.compat.arviz_groups import has_group

    if not has_group(c.plain, group):
        return ""
    data = c.plain[group]
    return ", ".join(f"{name} {tuple(data[name].shape)}" for name in data.data_vars)


def _scalars(c: Contents) -> Iterator[Scalar]:
    """Mean, sd, quantiles and R-hat over restarts of every scalar."""
    plain, local = _by_restart(c), unit_values(c.kept)
    units = chosen_units(c.kept)

    def every(draws: Draws, name: str) -> Iterator[tuple[str, str, np.ndarray]]:
        return elements_of_units(draws, name, units) if name in local else elements(draws, name)

    for name in [*(n for n in c.kept.values if n not in local), *local]:
        restarts = {label: x for _, label, x in every(plain, name)}
        for _, label, x in every(c.kept, name):
            rhat = NO_RHAT
            if len(plain.log_p) > 1 and label in restarts:
                rhat = f"{stats.rhat(restarts[label].reshape(plain.log_p.shape)):.3f}"
            low, middle, high = np.quantile(x, (0.05, 0.5, 0.95))
            mean, sd = f"{x.mean():.4g}", f"{x.std(ddof=1):.4g}"
            yield Scalar(label, mean, sd, f"{low:.4g}", f"{middle:.4g}", f"{high:.4g}", rhat)


def _unit_facts(draws: Draws) -> dict[str, Any]:
    """Number and plate of the units, and how many of them are in the table."""
    if draws.units is None:
        return {}
    bad = int(draws.units.bad.sum())
    return {
        "count": f"{len(draws.units.bad):,}",
        "plate": draws.units.plate,
        "shown": len(chosen_units(draws)),
        "bad": bad,
        "draws": f"{draws.units.draws:,}",
    }


def _by_restart(c: Contents) -> Draws:
    """Draws whose chains are restarts or Markov chains; resampled draws have one chain only."""
    return c.weighted if c.kept.resampled and c.weighted is not None else c.kept


def _guide_references(name: str) -> list[str]:
    """References from the docstrings of the parts of a guide or flow."""
    if name not in guide_names():
        return []
    with isolated_rng(0):
        try:
            parts = make_guide(name, 4).modules()
        except ValueError:  # some flows need a certain D
            return []
    found: dict[str, None] = {}
    for kind in dict.fromkeys(type(part) for part in parts):
        _, _, after = (inspect.getdoc(kind) or "").partition("References:\n")
        # An entry begins with a line that contains a year; the following lines belong to it.
        entries = re.split(r"\n(?=[^\n]*\(\d{4}\))", after.split("\n\n")[0])
        found |= {" ".join(entry.split()): None for entry in entries if entry.strip()}
    return list(found)


def _versions(facts: Any) -> list[tuple[str, str]]:
    return [
        ("flowvi", str(facts.get("flowvi", facts.get("inference_library_version", "unknown")))),
        ("torch", str(facts.get("torch", torch.__version__))),
        ("numpy", np.__version__),
        ("Python", platform.python_version()),
    ]


def _command(facts: Any) -> str:
    """The command or call that repeats the fit."""
    if "command" in facts:
        return str(facts["command"])
    names: tuple[str, ...] = ("guide", "inner", "steps", "epochs", "restarts", "seed")
    function = "nested" if "inner" in facts else "fit"
    if "shared" in facts:
        # The guide of the shared latents, and the number of its steps, are chosen by the fit.
        facts = {**facts, "guide": STRUCTURED}
        names = ("guide", "restarts", "seed")
    given = ", ".join(f"{name}={facts[name]!r}" for name in names if name in facts)
    return f"flowvi.{function}(target, {given})"
