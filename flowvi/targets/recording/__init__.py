"""A log density as a tape of operations of torch, and its program."""
