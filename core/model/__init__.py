"""Work on a model: a table of its layers, evaluation mode, parameters by pattern, averaged weights."""
