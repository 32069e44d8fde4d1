"""ArviZ's groups and statistics, in its versions from 0.22 to 1."""
