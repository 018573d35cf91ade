"""Work on models: layer summary, eval mode, selection of parameters by pattern, weight averaging."""
