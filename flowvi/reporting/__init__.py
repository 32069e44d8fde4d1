"""Reports: one HTML file with the fit, its verdict and its pictures."""

from flowvi.reporting.page import report

__all__ = ["report"]
