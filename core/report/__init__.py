"""Curves, tables and pages that show a run: text, SVG, HTML and matplotlib pictures. None needs torch."""
