"""Batches and their sources: data sets, loaders that resume in the middle of an epoch, sharding over processes."""
