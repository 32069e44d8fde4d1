"""Arguments, files, tensors, memory, random numbers, processes."""
