"""Metrics: weighted means kept on the device, asynchronous copies to the host, and monitoring of the best value."""
