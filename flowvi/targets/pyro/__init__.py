"""Pyro models: running, checking and capturing them."""
