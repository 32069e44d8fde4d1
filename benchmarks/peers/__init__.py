"""Variational fits of the posteriors of the corpus by other libraries."""
