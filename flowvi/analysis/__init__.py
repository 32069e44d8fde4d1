"""Analyses of draws: evidence, LOO, model comparison, NUTS, calibration."""
