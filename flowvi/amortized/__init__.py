"""Amortised posteriors: one guide for every data set of a model."""
