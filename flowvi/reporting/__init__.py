"""One file that tells a colleague what was fitted, and whether to believe it."""

from flowvi.reporting.page import report

__all__ = ["report"]
