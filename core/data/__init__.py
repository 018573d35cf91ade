"""Batches and where they come from: data sets, loaders that resume in the middle of an epoch, sharding."""
