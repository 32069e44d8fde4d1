"""Training steps: gradients, optimiser, step sizes, guards, state."""
