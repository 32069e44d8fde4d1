"""Numbers from draws: evidence, LOO, comparison, NUTS, calibration."""
