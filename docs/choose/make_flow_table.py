"""Write the table of flow families in flow.md anew, from the registry.

python docs/choose/make_flow_table.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flowvi.flows import FLOWS, Chain, Layer
from flowvi.flows.facts import FACTS

PAGE = Path(__file__).with_name("flow.md")
BEGIN, END = "<!-- table of flows: begin -->\n", "<!-- table of flows: end -->\n"
HEADER = (
    "flow",
    "sample",
    "log_prob",
    "inverse",
    "path gradient by",
    "conditional",
    "universal",
    "when to use it",
)
DIM, CONTEXT = 16, 2


def table() -> str:
    """The table in Markdown, one line for each row of `FLOWS`."""
    lines = [HEADER, ("---",) * len(HEADER)]
    lines += [row(name, build) for name, build in FLOWS.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def row(name: str, build: Callable[..., Layer]) -> tuple[str, ...]:
    """The cells of one flow: what is known of it, and what its layers say of themselves."""
    facts = FACTS[name]
    sizes = {"steps": 1} if name == "ffjord" else {}
    plain, conditional = build(DIM, 0, **sizes), build(DIM, CONTEXT, **sizes)
    return (
        f"`{name}`",
        facts.sample,
        facts.score,
        facts.inverse,
        path_gradient(plain),
        "yes" if count(conditional) > count(plain) else "no",
        "yes" if facts.universal else "no",
        facts.use,
    )


def path_gradient(flow: Layer) -> str:
    """How the layers carry the score: by a recursion of their own, or through their inverse."""
    own = [type(layer).push is not Layer.push for layer in parts(flow)]
    return "recursion" if all(own) else "both" if any(own) else "inverse"


def parts(flow: Layer) -> list[Layer]:
    """The layers of a chain that are no chains themselves."""
    if not isinstance(flow, Chain):
        return [flow]
    return [part for layer in flow.layers for part in parts(layer)]  # type: ignore[arg-type]


def count(flow: Layer) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in flow.parameters())


def renewed(page: str) -> str:
    """The page with the table as it should be."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
