"""Checkpoints: what they hold, how files are written atomically, sharded tensors, resuming in another world size."""
