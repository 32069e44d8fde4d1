"""Conversions to other libraries: ArviZ groups, Pyro guides and losses."""
