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
from flowvi.draws.scalars import Scalar, every_scalar, table
from flowvi.draws.selection import first_scalars
from flowvi.fitting.request import STRUCTURED
from flowvi.fitting.result import Fit, NestedFit, RowFit
from flowvi.guides.registry import guide_names, make_guide
from flowvi.plots.caterpillar import unit_values
from flowvi.reporting.contents import Contents, of_fit, of_folder
from flowvi.reporting.decimals import decimals, even
from flowvi.reporting.pictures import pictures
from flowvi.reporting.units import chosen_units, doubtful_units, elements_of_units
from flowvi.runtime.arguments import require_fit
from flowvi.runtime.files import write_atomic
from flowvi.runtime.rng import isolated_rng

REPORT = "report.html"
# Rows of the posterior table, and of its part that is not folded away.
ROWS, WHOLE = 500, 40
LEAST = 20  # number of the least trusted rows that are listed
NO_RHAT = "–"
TEMPLATE = "report.html.j2"
TONES = dict(zip(VERDICTS, ("good", "care", "bad"), strict=True))
ADVICE = {
    VERDICTS[0]: "Use the draws as they are: {plain}.",
    VERDICTS[1]: "Use the resampled draws, {resampled}; those of {plain} need their weights.",
    VERDICTS[2]: "Do not draw conclusions from these draws. The reasons say what to look at.",
}
# Where the draws are: in a folder of results, or in Python.
FILES = {"plain": "posterior.nc", "resampled": "resampled.nc"}
CALLS = {"plain": "fit.draw(4000)", "resampled": "resample(fit.draw(4000))"}
REFERENCES = (
    "Vehtari, Simpson, Gelman, Yao and Gabry (2024), “Pareto smoothed importance sampling”, "
    "JMLR 25(72): k-hat and the resampled draws.",
    "Agrawal and Domke (2025), “Disentangling impact of capacity, objective, batchsize, "
    "estimators, and step-size on flow VI”, arXiv:2412.08824: the recipe of the fit.",
    "Burda, Grosse and Salakhutdinov (2016), “Importance weighted autoencoders”, "
    "arXiv:1509.00519: the bounds L_K.",
)


class Line(NamedTuple):
    """A row of the posterior table.

    Attributes:
        name: Name of the scalar.
        cells: Mean, sd, ends of the highest-density interval, median, and error of the mean.
        rhat: R-hat over restarts or chains.
    """

    name: str
    cells: tuple[str, ...]
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
    environment.filters["zip"] = zip
    drawn = pictures(contents)
    diagnosis = contents.diagnosis
    verdict = diagnosis.verdict if diagnosis else "not judged"
    facts = contents.facts
    first, others = _chosen(contents)
    rows, folded = _lines(contents, first), _lines(contents, others[:ROWS])
    total = sum(math.prod(value.shape[2:]) for value in contents.kept.values.values())
    return environment.get_template(TEMPLATE).render(
        title=facts.get("model", "") or "fit",
        verdict=verdict,
        tone=TONES.get(verdict, "care"),
        advice=ADVICE.get(verdict, "There are too few draws to judge them.").format(
            **(FILES if contents.folder else CALLS)
        ),
        restart_words="--restarts 2" if contents.folder else "restarts=2",
        table_words="summary.csv" if contents.folder else "draws.summary()",
        reasons=diagnosis.reasons if diagnosis else (),
        numbers=list(_numbers(contents)),
        fitted=list(_fitted(contents)),
        sites=contents.sites,
        log=contents.log,
        rows=rows[:WHOLE],
        rest=rows[WHOLE:],
        folded=folded,
        least=list(_least_trusted(diagnosis)),
        more=max(total - len(rows) - len(folded), 0) if not _unit_facts(contents.kept) else 0,
        units=_unit_facts(contents.kept),
        doubtful=doubtful_units(contents.kept),
        compared=any(row.rhat != NO_RHAT for row in rows),
        restarts=len(_by_restart(contents).log_p) > 1,
        alone=contents.facts.get("restarts", 0) != 1 or "inner" in contents.facts,
        kept=contents.kind,
        pictures={key: [p for p in drawn if p.key == key] for key in {p.key for p in drawn}},
        ladder=contents.evidence,
        sensitivity=contents.sensitivity,
        part_of_model=_unscaled(contents),
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


def _lines(c: Contents, chosen: list[Scalar]) -> list[Line]:
    """Rows of the posterior table."""
    if not chosen:
        return []
    numbers = table(c.kept, chosen=chosen)
    low, high = numbers.columns[2:4]
    sds = numbers["sd"].to_numpy()
    places = decimals(sds)
    restarts = _by_restart(c)
    found = []
    for one, (_, row) in zip(chosen, numbers.iterrows(), strict=True):
        columns = ("mean", "sd", low, high, "50%")
        cells = [even(float(row[column]), float(row["sd"]), places) for column in columns]
        found.append(Line(one.label, (*cells, f"{row['mcse_mean']:.1g}"), _rhat(restarts, one)))
    return found


def _rhat(restarts: Draws, one: Scalar) -> str:
    if len(restarts.log_p) < 2 or one.name not in restarts.values:
        return NO_RHAT
    index: Any = (..., *one.place)
    chains = restarts[one.name][index]
    return f"{stats.rhat(chains):.3f}" if np.ptp(chains) > 0 else NO_RHAT


def _unscaled(c: Contents) -> list[str]:
    """Latent sites whose prior is left as it is, where others are scaled."""
    if c.sensitivity is None:
        return []
    return [name for name in c.sites if name not in c.sensitivity.scaled]


def _chosen(c: Contents) -> tuple[list[Scalar], list[Scalar]]:
    """Scalars of the table, and those that are folded away: constant, copies, standardised."""
    local, units = unit_values(c.kept), chosen_units(c.kept)
    if not local:
        every = list(itertools.islice(every_scalar(c.kept), ROWS + 1))
        first = list(itertools.islice(first_scalars(c.kept, c.sites), ROWS))
        shown = {one.label for one in first}
        return first, [one for one in every if one.label not in shown]
    shared = [one for one in first_scalars(c.kept, c.sites) if one.name not in local]
    by_unit = [one for name in local for one in elements_of_units(c.kept, name, units)]
    return [*shared, *by_unit][:ROWS], []


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
