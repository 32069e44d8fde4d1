"""How steps are taken: gradients, optimiser, rates, guards, state."""
