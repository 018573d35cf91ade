"""Means over an epoch that stay on the device, and monitors of the best value."""
