"""Types of other libraries: ArviZ's groups, Pyro's guides and losses."""
