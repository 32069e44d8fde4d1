"""Fits: starts, restarts, escalation, results and saved folders."""
