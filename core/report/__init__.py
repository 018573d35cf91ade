"""Charts, tables and pages that show a run, as text, SVG, HTML and matplotlib figures. Nothing here needs torch."""
