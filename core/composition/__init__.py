"""Compose plugins: find them by name, parse their options, check and order them, explain the result."""
