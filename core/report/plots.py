"""Plots of curves, as text for the terminal and as matplotlib figures readable on a light and on a dark page."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from loopctl.errors import UsageError, one_line

BLOCKS = " ▁▂▃▄▅▆▇█"
# Colour-blind-safe colours after Okabe and Ito, and grey: each has a contrast ratio of at least 3 with a white page and
# with a dark one. Dashes distinguish curves when there are more curves than colours, and in black and white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#C46BA0")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)), (0, (8, 2, 2, 2, 2, 2)))
GREY = "#808080"
STYLE: Any = {
    "svg.hashsalt": "loopctl",          # with a fixed salt and no date, equal figures have equal bytes
    "svg.fonttype": "none", "savefig.transparent": True, "figure.dpi": 120,
    "text.color": GREY, "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "axes.facecolor": "none", "figure.facecolor": "none", "font.size": 10, "lines.linewidth": 1.8,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}


def bars(values: list[float], caption: str, width: int | None = None, height: int = 12) -> str:
    """Return a bar chart of `values` as text, from 0 to the largest value, with `caption` below.

    width: characters across; the terminal's width, but at most 72, if left out
    height: lines
    """
    width = width or max(8, min(72, get_terminal_size((84, 24)).columns - 12))
    columns = [values[index * len(values) // width] for index in range(width)]
    top = max(values) or 1.0
    filled = [round(value / top * height * 8) for value in columns]
    lines = ["".join(BLOCKS[min(8, max(0, eighths - 8 * row))] for eighths in filled) for row in range(height)]
    labels = {height - 1: f"{top:.3g}", 0: "0"}
    rows = [f"{labels.get(row, ''):>9} │{lines[row].rstrip()}" for row in reversed(range(height))]
    return "\n".join([*rows, f"{'':>9} └{'─' * width}", f"{'':>11}{caption}"])


@contextmanager
def picture(out: Path, width: float = 7.0, height: float = 3.6) -> Iterator[Any]:
    """Yield a matplotlib figure to draw on, then write it to `out`, in the format that its suffix names.

    width, height: in inches

    Raises UsageError if matplotlib is not installed or the file cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("it needs matplotlib; install it with: pip install 'loopctl[plot]'") from None
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        drawing = BytesIO()                 # so that a failure leaves no partial file
        extension = out.suffix[1:].lower()
        no_date = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
        try:
            figure.savefig(drawing, format=extension, metadata=no_date.get(extension))
            out.write_bytes(drawing.getvalue())
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"{out} cannot be written: {one_line(error)}") from error


def stroke(number: int) -> dict[str, Any]:
    """Return the colour and dashes of curve `number`, from 0; the first twenty curves have different pairs."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
