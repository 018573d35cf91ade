"""Optimizer steps, learning rates and the durations of schedules."""
