"""Markov kernels and annealed importance sampling."""
