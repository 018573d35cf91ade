"""Which composition of a run is the fastest? Trials of a few seconds each, on copies of the run."""
