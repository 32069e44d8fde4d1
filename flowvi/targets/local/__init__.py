"""Models with one latent vector a row: the log densities of rows."""
