"""Checkpoints: the saved state of a run, atomic file writes, sharded tensors, resuming with another world size."""
