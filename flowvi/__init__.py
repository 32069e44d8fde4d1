"""flowvi: normalizing-flow guides for arbitrary Bayesian models."""
